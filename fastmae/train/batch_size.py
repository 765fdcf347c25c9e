"""How a global batch divides among processes and micro-batches."""

from __future__ import annotations

from fastmae.data.sampler import micro_batches
from fastmae.train.ranks import Ranks


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
    accumulation = 1 if max_batch is None else num_passes(images, world_size, max_batch // multiple_of)
    if images < world_size * accumulation:  # only for single images at a time
        raise ValueError(
            f"max_batch: expected at least {2 * multiple_of}{each}, since {global_batch} do not divide evenly among "
            f"{world_size} processes, got {max_batch}"
        )
    return -(-images // (world_size * accumulation)) * multiple_of, accumulation


def num_passes(images: int, world_size: int, most: int) -> int:
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
