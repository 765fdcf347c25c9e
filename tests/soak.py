"""Kill training runs with SIGKILL again and again, resume them each time, and compare them with ones left alone.

``make soak``, or ``python tests/soak.py --kills 6``. Rounds alternate between one process, two with DDP and two with
FSDP. Every other kill waits for a checkpoint that is being written, in the background or not; the others come at any
moment, start-up included. Of two processes one is killed or both are; one that is left has to end by itself, or else
does as ``torchrun`` would make it.

After each kill every checkpoint of the run folder must be whole, and there must be one once there was one. At the end
of each round the weights and the logged losses must be those of the undisturbed run of as many processes, bit for bit,
and each step must have consumed the samples at its positions, none twice, none left out, none of an earlier step again
but those after the checkpoint that was gone on from.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from consumed import attempts, check, expected
from safetensors.torch import load_file
from soak_report import write_page

from fastmae import data
from fastmae.train.checkpoint import list_checkpoints, verify_checkpoint
from fastmae.train.checkpoint.folder import step_of
from fastmae.train.state import versions

MODES = {"none": 1, "ddp": 2, "fsdp": 2}
BATCH, STEPS_BETWEEN_CHECKPOINTS, STALL = 16, 7, 5.0
PATIENCE = 3 * STALL
"""Seconds that a process has to find out that another one was killed, until it is made to end."""
FLAGS = f"""
--model.img-size 32 --model.patch-size 8 --model.embed-dim 48 --model.depth 2 --model.num-heads 2
--model.decoder-embed-dim 32 --model.decoder-depth 1 --model.decoder-num-heads 2
--train.global-batch-size {BATCH} --train.log-every-steps 10 --train.checkpoint-every-seconds None
--train.checkpoint-every-steps {STEPS_BETWEEN_CHECKPOINTS} --train.max-minutes None --train.num-threads 1
--train.device cpu --data.num-threads 1 --data.loader torch --report.stall-seconds {STALL}
"""


class SoakError(Exception):
    """What must never happen has happened."""


@dataclass
class Processes:
    """The processes of one start of a run, and the store at which they meet."""

    children: list[subprocess.Popen]
    store: dist.TCPStore | None
    log: Path

    def kill(self, ranks: list[int]) -> None:
        """SIGKILL to some, at once."""
        for rank in ranks:
            self.children[rank].send_signal(signal.SIGKILL)
        for rank in ranks:
            self.children[rank].wait()

    def running(self) -> bool:
        return all(child.poll() is None for child in self.children)

    def leave(self) -> str:
        """Wait for those that were not killed: whether they ended by themselves, by SIGTERM or by SIGKILL."""
        for number, patience, how in ((None, PATIENCE, "by themselves"), (signal.SIGTERM, 5, "SIGTERM")):
            deadline = time.monotonic() + patience
            for child in self.children:
                if number and child.poll() is None:
                    child.send_signal(number)
            while time.monotonic() < deadline:
                if all(child.poll() is not None for child in self.children):
                    return how
                time.sleep(0.02)
        self.kill([rank for rank, child in enumerate(self.children) if child.poll() is None])
        return "SIGKILL"

    def finish(self) -> None:
        """Wait for a run that nobody kills.

        Raises:
            SoakError: if a process ends with another exit code than 0.
        """
        codes = [child.wait() for child in self.children]
        if any(codes):
            raise SoakError(f"a run ended with exit codes {codes}:\n{self.log.read_text()[-4000:]}")


@dataclass
class Run:
    """A run folder of one mode, and how often it was started."""

    mode: str
    out: Path
    steps: int
    starts: int = 0
    background: list[bool] = field(default_factory=list)

    def start(self) -> Processes:
        size = MODES[self.mode]
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if size > 1 else None
        background = random.choice((True, False))
        words = [*FLAGS.split(), "--train.steps", self.steps, "--train.warmup-steps", self.steps // 10]
        words += ["--out", self.out, "--train.parallel", self.mode, "--train.background-save", background, "--resume"]
        arguments = [self.consumed, self.starts, "pretrain", *words]
        log = self.out.with_name(f"{self.out.name}-{self.starts}.log")
        self.starts += 1
        children = []
        with log.open("wb") as output:
            for rank in range(size):
                # Those of torchrun; this process holds the store, as its agent does, so that no port has to be guessed.
                own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port} if store else {}
                own |= {"TORCHELASTIC_USE_AGENT_STORE": True, "OMP_NUM_THREADS": 1}
                environment = os.environ | ({key: str(value) for key, value in own.items()} if store else {})
                command = [sys.executable, str(Path(__file__).with_name("soak_process.py")), *map(str, arguments)]
                children.append(
                    subprocess.Popen(
                        command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment, cwd=ROOT
                    )
                )
        return Processes(children, store, log)

    @property
    def consumed(self) -> Path:
        return self.out.with_name(f"{self.out.name}-consumed")

    @property
    def saving(self) -> bool:
        return any((self.out / "checkpoints").glob("*.tmp"))

    def losses(self) -> list[tuple[int, float]]:
        rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss"]) for row in rows]

    def verify(self) -> Path | None:
        """The newest checkpoint; every one must be whole."""
        saved = list_checkpoints(self.out / "checkpoints") if self.out.exists() else []
        for path in saved:
            verify_checkpoint(path)
        return saved[0] if saved else None


ROOT = Path(__file__).resolve().parent.parent


class Soak:
    """The rounds, and what is counted of them."""

    def __init__(self, folder: Path, kills: int, steps: int) -> None:
        self.folder, self.kills, self.steps = folder, kills, steps
        self.counts: Counter[str] = Counter()
        self.rounds: list[dict] = []
        self.slowest = 0.0
        self.begun = time.monotonic()
        self._undisturbed: dict[str, tuple[Run, float]] = {}
        self._wanted = expected(steps, BATCH, len(data.open_dataset(None)))

    def run(self) -> None:
        """Rounds until there were enough kills.

        Raises:
            SoakError: if a run is not what it would have been without them.
        """
        per_round = max(1, min(6, self.kills // len(MODES)))
        while self.counts["kills"] < self.kills:
            mode = list(MODES)[len(self.rounds) % len(MODES)]
            self._round(mode, min(per_round, self.kills - self.counts["kills"]))

    def _undisturbed_run(self, mode: str) -> tuple[Run, float]:
        if mode not in self._undisturbed:
            run, begun = Run(mode, self.folder / f"undisturbed-{mode}", self.steps), time.monotonic()
            run.start().finish()
            self._undisturbed[mode] = run, time.monotonic() - begun
            check(attempts(run.consumed, BATCH), self._wanted, begins=[0])
            self._say(f"undisturbed, {mode}: {self.steps} steps in {self._undisturbed[mode][1]:.0f} s")
        return self._undisturbed[mode]

    def _round(self, mode: str, kills: int) -> None:
        undisturbed, seconds = self._undisturbed_run(mode)
        run = Run(mode, self.folder / f"round-{len(self.rounds)}", self.steps)
        newest: list[int] = []
        done = 0
        while done < kills:
            processes = run.start()
            if not self._kill_somewhere(run, processes, 0.8 * seconds):
                processes.finish()
                break
            done += 1
            saved = run.verify()
            if newest and saved is None:
                raise SoakError(f"kill {self.counts['kills']}: no checkpoint is left in {run.out}")
            newest += [step_of(saved)] if saved else []
            self._say(f"kill {self.counts['kills']} ({mode}): {saved.name if saved else 'no checkpoint yet'}")
        else:
            run.start().finish()
        again = self._compare(run, undisturbed)
        self.rounds.append({"mode": mode, "processes": MODES[mode], "kills": done, "steps_done_again": again})
        self._say(f"round {len(self.rounds)}, {mode}: {done} kills, {again} steps done again, the same end")

    def _kill_somewhere(self, run: Run, processes: Processes, latest: float) -> bool:
        """Kill at a random moment, or during the next save after it; False if the run ended before."""
        while_saving = self.counts["kills"] % 2 == 1
        size = len(processes.children)
        victims = [random.randrange(size)] if size > 1 and self.counts["kills"] // 2 % 2 else list(range(size))
        moment = time.monotonic() + random.uniform(0, latest)
        while processes.running():
            if time.monotonic() >= moment and (not while_saving or run.saving):
                saving = run.saving
                processes.kill(victims)
                self._count(run, processes, saving, len(victims) < size)
                return True
            time.sleep(0.0005)
        return False

    def _count(self, run: Run, processes: Processes, saving: bool, one_of_two: bool) -> None:
        begun = time.monotonic()
        how = processes.leave()
        if any(child.returncode == 0 for child in processes.children):
            raise SoakError(f"a process ended with exit code 0 after a kill:\n{processes.log.read_text()[-4000:]}")
        if one_of_two:
            self.slowest = max(self.slowest, time.monotonic() - begun)
            self.counts[f"survivor ended {how}"] += 1
        started = run.consumed.exists() and any(
            f'"attempt": {run.starts - 1},' in path.read_text() for path in run.consumed.glob("*.jsonl")
        )
        self.counts["kills"] += 1
        self.counts["while_saving"] += saving
        self.counts["one_of_two" if one_of_two else "all"] += 1
        self.counts["starting_up"] += not started
        self.counts[run.mode] += 1

    def _compare(self, run: Run, undisturbed: Run) -> int:
        weights, others = (load_file(r.out / "model.safetensors") for r in (run, undisturbed))
        different = [name for name in others if name not in weights or not torch.equal(weights[name], others[name])]
        if different or weights.keys() != others.keys():
            raise SoakError(f"{run.out}: weights differ from the undisturbed run's: {different[:5]}")
        if run.losses() != undisturbed.losses():
            raise SoakError(f"{run.out}: logged losses differ from the undisturbed run's")
        return check(attempts(run.consumed, BATCH), self._wanted)

    def result(self, verdict: str) -> dict:
        """What is committed."""
        return {
            "kills": self.counts["kills"],
            "by": {name: self.counts[name] for name in ("while_saving", "starting_up", "one_of_two", "all")},
            "by_mode": {mode: self.counts[mode] for mode in MODES},
            "survivors": {how: self.counts[f"survivor ended {how}"] for how in ("by themselves", "SIGTERM", "SIGKILL")},
            "slowest_survivor_seconds": round(self.slowest, 1),
            "steps": self.steps,
            "steps_between_checkpoints": STEPS_BETWEEN_CHECKPOINTS,
            "rounds": self.rounds,
            "seconds": round(time.monotonic() - self.begun),
            "machine": {"cores": os.cpu_count(), "system": platform.platform()},
            "versions": versions(),
            "verdict": verdict,
        }

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begun:4.0f} s  {text}", flush=True)


SAME = "the same weights, losses and samples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300, help="length of the runs that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result here as JSON, and into docs/surviving.md")
    parser.add_argument("--keep", type=Path, help="make the run folders here, and keep them")
    arguments = parser.parse_args()
    random.seed(arguments.seed)

    with tempfile.TemporaryDirectory(prefix="fastmae-soak-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        soak, verdict = Soak(folder, arguments.kills, arguments.steps), SAME
        try:
            soak.run()
        except Exception as error:
            verdict = f"{type(error).__name__}: {error}"
        result = soak.result(verdict)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        write_page(result)
    print(json.dumps(result, indent=1))
    if verdict != SAME:
        sys.exit(verdict)


if __name__ == "__main__":
    main()
