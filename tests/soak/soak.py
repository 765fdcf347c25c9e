"""Kill training runs with SIGKILL again and again, resume them each time, and compare them with ones left alone.

``make soak``, or ``python tests/soak/soak.py --kills 6``. Rounds alternate between one process, two DDP and two FSDP
processes. Kills come after a random number of steps, every other one while a checkpoint is being written, in the
background or not; every fifth comes at a random moment of the start-up. Of two processes one is killed or both are; one
that is left has to end by itself, or else is made to as ``torchrun`` does it.

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
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from consumed import attempts, check, expected
from safetensors.torch import load_file
from soak_run import BATCH, MODES, STEPS_BETWEEN_CHECKPOINTS, Processes, Run, SoakError

from fastmae import data
from fastmae.train.checkpoint.state import versions

SAME = "the same weights, losses and samples"
"""The verdict that there has to be."""


class Soak:
    """The rounds, and what is counted of them."""

    def __init__(self, folder: Path, kills: int, steps: int) -> None:
        self.folder, self.kills, self.steps = folder, kills, steps
        self.counts: Counter[str] = Counter()
        self.rounds: list[dict] = []
        self.slowest = 0.0
        self.begun = time.monotonic()
        self._undisturbed: dict[str, Run] = {}
        self._start_up: dict[str, float] = {}
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

    def _undisturbed_run(self, mode: str) -> Run:
        if mode not in self._undisturbed:
            run, begun = Run(mode, self.folder / f"undisturbed-{mode}", self.steps), time.monotonic()
            processes = run.start()
            while processes.running() and run.newest_step < 0:
                time.sleep(0.01)
            self._start_up[mode] = time.monotonic() - begun
            processes.finish()
            check(attempts(run.consumed, BATCH), self._wanted, begins=[0])
            self._undisturbed[mode] = run
            seconds = f"{time.monotonic() - begun:.0f} s, {self._start_up[mode]:.0f} s of them to start up"
            self._say(f"undisturbed, {mode}: {self.steps} steps in {seconds}")
        return self._undisturbed[mode]

    def _round(self, mode: str, kills: int) -> None:
        undisturbed = self._undisturbed_run(mode)
        run = Run(mode, self.folder / f"round-{len(self.rounds)}", self.steps)
        had_one, done = False, 0
        while done < kills:
            begins, processes = max(run.newest_step, 0), run.start()
            if not self._kill_somewhere(run, processes, begins, kills - done):
                processes.finish()
                break
            done += 1
            saved = run.verify()
            if had_one and saved is None:
                raise SoakError(f"kill {self.counts['kills']}: no checkpoint is left in {run.out}")
            had_one = saved is not None
            self._say(f"kill {self.counts['kills']} ({mode}): {saved.name if saved else 'no checkpoint yet'}")
        else:
            run.start().finish()
        again = self._compare(run, undisturbed)
        self.rounds.append({"mode": mode, "processes": MODES[mode], "kills": done, "steps_done_again": again})
        self._say(f"round {len(self.rounds)}, {mode}: {done} kills, {again} steps done again, the same end")

    def _kill_somewhere(self, run: Run, processes: Processes, begins: int, left: int) -> bool:
        """Kill some or all; False if the run ended before.

        Args:
            begins: step that the run goes on from.
            left: kills of this round that are still to come, so that steps are left for them.
        """
        number, size = self.counts["kills"], len(processes.children)
        starting_up, while_saving = number % 5 == 4, number % 2 == 1 and number % 5 != 4
        victims = [random.randrange(size)] if size > 1 and number // 2 % 2 else list(range(size))
        step = begins + random.random() * (self.steps - begins) / left
        moment = time.monotonic() + random.uniform(0, 0.8 * self._start_up[run.mode]) if starting_up else None
        while processes.running():
            if moment is None and run.newest_step >= step - STEPS_BETWEEN_CHECKPOINTS:
                moment = time.monotonic() + random.uniform(0, 0.2)
            if moment is not None and time.monotonic() >= moment and (not while_saving or run.saving):
                saving = run.saving
                processes.kill(victims)
                self._count(run, processes, saving, len(victims) < size)
                return True
            time.sleep(0.0005 if moment else 0.005)
        return False

    def _count(self, run: Run, processes: Processes, saving: bool, one_of_two: bool) -> None:
        begun, trained = time.monotonic(), run.trains
        # Before they have met, they wait for each other for long, as processes of PyTorch do.
        how = processes.leave() if trained else processes.leave(1.0)
        if any(child.returncode == 0 for child in processes.children):
            raise SoakError(f"a process ended with exit code 0 after a kill:\n{processes.log.read_text()[-4000:]}")
        if one_of_two and trained:
            self.slowest = max(self.slowest, time.monotonic() - begun)
            self.counts[f"survivor ended {how}"] += 1
        self.counts["kills"] += 1
        self.counts["while_saving"] += saving
        self.counts["one_of_two" if one_of_two else "all"] += 1
        self.counts["starting_up"] += not trained
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400, help="length of the runs that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result here, for make report")
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
    print(json.dumps(result, indent=1))
    if verdict != SAME:
        sys.exit(verdict)


if __name__ == "__main__":
    main()
