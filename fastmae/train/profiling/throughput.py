"""How fast the loader is alone, the model alone, and both together: the trainer's own step on the loader's own batches.

The three are measured in turn, round by round, so that a busy moment hits all alike. Before each turn the loader's
queue is full and nobody works; batches that were ready already are not counted. On a GPU the host waits for it at the
ends of a turn and nowhere in between.

Each round also times a large matrix product in the run's precision: the peak that MFU is a share of, at the same moment
and with the same threads. Where products are faster in the other of fp32 and bf16, each round trains in that one too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from fastmae.data import Batch, Loader
from fastmae.train.config import PretrainConfig
from fastmae.train.loop import Trainer
from fastmae.train.parallel import DTYPES
from fastmae.train.profiling.breakdown import Breakdown
from fastmae.train.profiling.kinds import IDLE
from fastmae.train.profiling.records import Recorder
from fastmae.train.telemetry.peak import matmul_flops

Phase = Literal["loader", "model", "both"]
PHASES: tuple[Phase, ...] = ("loader", "model", "both")

_ROUNDS, _MIN_ROUNDS = 5, 2
_READY_BEYOND_PREFETCH = 4
"""A loader's queue is not all that it has ready: DALI has one of its own, one batch is in the making, and one is on its
way to the GPU."""
_MAX_STEPS = 4096
_PROBE, _SLOW = 384, 2e10
"""Size of a short matrix product, and FLOP/s below which a CPU is not asked for large ones."""
_RECORDED_STEPS, _RECORDED_SHARE = 5, 0.2
"""Steps whose time is broken down, and the share of the measuring that they may take; at least two."""


def config_to_measure(config: PretrainConfig) -> PretrainConfig:
    """The configuration with one optimiser step for each batch, without an end, and all sizes the last one's."""
    batch_size = config.train.batch_size
    train = replace(
        config.train,
        global_batch_size=batch_size if isinstance(batch_size, int) else config.train.global_batch_size,
        epochs=None,
        steps=1 << 40,
        warmup_epochs=None,
        warmup_steps=(1 << 40) - 1,  # the learning rate stays near zero, so that nothing diverges on repeated batches
        log_every_steps=_MAX_STEPS,
        max_minutes=None,
    )
    sizes = {"progressive_sizes": ()} if hasattr(config.data, "progressive_sizes") else {}
    return replace(config, train=train, data=replace(config.data, **sizes))


class Feed:
    """Stands between trainer and loader: hands out one resident batch again and again, or the loader's, timed."""

    def __init__(self, loader: Loader):
        self.loader, self.waited = loader, 0.0
        self.resident: Batch | None = None

    def __next__(self) -> Batch:
        if self.resident is not None:
            return self.resident
        begun = time.perf_counter()
        batch = next(self.loader)
        self.waited += time.perf_counter() - begun
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


@dataclass(frozen=True)
class Turn:
    """One phase in one round: batches, seconds, of them waited for the loader, and processors at work."""

    batches: int
    seconds: float
    waited: float
    busy_cores: float


