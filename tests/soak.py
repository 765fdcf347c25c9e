"""Kill a training run with SIGKILL again and again, resume it each time, and compare it with one that was left alone.

``make soak``, or ``python tests/soak.py --kills 3 --steps 200``. Every other kill waits for a checkpoint that is being
written, in the background or not; the others come at any moment, start-up included. After each kill the run folder must
hold a checkpoint that loads, once it has held one; at the end of each round the weights and the logged losses must be
those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from fastmae.train.checkpoint import list_checkpoints
from fastmae.train.weights import load_model

STEPS_BETWEEN_CHECKPOINTS = 7


def start(out: Path, steps: int) -> subprocess.Popen:
    flags = {
        "--out": out, "--train.steps": steps, "--train.warmup-steps": steps // 10, "--train.num-threads": 1,
        "--train.checkpoint-every-steps": STEPS_BETWEEN_CHECKPOINTS, "--train.log-every-steps": 10,
        "--train.max-minutes": None, "--train.device": "cpu", "--train.background-save": random.choice((True, False)),
    }  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, "-m", "fastmae", "pretrain", "--resume", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
    )


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"a run ended with exit code {process.returncode}:\n{output.decode()}")


def kill_somewhere(process: subprocess.Popen, out: Path, latest: float, while_saving: bool) -> bool:
    """Kill at a random moment, or during the next save after it; False if the run ended before."""
    moment = time.monotonic() + random.uniform(0, latest)
    while process.poll() is None:
        if time.monotonic() >= moment and (not while_saving or any((out / "checkpoints").glob("*.tmp"))):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return process.returncode == -signal.SIGKILL
        time.sleep(0.0005)
    return False


def losses(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400, help="length of the run that is killed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)

    with tempfile.TemporaryDirectory(prefix="fastmae-soak-") as folder:
        undisturbed = Path(folder) / "undisturbed"
        begun = time.monotonic()
        finish(start(undisturbed, arguments.steps))
        seconds = time.monotonic() - begun
        expected = load_file(undisturbed / "model.safetensors")
        print(f"undisturbed: {arguments.steps} steps in {seconds:.0f} s", flush=True)

        kills = rounds = saving = 0
        while kills < arguments.kills:
            rounds += 1
            out, killed_now, saved_before = Path(folder) / f"round-{rounds}", True, False
            while killed_now and kills < arguments.kills:
                while_saving = kills % 2 == 1
                killed_now = kill_somewhere(process := start(out, arguments.steps), out, 0.8 * seconds, while_saving)
                if not killed_now:
                    finish(process)
                    break
                kills, saving = kills + 1, saving + while_saving
                saved = list_checkpoints(out / "checkpoints") if out.exists() else []
                if saved:
                    load_model(out)
                elif saved_before:
                    sys.exit(f"kill {kills}: no checkpoint is left in {out}")
                saved_before = bool(saved)
                print(f"kill {kills}: newest checkpoint {saved[0].name if saved else 'none yet'} loads", flush=True)
            finish(start(out, arguments.steps))
            weights = load_file(out / "model.safetensors")
            different = [name for name in expected if not torch.equal(weights[name], expected[name])]
            if different or weights.keys() != expected.keys():
                sys.exit(f"round {rounds}: weights differ from the undisturbed run's: {different[:5]}")
            if losses(out) != losses(undisturbed):
                sys.exit(f"round {rounds}: logged losses differ from the undisturbed run's")
        print(f"{kills} kills, {saving} of them while a checkpoint was written, in {rounds} rounds: bit-identical")


if __name__ == "__main__":
    main()
