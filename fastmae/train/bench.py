"""How fast the loader is alone, the model alone, and both together: the trainer's own step on the loader's own batches.

The three are measured in turn, round by round, so that a busy moment hits all alike. Before each turn the loader's
queue is full and nobody works; batches that were ready already are not counted. On a GPU the host waits at the ends of
a turn and nowhere in between. Each round also times a large matrix product in the run's precision, the peak that MFU is
a fraction of, at the same moment and with the same threads; and where products are faster in the other of fp32 and
bf16, the model in that one. Advice is given only where its fact was measured.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fastmae import data
from fastmae.data import Batch, Dataset
from fastmae.data.header import Format
from fastmae.train.config import PretrainConfig, to_json
from fastmae.train.flops import count_flops
from fastmae.train.metrics import matmul_flops
from fastmae.train.parallel import DTYPES
from fastmae.train.profile import StageTimes, no_stage
from fastmae.train.trainer import Trainer

PHASES = ("loader", "model", "both")
_ROUNDS, _MIN_ROUNDS = 5, 2
_READY_BEYOND_PREFETCH = 4
"""Batches that a loader may have ready beside its queue: DALI's own, one in the making, one on its way to the GPU."""
_MAX_STEPS = 4096
_PROBE, _SLOW = 384, 2e10
"""Size of a short matrix product, and FLOP/s below which a CPU is not asked for large ones."""
_EVEN, _KEPT = 1.1, 0.9
"""Rates within this factor are called equal; below this fraction of the slower one's rate, loader and model get in each
other's way."""
_IDLE_CORES = 0.75
"""With less than this fraction of the cores at work, the loader waits for something else than processors."""
_SAMPLED = 4096


def config_to_measure(config: PretrainConfig) -> PretrainConfig:
    """The configuration with one optimiser step for each batch, without an end, and all images of the last size."""
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
        fit_steps=False,
    )
    return replace(config, train=train, data=replace(config.data, progressive_sizes=()))


@dataclass
class Turn:
    """One phase in one round: batches, seconds, of them waited for the loader, and processors at work."""

    batches: int
    seconds: float
    waited: float
    busy_cores: float


@dataclass
class Measured:
    """What was measured, round by round.

    Attributes:
        decoded, masked: images in a batch, as the loader and as the model counts them.
        turns: of each phase; "other" is the model alone in ``other_precision``.
        loader_cpu_seconds: processor time of the loader per decoded image.
        matmul_flops: FLOP/s of a large matrix product in the run's precision.
        other_precision: the one of fp32 and bf16 that the run does not use, where products are faster in it.
        stages: seconds per step of each stage, loader and model together.
    """

    decoded: int
    masked: int
    turns: dict[str, list[Turn]] = field(default_factory=lambda: {phase: [] for phase in (*PHASES, "other")})
    loader_cpu_seconds: list[float] = field(default_factory=list)
    matmul_flops: list[float] = field(default_factory=list)
    other_precision: str | None = None
    stages: dict[str, float] = field(default_factory=dict)

    def rates(self, phase: str) -> list[float]:
        """Images per second: decoded ones for the loader, masked ones otherwise."""
        images = self.decoded if phase == "loader" else self.masked
        return [images * turn.batches / turn.seconds for turn in self.turns[phase]]

    def rate(self, phase: str) -> float:
        return statistics.median(self.rates(phase))

    def busy_cores(self, phase: str) -> float:
        return statistics.median(turn.busy_cores for turn in self.turns[phase])

    def together(self) -> float:
        """Rate of both together over that of the slower one alone, the median within rounds."""
        masks = self.masked / self.decoded
        rounds = zip(*map(self.rates, PHASES), strict=True)
        return statistics.median(both / min(loader * masks, model) for loader, model, both in rounds)

    def other_speedup(self) -> float:
        """Rate of the model alone in the other precision over its rate in the run's, the median within rounds."""
        return statistics.median(a / b for a, b in zip(self.rates("other"), self.rates("model"), strict=True))

    def data_wait(self) -> float:
        """Fraction of the time, loader and model together, that the trainer waits for a batch."""
        return statistics.median(turn.waited / turn.seconds for turn in self.turns["both"])


class _Feed:
    """Stands between trainer and loader: hands out one resident batch again and again, or the loader's, timed."""

    def __init__(self, loader: Any) -> None:
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


def measure(trainer: Trainer, seconds: float) -> Measured:
    """Measure for about so many seconds, with at least two rounds however long these take.

    Args:
        trainer: made of :func:`config_to_measure`; its weights are trained on.
        seconds: for all rounds together.
    """
    with trainer._open_loader() as loader:
        feed = trainer.loader = _Feed(loader)
        trainer.model.train()
        return _Bench(trainer, feed).run(seconds)