@dataclass
class Throughput:
    """What was measured.

    Attributes:
        turns: of each phase, round by round.
        decoded, masked: images in a batch, as the loader and as the model counts them.
        kind, threads: of the loader.
        cores: processors that this process may use.
        loader_cpu_seconds: processor time of the loader for a decoded image, round by round.
        breakdown: where the time of a step goes, loader and model together; recording makes the step a little slower.
        matmul_flops: FLOP/s of a large matrix product in the run's precision, round by round.
        other_precision: the one of fp32 and bf16 that the run does not use, where it was measured; else None.
        other_turns: of the model alone in that precision, round by round.
    """

    decoded: int
    masked: int
    kind: str
    threads: int
    cores: int
    turns: dict[Phase, list[Turn]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    loader_cpu_seconds: list[float] = field(default_factory=list)
    breakdown: Breakdown | None = None
    matmul_flops: list[float] = field(default_factory=list)
    other_precision: str | None = None
    other_turns: list[Turn] = field(default_factory=list)

    def rates(self, phase: Phase) -> list[float]:
        """Images a second, round by round: decoded ones for the loader, masked ones else."""
        images = self.decoded if phase == "loader" else self.masked
        return [images * turn.batches / turn.seconds for turn in self.turns[phase]]

    def rate(self, phase: Phase) -> float:
        return statistics.median(self.rates(phase))

    def together(self) -> float:
        """Rate of both together over that of the slower one alone, the median within rounds."""
        masks = self.masked / self.decoded
        rounds = zip(*map(self.rates, PHASES), strict=True)
        return statistics.median(both / min(loader * masks, model) for loader, model, both in rounds)

    def other_speedup(self) -> float:
        """Rate of the model alone in the other precision over its rate in the run's, the median within rounds."""
        pairs = zip(self.other_turns, self.turns["model"], strict=True)
        return statistics.median(a.batches / a.seconds * b.seconds / b.batches for a, b in pairs)

    def wait_share(self) -> float:
        """Share of the time, loader and model together, that the trainer waits for a batch."""
        return statistics.median(turn.waited / turn.seconds for turn in self.turns["both"])

    def step_ms(self) -> float:
        """Milliseconds of a step, loader and model together, while nothing is recorded."""
        return 1e3 * self.masked / self.rate("both")

    def idle_share(self) -> float:
        """Share of such a step in which a GPU has nothing to do though images are there.

        A kernel takes as long whether it is recorded or not, so what recording costs is idle time, and not counted.
        """
        cost = max(0.0, self.breakdown.step_ms - self.step_ms())
        return max(0.0, self.breakdown.kinds.get(IDLE, 0.0) - cost) / self.step_ms()

    def busy_cores(self, phase: Phase) -> float:
        return statistics.median(turn.busy_cores for turn in self.turns[phase])


def measure(trainer: Trainer, seconds: float) -> Throughput:
    """Measure for about so many seconds, with at least two rounds however long these take.

    Args:
        trainer: made of ``config_to_measure``; its weights are trained on.
        seconds: for all rounds together.
    """
    with trainer._open_loader() as loader:
        feed = trainer.loader = Feed(loader)
        trainer.model.train()
        return _measure(trainer, feed, seconds)


def _measure(trainer: Trainer, feed: Feed, seconds: float) -> Throughput:
    train, loader = trainer.config.train, feed.loader
    decoded = train.global_batch_size // train.masks_per_image
    found = Throughput(decoded, train.global_batch_size, loader.kind, loader.options.num_threads, loader.options.cores)
    batch = next(feed)
    one = {phase: _warm_up(trainer, feed, batch, phase) for phase in PHASES}
    other = found.other_precision = _faster_precision(trainer)
    if other is not None:
        with _computing_in(trainer, other):
            one_other = _warm_up(trainer, feed, batch, "model")
    size = _product_size(trainer)
    ready = feed.loader.options.prefetch + _READY_BEYOND_PREFETCH
    spent = sum(one.values())
    rounds = int(max(_MIN_ROUNDS, min(_ROUNDS, seconds / max(spent, 1e-6))))
    share = seconds / (rounds * len(PHASES))
    for turn in range(rounds):
        for phase in PHASES[turn % 3 :] + PHASES[: turn % 3]:
            # Slow steps leave the loader all the time it needs to be ahead; what is ready would only cost time.
            ahead = 0 if phase == "model" else max(1, min(ready, int(0.4 * share / one[phase])))
            batches = max(1, min(_MAX_STEPS // 2, math.ceil(0.8 * share / one[phase]) - ahead))
            feed.resident = batch if phase == "model" else None
            found.turns[phase].append(_take_turn(trainer, feed, phase, ahead, batches, found))
            if phase == "model":
                found.matmul_flops.append(matmul_flops(trainer.device, trainer.dtype, rounds=3, size=size))
            if phase == "model" and other is not None:
                batches = max(1, min(_MAX_STEPS // 2, math.ceil(0.8 * share / one_other)))
                with _computing_in(trainer, other):
                    found.other_turns.append(_take_turn(trainer, feed, phase, 0, batches, found))
            trainer.reporter.values.take()
    found.breakdown = _record(trainer, feed, min(_RECORDED_STEPS, int(_RECORDED_SHARE * seconds / one["both"])))
    return found


def _product_size(trainer: Trainer) -> int | None:
    """Where a CPU has no instructions for a dtype, a large product takes seconds, and a small one is as fast."""
    on_cpu = trainer.device.type == "cpu"
    return _PROBE if on_cpu and matmul_flops(trainer.device, trainer.dtype, 1, _PROBE) < _SLOW else None


def _faster_precision(trainer: Trainer) -> str | None:
    """The other of fp32 and bf16 if matrix products are faster in it, so that it is worth training in."""
    other = {torch.float32: "bf16", torch.bfloat16: "fp32"}.get(trainer.dtype)
    if (
        other is None or trainer.config.train.compile != "none"
    ):  # compiling for it takes longer than all that is measured
        return None
    own, others = (matmul_flops(trainer.device, dtype, 3, _PROBE) for dtype in (trainer.dtype, DTYPES[other]))
    return other if others > own else None


@contextmanager
def _computing_in(trainer: Trainer, precision: str) -> Iterator[None]:
    own, trainer.dtype = trainer.dtype, DTYPES[precision]
    try:
        yield
    finally:
        trainer.dtype = own


def _record(trainer: Trainer, feed: Feed, steps: int) -> Breakdown:
    """Break down steps on the loader's batches, behind those that were ready."""
    feed.resident = None
    settle(trainer.device)
    recorder = Recorder(trainer, max(2, steps), warmup=1)
    _run(trainer, feed, "both", min(feed.loader.options.prefetch + _READY_BEYOND_PREFETCH, 2 * max(2, steps)))
    trainer.reporter.values.take()
    recorder.start()
    try:
        while recorder.running:
            trainer.train_step()
            recorder.step()
    finally:
        recorder.stop()
    trainer.reporter.values.take()
    return recorder.breakdown()


def _warm_up(trainer: Trainer, feed: Feed, batch: Batch, phase: Phase) -> float:
    """Run a phase until it is warm; return about how long one batch takes."""
    feed.resident = batch if phase == "model" else None
    _run(trainer, feed, phase, 2 if phase == "model" else 1)
    _synchronize(trainer.device)
    begun = time.perf_counter()
    # A few of the loader's batches were ready; enough others make up for that.
    count = 3 * feed.loader.options.prefetch if phase == "loader" else 1
    _run(trainer, feed, phase, count)
    _synchronize(trainer.device)
    trainer.reporter.values.take()
    return max((time.perf_counter() - begun) / count, 1e-5)


def _take_turn(trainer: Trainer, feed: Feed, phase: Phase, ahead: int, batches: int, found: Throughput) -> Turn:
    settle(trainer.device)
    cpu_begun = time.process_time()
    _run(trainer, feed, phase, ahead)
    _synchronize(trainer.device)
    begun, waited, cpu = time.perf_counter(), feed.waited, time.process_time()
    _run(trainer, feed, phase, batches)
    _synchronize(trainer.device)
    elapsed = time.perf_counter() - begun
    turn = Turn(batches, elapsed, feed.waited - waited, (time.process_time() - cpu) / elapsed)
    if phase == "loader":
        settle(trainer.device)
        # From a full queue to a full queue as many images are made as are taken.
        cost = (time.process_time() - cpu_begun) / ((ahead + batches) * found.decoded)
        found.loader_cpu_seconds.append(cost)
    return turn


def _run(trainer: Trainer, feed: Feed, phase: Phase, count: int) -> None:
    for _ in range(count):
        if phase == "loader":
            next(feed)
        else:
            trainer.train_step()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def settle(device: torch.device, patience: float = 2.0) -> None:
    """Wait until the device and this process's threads do nothing: the loader's queue is full then."""
    _synchronize(device)
    deadline, quiet = time.monotonic() + patience, 0
    while quiet < 2 and time.monotonic() < deadline:
        before = time.process_time()
        time.sleep(0.02)
        quiet = quiet + 1 if time.process_time() - before < 0.002 else 0
