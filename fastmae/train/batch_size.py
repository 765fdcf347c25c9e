"""How a global batch divides among processes and micro-batches; ``--train.batch-size auto`` is a measured trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastmae.ops import random_masking
from fastmae.train.config import PretrainConfig
from fastmae.train.parallel import DTYPES

USED_FRACTION = 0.9
"""Of the memory that the trial finds free: the rest is for the loader's batches, fragmentation and communication."""


def divide_batch(
    global_batch: int, world_size: int, max_batch: int | None = None, *, multiple_of: int = 1
) -> tuple[int, int]:
    """The batch of one process in one forward pass, and the passes whose gradients accumulate into a step.

    The global batch stays what it is on any number of processes, and with it the learning rate, the schedule and the
    samples of a step; batch and accumulation follow.

    Args:
        global_batch: masked images of an optimiser step.
        world_size: processes.
        max_batch: the most that fits on one device; None for no accumulation.
        multiple_of: masks per image; a batch holds whole images.

    Returns:
        ``(batch, accumulation)`` with ``batch * accumulation * world_size == global_batch``, batch as large as it may.

    Raises:
        ValueError: if the global batch does not divide among the processes, or no batch of at most ``max_batch`` is a
            multiple of ``multiple_of``.
    """
    for name, value in (("global_batch", global_batch), ("world_size", world_size), ("multiple_of", multiple_of)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    unit = world_size * multiple_of
    if global_batch % unit:
        below, above = global_batch // unit * unit, (global_batch // unit + 1) * unit
        near = f"{below} or {above}" if below else str(above)
        each = f" with {multiple_of} masks per image" if multiple_of > 1 else ""
        raise ValueError(
            f"global_batch: expected a multiple of {unit} for {world_size} processes{each}, such as {near}, "
            f"got {global_batch}"
        )
    if max_batch is not None and max_batch < multiple_of:
        raise ValueError(f"max_batch: expected at least {multiple_of}, got {max_batch}")
    share = global_batch // world_size
    most = share if max_batch is None else min(max_batch, share)
    batch = next(b for b in range(most, 0, -1) if share % b == 0 and b % multiple_of == 0)
    return batch, share // batch


def keeps_batch_size(config: PretrainConfig, manifest: Mapping[str, Any], world_size: int) -> bool:
    """Whether a resumed run divides its global batch as the saved one did, and so keeps the micro-batch that was found.

    Sums over other batches round differently, so a new trial would end an exact continuation.
    """
    then, here = manifest["config"]["train"], config.train
    before = then["global_batch_size"], then.get("masks_per_image", 1), manifest.get("world_size", 1)
    return before == (here.global_batch_size, here.masks_per_image, world_size) and then.get("batch_size") != "auto"


def find_batch_size(share: int, masks_per_image: int, peak: Callable[[int], float], budget: float) -> int:
    """The largest micro-batch whose measured peak fits.

    Two small batches give the memory per image; the largest divisor of the share that should fit by that is measured
    too, and smaller ones after it until one does fit. So a device is not driven out of memory on purpose, which a rank
    of several would do alone.

    Args:
        share: masked images of this process in a step; the result divides it.
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
    sizes = [b for b in range(share, 0, -1) if share % b == 0 and b % masks_per_image == 0]
    expected = (b for b in sizes if first + (b - small) * per_image <= budget)
    return next((b for b in expected if b == small or peak(b) <= budget), small)


def measured_batch_size(
    config: PretrainConfig,
    model: nn.Module,
    forward: Callable[..., Any],
    share: int,
    agree: Callable[[float], float],
) -> tuple[int, str]:
    """``--train.batch-size auto``, before the first step; every rank calls it.

    On a GPU forward and backward run on blank images, eagerly; no weight changes. On the CPU the whole share is one
    batch: there accumulation saves nothing that matters.

    Args:
        config: precision and mask ratio.
        model: the bare model, which ``forward`` calls.
        forward: what a step calls.
        share: masked images of this process in a step.
        agree: the largest of a number over all ranks.

    Returns:
        The batch, and how it was found, in words.
    """
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
