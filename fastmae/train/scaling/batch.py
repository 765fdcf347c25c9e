"""The batch of a GPU by the memory that it has: the rule of ``fastmae plan`` and of ``--train.batch-size auto``."""

from __future__ import annotations

from typing import NamedTuple

from fastmae.train.batching.batch_division import divide_batch
from fastmae.train.scaling.communication import Mode
from fastmae.train.scaling.hardware import Cluster, Hardware
from fastmae.train.scaling.kept import Kept
from fastmae.train.scaling.memory import Memory, largest_batch, memory, states
from fastmae.train.scaling.sizes import Sizes


class TooLargeError(ValueError):
    """Not even one image fits beside weights, gradients and optimiser state."""

    def __init__(self, needed: float, usable: float, masks_per_image: int):
        self.needed, self.usable = needed, usable
        images = "one image" if masks_per_image == 1 else f"one image with its {masks_per_image} masks"
        super().__init__(
            f"expected room for weights, gradients, optimiser and {images} ({needed / 1e9:.1f} GB), "
            f"got {max(usable, 0) / 1e9:.1f} GB that tensors can use"
        )


class BatchFit(NamedTuple):
    """How a GPU's share of the global batch is worked off."""

    batch_size: int
    accumulation: int
    largest: int
    """That fits, whether or not it divides the share."""
    memory: Memory


def fit_batch(
    sizes: Sizes,
    mode: Mode,
    cluster: Cluster,
    hardware: Hardware,
    kept: Kept,
    global_batch: int,
    *,
    most: int | None = None,
    masks_per_image: int = 1,
    decoded_bytes: int = 0,
    compute_bytes: int = 2,
    reshard_after_forward: bool = True,
) -> BatchFit:
    """The largest batch of a GPU that fits, divides the GPU's share of the global batch and holds whole images.

    Args:
        sizes, mode, cluster: as of :func:`~.memory.states`.
        hardware: its memory is what may be filled.
        kept: by an image more in the batch.
        global_batch: masked images of a step, a multiple of the GPUs times the masks an image.
        most: no larger batch, though it may fit; None for no limit.
        masks_per_image: that a batch is a multiple of.
        decoded_bytes: device memory of a decoded image before it is resized.
        compute_bytes, reshard_after_forward: as of :func:`~.memory.states`.

    Raises:
        TooLargeError: not even one image fits.
        ValueError: naming ``global_batch`` or ``max_batch``: the batch does not divide.
    """

    def held(accumulation: int):
        options = {"compute_bytes": compute_bytes, "reshard_after_forward": reshard_after_forward}
        return states(sizes, mode, cluster, accumulation=accumulation, **options)

    def fits(accumulation: int) -> int:
        return largest_batch(sizes, held(accumulation), kept, hardware, masks_per_image, decoded_bytes)

    share = global_batch // cluster.gpus
    passes, largest = 1, fits(1)
    # Accumulation may take memory of its own.
    if largest < share or (most is not None and most < share):
        passes, largest = 2, fits(2)
    if largest < masks_per_image:
        needed = memory(sizes, held(passes), kept, masks_per_image, hardware, masks_per_image, decoded_bytes)
        raise TooLargeError(needed.total - needed.reserved, hardware.usable_bytes, masks_per_image)
    limit = largest if most is None else min(largest, most)
    batch, accumulation = divide_batch(global_batch, cluster.gpus, limit, multiple_of=masks_per_image)
    needed = memory(sizes, held(accumulation), kept, batch, hardware, masks_per_image, decoded_bytes)
    return BatchFit(batch, accumulation, largest, needed)
