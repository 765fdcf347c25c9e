"""Batch size, precision and number of steps: how the global batch divides, and what a run measures on its machine where
the configuration says "auto".

Checkpoints hold what was found, and a resumed run keeps it: another answer would end an exact continuation.
``config.json`` holds "auto", for other machines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from fastmae.data.sampler import micro_batches
from fastmae.train.config import PretrainConfig, TrainConfig
from fastmae.train.parallel import DTYPES
from fastmae.train.ranks import Ranks

_FLOPS, _MOST_ROWS, _LEAST_ROWS = 1 << 26, 2048, 32
"""Size of one product: a CPU that emulates bfloat16 at 1 GFLOP/s takes 0.07 s for it."""
_SECONDS, _MOST_ROUNDS = 0.3, 15
_SLOW = 0.9
"""bf16 below this share of fp32's rate is worth a warning; above it, the two may just as well be equal."""
USED_FRACTION = 0.9
"""Of the memory that the batch's trial finds free: the rest is for the loader's batches, fragmentation and
communication."""
FIRST, LAST = 10, 40
"""Steps of this process whose time is measured; before them, threads start and memory is allocated."""
_SHARE = 0.92
"""Of the time left that the steps are planned for; the rest is for pictures, checkpoints and noise."""
_MOST_WARMUP = 0.2
"""A shortened run's largest share of warm-up."""
_LENGTH = ("steps", "epochs", "warmup_steps", "warmup_epochs", "fit_steps")


def with_saved(config: PretrainConfig, manifest: Mapping[str, Any] | None, world_size: int) -> PretrainConfig:
    """The configuration with what a resumed run had measured, by the manifest of the checkpoint to resume from.

    The batch is kept where the global batch divides as it did: sums over other batches round differently.
    """
    if manifest is None:
        return config
    then, train, found = manifest["config"]["train"], config.train, {}
    if train.precision == "auto":
        found["precision"] = then["precision"]
    if train.fit_steps and not then.get("fit_steps", False):
        found |= {name: then.get(name) for name in _LENGTH} | {"fit_steps": False}
    before = then["global_batch_size"], then.get("masks_per_image", 1), manifest.get("world_size", 1)
    if train.batch_size == "auto" and before == (train.global_batch_size, train.masks_per_image, world_size):
        found["batch_size"] = then.get("batch_size")
    return replace(config, train=replace(train, **found))


# ---- dividing the global batch ---------------------------------------------------------------------------------------


