"""How a global batch divides among processes and micro-batches; ``--train.batch-size auto`` is a measured trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastmae.data.sampler import micro_batches
from fastmae.ops import random_masking
from fastmae.train.config import PretrainConfig
from fastmae.train.parallel import DTYPES
from fastmae.train.ranks import Ranks

USED_FRACTION = 0.9
"""Of the memory that the trial finds free: the rest is for the loader's batches, fragmentation and communication."""


def divide_batch(
    global_batch: int, world_size: int, max_batch: int | None = None, multiple_of: int = 1
) -> tuple[int, int]:
    """The batch of one process in one forward pass, and the passes whose gradients accumulate into a step.

    The global batch stays what it is on any number of processes, and with it the learning rate, the schedule and the
    samples of a step; batch and accumulation follow. Where it does not divide evenly, some batches are one image
    smaller (:func:`fastmae.data.sampler.micro_batches`), and the trainer weights their losses.

    Args:
        global_batch: masked images of an optimiser step.
        world_size: processes.
        max_batch: the most that fits on one device; None for no accumulation.
        multiple_of: masks per image; a batch holds whole images.

    Returns:
        ``(batch, accumulation)``: the largest batch of any process, and its number of passes.

    Raises:
        ValueError: if there is not an image for each process and pass, or ``max_batch`` holds no whole image.
    """
    for name, value in (("global_batch", global_batch), ("world_size", world_size), ("multiple_of", multiple_of)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    each = f" with {multiple_of} masks per image" if multiple_of > 1 else ""
    if global_batch % multiple_of:
        raise ValueError(f"global_batch: expected a multiple of {multiple_of}{each}, got {global_batch}")
    if max_batch is not None and max_batch < multiple_of:
        raise ValueError(f"max_batch: expected at least {multiple_of}{each}, got {max_batch}")
    images = global_batch // multiple_of
    if images < world_size:
        least = world_size * multiple_of
        raise ValueError(
            f"global_batch: expected at least {least} for {world_size} processes{each}, got {global_batch}"
        )
    accumulation = 1 if max_batch is None else _num_passes(images, world_size, max_batch // multiple_of)
    if images < world_size * accumulation:  # only for single images at a time
        raise ValueError(
            f"max_batch: expected at least {2 * multiple_of}{each}, since {global_batch} do not divide evenly among "
            f"{world_size} processes, got {max_batch}"
        )
    return -(-images // (world_size * accumulation)) * multiple_of, accumulation


def _num_passes(images: int, world_size: int, most: int) -> int:
    """The fewest passes of at most so many images, or of equal ones if there are not twice as many: a second size is a
    second graph to compile and capture."""
    fewest = -(-images // (world_size * most))
    equal = (n for n in range(fewest, 2 * fewest) if images % (world_size * n) == 0)
    return next(equal, fewest)


def describe_uneven_shares(global_batch: int, world_size: int, masks_per_image: int = 1) -> str | None:
    """A warning that names the shares of the processes if they differ."""
    share, longer = divmod(global_batch // masks_per_image, world_size)
    if not longer:
        return None
    more, fewer = (share + 1) * masks_per_image, share * masks_per_image
    return (
        f"--train.global-batch-size: {global_batch:,} images do not divide evenly among {world_size:,} processes. In a "
        f"step {longer:,} of them take {more:,} and {world_size - longer:,} take {fewer:,}; the result is the same, "
        "and the latter wait for the former"
    )


def loss_weights(global_batch: int, batch: int, ranks: Ranks, masks_per_image: int = 1) -> list[float]:
    """The factor of each micro-batch's mean loss on this rank: its share of the global batch, times the ranks.

    So losses and gradients that are summed over micro-batches and averaged over ranks are means over the global batch.
    """
    images, largest = global_batch // masks_per_image, batch // masks_per_image
    parts = micro_batches(images, largest, rank=ranks.rank, world_size=ranks.size)
    return [len(part) * ranks.size / images for part in parts]


def keeps_batch_size(config: PretrainConfig, manifest: Mapping[str, Any], world_size: int) -> bool:
    """Whether a resumed run divides its global batch as the saved one did, and so keeps the micro-batch that was found.

    Sums over other batches round differently, so a new trial would end an exact continuation.
    """
    then, here = manifest["config"]["train"], config.train
    before = then["global_batch_size"], then.get("masks_per_image", 1), manifest.get("world_size", 1)
    return before == (here.global_batch_size, here.masks_per_image, world_size) and then.get("batch_size") != "auto"


def find_batch_size(share: int, masks_per_image: int, peak: Callable[[int], float], budget: float) -> int:
    """The largest micro-batch whose measured peak fits.

    Two small batches give the memory per image; the largest part of the share that should fit by that is measured too,
    and smaller ones after it until one does fit. So a device is not driven out of memory on purpose, which a rank of
    several would do alone.

    Args:
        share: masked images of a process in a step, the largest; the result is what a whole number of passes takes.
        masks_per_image: the result is a multiple.
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
    passes = {_num_passes(images, 1, most) for most in range(1, images + 1)}
    sizes = [-(-images // n) * masks_per_image for n in sorted(passes)]
    expected = (b for b in sizes if first + (b - small) * per_image <= budget)
    return next((b for b in expected if b == small or peak(b) <= budget), small)


def measured_batch_size(
    config: PretrainConfig,
    model: nn.Module,
    forward: Callable[..., Any],
    ranks: Ranks,
) -> tuple[int, str]:
    """``--train.batch-size auto``, before the first step; every rank calls it.

    On a GPU forward and backward run on blank images, eagerly; no weight changes. On the CPU the whole share is one
    batch: there accumulation saves nothing that matters.

    Args:
        config: precision and mask ratio.
        model: the bare model, which ``forward`` calls.
        forward: what a step calls.
        ranks: who share the global batch.

    Returns:
        The batch, and how it was found, in words.
    """

    def agree(value: float) -> float:
        return max(ranks.gather("sizing the batch", lambda: value))

    share, _ = divide_batch(config.train.global_batch_size, ranks.size, None, config.train.masks_per_image)
    parameters = [p for p in model.parameters() if p.requires_grad]
    device, masks = parameters[0].device, config.train.masks_per_image
    if device.type != "cuda":
        return share, f"Batch size auto: {share:,} images, all of a process's share"
    dtype = DTYPES[config.train.precision]
    low_precision = dtype != torch.float32

    def peak(batch: int) -> float:
        shape = batch // masks, config.model.in_chans, *config.img_size
        dtype_loaded = torch.uint8 if config.data.value_range is None else torch.float32
        loaded = torch.zeros(shape, dtype=dtype_loaded, device=device)
        images = model.normalized(loaded)
        masking = random_masking(
            len(images), model.num_patches, config.model.mask_ratio, seed=0, masks_per_image=masks, device=device
        )
        torch.cuda.reset_peak_memory_stats(device)
        try:
            with model.cast_weights(dtype), torch.autocast("cuda", dtype, enabled=low_precision):
                loss = forward(images, masking=masking, full_pred=False).loss
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