class _Bench:
    def __init__(self, trainer: Trainer, feed: _Feed) -> None:
        self.trainer, self.feed, self.device = trainer, feed, trainer.device
        train = trainer.config.train
        self.found = Measured(train.global_batch_size // train.masks_per_image, train.global_batch_size)
        self.ready = feed.loader.options.prefetch + _READY_BEYOND_PREFETCH

    def run(self, seconds: float) -> Measured:
        found, own = self.found, self.trainer.dtype
        self.batch = next(self.feed)
        one = {phase: self._warm_up(phase) for phase in PHASES}
        if (other := self._faster_precision()) is not None:
            found.other_precision = next(name for name, dtype in DTYPES.items() if dtype == other)
            with self._computing_in(other):
                one["other"] = self._warm_up("other")
        # Where a CPU has no instructions for a dtype, a large product takes seconds, and a small one is as fast.
        slow = self.device.type == "cpu" and matmul_flops(self.device, own, 1, _PROBE) < _SLOW
        rounds = int(max(_MIN_ROUNDS, min(_ROUNDS, seconds / max(sum(one.values()), 1e-6))))
        share = seconds / (rounds * len(one))
        for number in range(rounds):
            for phase in PHASES[number % 3 :] + PHASES[: number % 3]:
                self._take_turn(phase, share, one[phase])
                if phase == "model":
                    size = _PROBE if slow else None
                    found.matmul_flops.append(matmul_flops(self.device, own, rounds=3, size=size))
                    if other is not None:
                        with self._computing_in(other):
                            self._take_turn("other", share, one["other"])
        return found

    def _warm_up(self, phase: str) -> float:
        """Run a phase until it is warm; return about how long one batch takes."""
        self._train(phase, 2 if phase in ("model", "other") else 1)
        self._synchronize()
        begun = time.perf_counter()
        # A few of the loader's batches were ready; enough others make up for that.
        count = 3 * self.feed.loader.options.prefetch if phase == "loader" else 1
        self._train(phase, count)
        self._synchronize()
        return max((time.perf_counter() - begun) / count, 1e-5)

    def _take_turn(self, phase: str, share: float, one: float) -> None:
        found, feed = self.found, self.feed
        # Slow steps leave the loader all the time it needs to be ahead; what is ready would only cost time.
        resident = phase in ("model", "other")
        ahead = 0 if resident else max(1, min(self.ready, int(0.4 * share / one)))
        batches = max(1, min(_MAX_STEPS // 2, math.ceil(0.8 * share / one) - ahead))
        settle(self.device)
        cpu_begun = time.process_time()
        self._train(phase, ahead)
        self._synchronize()
        if phase == "both":
            self.trainer.stage = stages = StageTimes(self.device)
        begun, waited, cpu = time.perf_counter(), feed.waited, time.process_time()
        self._train(phase, batches)
        self._synchronize()
        elapsed = time.perf_counter() - begun
        busy = (time.process_time() - cpu) / elapsed
        found.turns[phase].append(Turn(batches, elapsed, feed.waited - waited, busy))
        self.trainer.stage = no_stage
        if phase == "both":
            found.stages = {name: total / batches for name, total in stages.read().items()}
        if phase == "loader":
            settle(self.device)
            # From a full queue to a full queue as many images are made as are taken.
            cost = (time.process_time() - cpu_begun) / ((ahead + batches) * found.decoded)
            found.loader_cpu_seconds.append(cost)

    def _train(self, phase: str, count: int) -> None:
        self.feed.resident = self.batch if phase in ("model", "other") else None
        for _ in range(count):
            if phase == "loader":
                next(self.feed)
            else:
                self.trainer.train_step()
        self.trainer.reporter.values.take()

    def _faster_precision(self) -> torch.dtype | None:
        """The other of fp32 and bf16 if products are faster in it; not for compiled runs, which compile anew."""
        other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}.get(self.trainer.dtype)
        if other is None or self.trainer.config.train.compile != "none":
            return None
        own, others = (matmul_flops(self.device, dtype, 3, _PROBE) for dtype in (self.trainer.dtype, other))
        return other if others > own else None

    @contextmanager
    def _computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        own, self.trainer.dtype = self.trainer.dtype, dtype
        try:
            yield
        finally:
            self.trainer.dtype = own

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def settle(device: torch.device, patience: float = 2.0) -> None:
    """Wait until the device and this process's threads do nothing: the loader's queue is full then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    deadline, quiet = time.monotonic() + patience, 0
    while quiet < 2 and time.monotonic() < deadline:
        before = time.process_time()
        time.sleep(0.02)
        quiet = quiet + 1 if time.process_time() - before < 0.002 else 0


def result(trainer: Trainer, found: Measured) -> dict[str, Any]:
    """Everything that was found, with what limits the run and what would help, ready for JSON."""
    train, dataset, options = trainer.config.train, trainer.dataset, trainer.loader.options
    flops = count_flops(trainer.model.architecture, found.masked, trainer.config.model.mask_ratio) / found.masked
    product = statistics.median(found.matmul_flops)
    # Steps faster than the product raise the peak: a CPU that emulates bf16 has no fast products.
    peak = max(product, flops * found.rate("model"), flops * found.rate("both"))
    rates = {phase: {"images_per_second": found.rate(phase), "rounds": found.rates(phase)} for phase in PHASES}
    step = found.masked / found.rate("both")
    limit, sentence, advice = diagnose(found, trainer.device.type == "cuda", options.cores)
    if limit != "model":
        advice += _data_advice(trainer.config, dataset, options, found, trainer.loader.kind, trainer.device.type)
    return {
        "device": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "precision": train.precision,
        "loader": {**rates["loader"], "kind": trainer.loader.kind, "threads": options.num_threads,
                   "cpu_seconds_per_image": statistics.median(found.loader_cpu_seconds),
                   "busy_cores": found.busy_cores("loader")},
        "model": {**rates["model"], "flops_per_image": flops, "flops_per_second": found.rate("model") * flops,
                  "matmul_flops_per_second": product, "peak_flops_per_second": peak,
                  "mfu": found.rate("model") * flops / peak},
        "both": {**rates["both"], "data_wait_share": found.data_wait(), "mfu": found.rate("both") * flops / peak},
        "step": {"ms": 1e3 * step, "stages_ms": {name: 1e3 * s for name, s in found.stages.items()}},
        "masks_per_image": train.masks_per_image,
        "cores": options.cores,
        "bottleneck": limit,
        "sentence": sentence,
        "advice": advice,
        "config": to_json(trainer.config),
    }  # fmt: skip


def diagnose(found: Measured, on_gpu: bool, cores: int) -> tuple[str, str, list[str]]:
    """What limits the run ("loader", "model", "balanced", or "shared" where they hold each other up), in a sentence,
    and what was measured to help."""
    capacity = found.rate("loader") * found.masked / found.decoded
    model, both = found.rate("model"), found.rate("both")
    advice = []
    if found.other_precision and found.other_speedup() > _EVEN:
        advice.append(
            f"--train.precision {found.other_precision}: measured in this run, the model alone trains "
            f"{found.other_speedup():.1f} times as many images/s."
        )
    if capacity * _EVEN < model:
        text = f"it makes {capacity:,.0f} images/s, the model could train {model:,.0f}"
        return "loader", f"The loader is the bottleneck: {text}.", []
    if found.together() < _KEPT:
        where = "the host's processors" if on_gpu else f"{cores} core{'s' * (cores > 1)}"
        sentence = (
            f"Loader and model share {where} and hold each other up: together they make {both:,.0f} images/s, "
            f"{found.together():.0%} of what the slower one makes alone."
        )
        return "shared", sentence, advice
    if capacity < _EVEN * model:
        return "balanced", f"Loader and model are equally fast: {capacity:,.0f} and {model:,.0f} images/s.", advice
    return "model", f"The model is the bottleneck: the loader is {capacity / model:.1f} times faster.", advice


def _data_advice(
    config: PretrainConfig, dataset: Dataset, options: Any, found: Measured, kind: str, device_type: str
) -> list[str]:
    """What would make the loader faster, each with the measured or counted fact behind it."""
    advice, busy = [], found.busy_cores("loader")
    jpeg_like = dataset.formats <= {Format.JPEG, Format.PNG, Format.WEBP} and dataset.channels == 3
    if busy < _IDLE_CORES * options.cores and not dataset.embedded:
        threads = options.cores if options.num_threads < options.cores else 2 * options.cores
        advice.append(
            f"--data.num-threads {threads}: the loader alone keeps {busy:.1f} of {options.cores} cores busy with "
            f"{options.num_threads} threads."
        )
    if device_type == "cuda" and kind != "dali" and jpeg_like and not dataset.embedded:
        install = "" if data.has_dali() else "pip install 'fastmae[dali-cuda13]', "
        advice.append(f"{install}--data.loader dali: images are decoded on the CPU now, DALI decodes them on the GPU.")
    short_side = round(max(config.img_size) * 8 / 7)  # 256 for 224, as ImageNet is usually stored
    pixels, shrunk = _mean_pixels(dataset, short_side)
    if pixels > 1.5 * shrunk and not dataset.embedded:
        advice.append(
            f"fastmae data shard {config.data.path} OUT --short-side {short_side}: images have {pixels / 1e6:.2f} "
            f"megapixels on average and would have {shrunk / 1e6:.2f}, {pixels / shrunk:.1f} times fewer to decode."
        )
    return advice


def _mean_pixels(dataset: Dataset, short_side: int) -> tuple[float, float]:
    """Of an evenly spread sample: mean pixels as they are, and at a short side."""
    rows = dataset.rows(np.unique(np.linspace(0, len(dataset) - 1, _SAMPLED).astype(np.int64)))
    rows = rows[rows["bad"] == 0]
    if not len(rows):
        return 1.0, 1.0
    pixels = rows["height"].astype(float) * rows["width"]
    scale = np.minimum(1.0, short_side / np.minimum(rows["height"], rows["width"]))
    return float(pixels.mean()), float((pixels * scale**2).mean())