def divide_batch(
    global_batch: int, world_size: int, max_batch: int | None = None, masks_per_image: int = 1
) -> tuple[int, int]:
    """The largest batch of any process in one forward pass, and the passes whose gradients accumulate into a step.

    The global batch stays what it is on any number of processes, and with it the learning rate, the schedule and the
    samples of a step; batch and accumulation follow. Where it does not divide evenly, some batches are one image
    smaller (:func:`fastmae.data.sampler.micro_batches`), and the trainer weights their losses.

    Args:
        global_batch: masked images of an optimiser step.
        max_batch: the most that fits on one device; None for no accumulation.

    Raises:
        ValueError: if there is not an image for each process and pass, or ``global_batch`` has part of an image.
    """
    images, rest = divmod(global_batch, masks_per_image)
    if rest:
        expected = f"a multiple of --train.masks-per-image {masks_per_image}"
        raise ValueError(f"--train.global-batch-size: expected {expected}, got {global_batch}")
    each = f" with {masks_per_image} masks per image" if masks_per_image > 1 else ""
    if images < world_size:
        expected = f"at least {world_size * masks_per_image} for {world_size} processes{each}"
        raise ValueError(f"--train.global-batch-size: expected {expected}, got {global_batch}")
    passes = 1 if max_batch is None else num_passes(images, world_size, max(1, max_batch // masks_per_image))
    if images < world_size * passes:  # only for single images at a time
        raise ValueError(
            f"--train.batch-size: expected at least {2 * masks_per_image}{each}, since {global_batch} do not divide "
            f"evenly among {world_size} processes, got {max_batch}"
        )
    return -(-images // (world_size * passes)) * masks_per_image, passes


def num_passes(images: int, world_size: int, most: int) -> int:
    """The fewest passes of at most so many images, or of equal ones if there are not twice as many: a second size is a
    second graph to compile and capture."""
    fewest = -(-images // (world_size * most))
    return next((n for n in range(fewest, 2 * fewest) if images % (world_size * n) == 0), fewest)


def describe_uneven_shares(global_batch: int, world_size: int, masks_per_image: int = 1) -> str | None:
    """A warning that names the shares of the processes if they differ."""
    share, longer = divmod(global_batch // masks_per_image, world_size)
    if not longer:
        return None
    return (
        f"--train.global-batch-size: {global_batch:,} images do not divide evenly among {world_size:,} processes. In a "
        f"step {longer:,} of them take {(share + 1) * masks_per_image:,} and {world_size - longer:,} take "
        f"{share * masks_per_image:,}; the result is the same, and the latter wait for the former"
    )


def loss_weights(global_batch: int, batch: int, ranks: Ranks, masks_per_image: int = 1) -> list[float]:
    """The factor of each micro-batch's mean loss on this rank: its share of the global batch, times the ranks.

    So losses and gradients that are summed over micro-batches and averaged over ranks are means over the global batch.
    """
    images, largest = global_batch // masks_per_image, batch // masks_per_image
    parts = micro_batches(images, largest, rank=ranks.rank, world_size=ranks.size)
    return [len(part) * ranks.size / images for part in parts]


# ---- precision -------------------------------------------------------------------------------------------------------


class Speeds(NamedTuple):
    """GFLOP/s of matrix products."""

    fp32: float
    bf16: float

    def __str__(self) -> str:
        return f"{self.bf16:.3g} GFLOP/s in bf16, {self.fp32:.3g} in fp32"


def measure_products(width: int) -> Speeds:
    """Time the first product of a model's MLP, (rows, width) x (width, 4 * width), in both precisions.

    The fastest of interleaved runs on the CPU with PyTorch's present number of threads, because others may be running
    too, and a median is then of their making; under a second.
    """
    rows = max(_LEAST_ROWS, min(_MOST_ROWS, _FLOPS // (8 * width * width)))
    shapes = (rows, width), (4 * width, width)
    operands = {dtype: [torch.full(s, 0.5, dtype=dtype) for s in shapes] for dtype in (torch.float32, torch.bfloat16)}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    begun = time.perf_counter()
    for _ in range(_MOST_ROUNDS):
        for dtype, (x, weight) in operands.items():
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds[dtype].append(time.perf_counter() - start)
        if time.perf_counter() - begun > _SECONDS:
            break
    return Speeds(*(8e-9 * rows * width**2 / min(times) for times in seconds.values()))


def settle_precision(
    config: PretrainConfig, width: int, device: torch.device, ranks: Ranks
) -> tuple[PretrainConfig, str, str]:
    """Put a precision in the place of "auto", for an encoder of a width; every rank calls it, the first one measures.

    bf16 on CUDA, fp16 where a GPU only emulates that. On the CPU the faster of fp32 and bf16: many have no bfloat16
    instructions, and emulate them at a hundredth to a fifth of fp32's rate. Returns the configuration, why it is this
    precision unless that is usual or the user named it, and a warning if it is slow here.
    """
    precision, text, warning = config.train.precision, "", ""
    if device.type != "cpu":
        if precision == "auto":
            native = partial(torch.cuda.is_bf16_supported, including_emulation=False)
            precision = "bf16" if ranks.first("asking the GPU for bfloat16", native) else "fp16"
            text = "" if precision == "bf16" else "Precision auto: fp16; this GPU has no bfloat16"
    elif precision in ("auto", "bf16"):
        speeds = ranks.first("measuring matrix products", lambda: measure_products(width))
        if precision == "auto":
            precision = "bf16" if speeds.bf16 > speeds.fp32 else "fp32"
            text = f"Precision auto: {precision}; matrix products of the model's width run at {speeds} here"
        elif (ratio := speeds.bf16 / speeds.fp32) < _SLOW:
            warning = (
                f"--train.precision bf16: matrix products run at {ratio:.2g} of fp32's rate on this CPU ({speeds}); "
                "fp32 is faster"
            )
    return replace(config, train=replace(config.train, precision=precision)), text, warning


# ---- batch size ------------------------------------------------------------------------------------------------------


def find_batch_size(share: int, masks_per_image: int, peak: Callable[[int], float], budget: float) -> int:
    """The largest micro-batch whose measured peak fits.

    Two small batches give the memory per image; the largest part of the share that should fit by that is measured too,
    and smaller ones after it until one does fit. So a device is not driven out of memory on purpose, which a rank of
    several would do alone.

    Args:
        share: masked images of a process in a step, the largest; the result is what a whole number of passes takes.
        peak: bytes in use at the worst moment of forward and backward of so many masked images; infinite if it ran out.
        budget: bytes there are.

    Raises:
        ValueError: if not even one image fits.
    """
    small, larger = masks_per_image, min(8 * masks_per_image, share)
    first = peak(small)
    if first > budget:
        raise ValueError(
            f"--train.batch-size: auto found no room for one image: it takes {first / 1e9:.1f} GB of "
            f"{budget / 1e9:.1f} GB; try --train.activation-checkpointing selective or full, --train.parallel fsdp on "
            "several GPUs, or a smaller model"
        )
    if larger == small:
        return small
    per_image = max((peak(larger) - first) / (larger - small), 0)
    images = share // masks_per_image
    passes = {num_passes(images, 1, most) for most in range(1, images + 1)}
    sizes = [-(-images // n) * masks_per_image for n in sorted(passes)]
    expected = (b for b in sizes if first + (b - small) * per_image <= budget)
    return next((b for b in expected if b == small or peak(b) <= budget), small)


def measured_batch_size(train: TrainConfig, task: Any, forward: Callable[..., Any], ranks: Ranks) -> tuple[int, str]:
    """``--train.batch-size auto``, before the first step: the batch, and how it was found. Every rank calls it.

    On a GPU forward and backward run on blank images, eagerly; no weight changes. On the CPU the whole share is one
    batch: there accumulation saves nothing that matters. ``forward`` calls the task's model, as a step does.
    """

    def agree(value: float) -> float:
        return max(ranks.gather("sizing the batch", lambda: value))

    masks = train.masks_per_image
    share, _ = divide_batch(train.global_batch_size, ranks.size, None, masks)
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    device = parameters[0].device
    if device.type != "cuda":
        return share, f"Batch size auto: {share:,} images, all of a process's share"
    dtype = DTYPES[train.precision]
    low_precision = dtype != torch.float32

    def peak(batch: int) -> float:
        inputs = task.blank(batch, device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            with task.model.cast_weights(dtype), torch.autocast("cuda", dtype, enabled=low_precision):
                loss = task.loss(forward, *inputs)
            loss.backward()
            used = float(torch.cuda.max_memory_allocated(device))
        except torch.OutOfMemoryError:
            used = math.inf
        for parameter in parameters:
            parameter.grad = None
        torch.cuda.empty_cache()
        return agree(used)

    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    moments = 8 * sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    budget = -agree(-(USED_FRACTION * free - moments))
    with torch.compiler.set_stance("force_eager"):
        batch = find_batch_size(share, masks, peak, budget)
    return batch, f"Batch size auto: {batch:,} images, measured to fit {budget / 1e9:.1f} GB"


# ---- number of steps -------------------------------------------------------------------------------------------------


class StepFit:
    """Measures the first steps of a run and shortens it to what its time holds, until ``deadline`` (of
    ``time.monotonic()``)."""

    def __init__(self, deadline: float) -> None:
        self._deadline, self._ends = deadline, []

    def after_step(self, trainer: Any) -> None:
        """Take the time; after ``LAST`` steps, set the trainer's number of steps, the same on all ranks."""
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()  # the host runs ahead of the device
        self._ends.append(time.monotonic())
        if len(self._ends) < LAST:
            return
        ends = self._ends[FIRST - 1 :]
        seconds = median(later - earlier for earlier, later in pairwise(ends))
        fitting = trainer.step + max(1, int(_SHARE * (self._deadline - ends[-1]) / seconds))
        fitting = trainer.ranks.first("setting the number of steps", lambda: fitting)
        most = trainer.schedule.total_steps
        trainer.set_length(min(fitting, most))
        said = f"{fitting:,} steps fit" if fitting < most else f"all {most:,} steps fit"
        minutes = trainer.config.train.max_minutes
        trainer.console.print(f"{seconds * 1e3:.3g} ms per step: {said} into {minutes:g} minutes")


def with_length(config: PretrainConfig, steps: int, warmup_steps: float) -> PretrainConfig:
    """The configuration with a number of steps, and a warm-up of at most a fifth of it."""
    warmup = min(round(warmup_steps), int(_MOST_WARMUP * steps))
    length = dict(zip(_LENGTH, (steps, None, warmup, None, False), strict=True))
    return replace(config, train=replace(config.train, **length))
