"""The processes of a run that ``soak.py`` kills: starting them, ending them, and what their run folder holds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from fastmae.train.checkpoint import list_checkpoints, open_checkpoint, step_of

ROOT = Path(__file__).resolve().parents[2]
MODES = {"none": 1, "ddp": 2, "fsdp": 2}
BATCH, STEPS_BETWEEN_CHECKPOINTS, STALL = 16, 7, 2.0
PATIENCE = 20.0
"""Seconds that a process has to find out that another one was killed, until it is made to end."""
FLAGS = f"""
--recipe photographs --train.optimizer adamw
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

    def leave(self, patience: float = PATIENCE) -> str:
        """Wait for those that were not killed: whether they ended by themselves, by SIGTERM or by SIGKILL."""
        for number, seconds, how in ((None, patience, "by themselves"), (signal.SIGTERM, 3, "SIGTERM")):
            deadline = time.monotonic() + seconds
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
    def trains(self) -> bool:
        """Whether a process of the last start has come to its images."""
        begun = f'{{"attempt": {self.starts - 1},'
        return self.consumed.exists() and any(begun in path.read_text() for path in self.consumed.glob("*.jsonl"))

    @property
    def consumed(self) -> Path:
        return self.out.with_name(f"{self.out.name}-consumed")

    @property
    def saving(self) -> bool:
        return any((self.out / "checkpoints").glob("*.tmp"))

    @property
    def newest_step(self) -> int:
        """Of its checkpoints; -1 before the first."""
        return max(map(step_of, list_checkpoints(self.out / "checkpoints")), default=-1)

    def losses(self) -> list[tuple[int, float]]:
        rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss"]) for row in rows]

    def verify(self) -> Path | None:
        """The newest checkpoint; every one must be whole."""
        saved = list_checkpoints(self.out / "checkpoints") if self.out.exists() else []
        for path in saved:
            open_checkpoint(path)
        return saved[0] if saved else None
