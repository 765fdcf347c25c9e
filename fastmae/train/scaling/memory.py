"""What one GPU holds, by kind, and the largest batch that fits."""

from __future__ import annotations

from typing import NamedTuple

from fastmae.train.scaling.communication import Mode, check_mode, units
from fastmae.train.scaling.hardware import Cluster, Hardware
from fastmae.train.scaling.kept import Kept
from fastmae.train.scaling.sizes import Sizes, parameters
from fastmae.train.scaling.work import WIDE

BATCHES_AHEAD = 3
"""Batches of images on the device: the one in use and two that the loader has ready."""
BATCHES_DECODED = 2
"""Batches of decoded images, not yet resized, that DALI has on the device where it decodes there."""


class States(NamedTuple):
    """Bytes on one GPU whatever the batch."""

    weights: int
    """In float32, the position tables included."""
    gradients: int
    """In float32. With FSDP and accumulation, whole ones until the last batch is reduced."""
    optimizer: int
    """Two moments in float32, and a count of steps for each parameter."""
    copies: int
    """Weights in the compute precision: of all linear layers, or those gathered at a time."""
    reduction: int
    """Gradients on their way: made, and being scattered."""

    @property
    def total(self) -> int:
        return sum(self)


def states(
    sizes: Sizes,
    mode: Mode,
    cluster: Cluster,
    *,
    compute_bytes: int = 2,
    accumulation: int = 1,
    reshard_after_forward: bool = True,
) -> States:
    """Of the GPU that holds the largest shards. Arguments as of :func:`~.communication.collectives`."""
    check_mode(mode, cluster)
    found = parameters(sizes)
    trained, frozen = [p for p in found if p.trainable], sum(p.count for p in found if not p.trainable)
    if mode in ("none", "ddp"):
        values = sum(p.count for p in trained)
        copied = sum(p.count for p in found if p.has_copy) if compute_bytes < WIDE else 0
        optimizer = 2 * WIDE * values + WIDE * len(trained)
        return States(WIDE * (values + frozen), WIDE * values, optimizer, compute_bytes * copied, 0)
    ranks = cluster.gpus_in_node if mode == "hsdp" else cluster.gpus
    root, *blocks = units(sizes, ranks)
    shard, largest = sum(unit.shard for unit in (root, *blocks)), max(unit.shard for unit in blocks)
    # The root stays gathered. Of the blocks: the one in use, the next one, and this one's buffer before it is cut up.
    gathered = root.shard + (3 * largest if reshard_after_forward else sum(b.shard for b in blocks) + largest)
    # A block's gradients in the compute precision, and two blocks' in float32 to scatter.
    reduction = (compute_bytes + 2 * WIDE) * largest * ranks
    gradients = WIDE * (shard if accumulation == 1 else sum(p.count for p in trained))
    optimizer = 2 * WIDE * shard + WIDE * len(trained)
    return States(WIDE * (shard + frozen), gradients, optimizer, compute_bytes * ranks * gathered, reduction)


class Memory(NamedTuple):
    """Bytes on one GPU."""

    states: States
    activations: int
    """Kept from the forward to the backward."""
    transient: int
    """More at the worst moment of the backward, an estimate."""
    images: int
    """uint8, on the device."""
    reserved: int
    """Context, communication buffers, workspaces: assumed."""

    @property
    def total(self) -> int:
        return self.states.total + self.activations + self.transient + self.images + self.reserved


def memory(
    sizes: Sizes,
    states: States,
    kept: Kept,
    batch: int,
    hardware: Hardware,
    masks_per_image: int = 1,
    decoded_bytes: int = 0,
) -> Memory:
    """With a batch of so many masked images on the GPU, and so many bytes of each image as it was decoded there."""
    images = -(-batch // masks_per_image) * (BATCHES_AHEAD * sizes.image_bytes + BATCHES_DECODED * decoded_bytes)
    return Memory(states, batch * kept.activations, batch * kept.transient, images, round(hardware.reserved_gb * 1e9))


def largest_batch(
    sizes: Sizes,
    states: States,
    kept: Kept,
    hardware: Hardware,
    masks_per_image: int = 1,
    decoded_bytes: int = 0,
) -> int:
    """The most masked images at a time for which memory suffices, whole images with all their masks; 0 for none."""
    image = masks_per_image * (kept.activations + kept.transient)
    image += BATCHES_AHEAD * sizes.image_bytes + BATCHES_DECODED * decoded_bytes
    return masks_per_image * max(0, int((hardware.usable_bytes - states.total) // image))
