"""How long a step takes at least: products, passes over memory, and what communication adds to them.

Three floors are added up: matrix products at a stated share of the peak, passes over activations and over weights at a
stated share of the memory's bandwidth, and communication that nothing hides. Launches, stragglers, and what collectives
take of the GPU while they overlap are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastmae.train.scaling.communication import BUCKET_BYTES, Collective, Mode, latency, units
from fastmae.train.scaling.hardware import Cluster, Hardware
from fastmae.train.scaling.moved import moved_per_image
from fastmae.train.scaling.sizes import Sizes, parameters
from fastmae.train.scaling.work import WIDE, Checkpointing, flops_per_batch, flops_per_image


class StepTime(NamedTuple):
    """Seconds of an optimiser step."""

    products: float
    """Matrix products."""
    passes: float
    """Over activations."""
    weights: float
    """Passes over weights, gradients and optimiser state, and copies to and from what is communicated."""
    communication: float
    """All collectives, as if nothing else ran."""
    exposed: float
    """What is left of them if they run while the device computes."""

    @property
    def compute(self) -> float:
        return self.products + self.passes + self.weights

    @property
    def seconds(self) -> float:
        """With overlap."""
        return self.compute + self.exposed

    @property
    def seconds_without_overlap(self) -> float:
        return self.compute + self.communication

    @property
    def share_exposed(self) -> float:
        """Of the step, with overlap."""
        return self.exposed / self.seconds

    @property
    def share_without_overlap(self) -> float:
        return self.communication / self.seconds_without_overlap


def step_time(
    sizes: Sizes,
    mode: Mode,
    cluster: Cluster,
    hardware: Hardware,
    sent: Sequence[Collective],
    *,
    batch: int,
    accumulation: int = 1,
    mask_ratio: float = 0.75,
    compute_bytes: int = 2,
    residual_bytes: int = 4,
    activation_checkpointing: Checkpointing = "none",
    reshard_after_forward: bool = True,
) -> StepTime:
    """Of ``accumulation`` batches of ``batch`` images on each GPU."""
    flops = flops_per_image(sizes, mask_ratio, activation_checkpointing)
    moved = moved_per_image(
        sizes,
        mask_ratio,
        compute_bytes=compute_bytes,
        residual_bytes=residual_bytes,
        activation_checkpointing=activation_checkpointing,
    )
    trained = sum(p.count for p in parameters(sizes) if p.trainable)
    # Weights read by both passes, gradients written; with few images this is more than the operations take.
    weights_moved = (2 * compute_bytes + WIDE) * trained
    products = max(
        (batch * flops.executed + flops_per_batch(sizes)) / hardware.matmul_rate(compute_bytes),
        (batch * moved.products + weights_moved) / hardware.hbm_rate,
    )
    passes = batch * moved.passes / hardware.hbm_rate
    weights = _weight_bytes(sizes, mode, cluster, accumulation, compute_bytes, reshard_after_forward)
    backward = (products + passes) * (flops.backward + flops.recomputed) / flops.executed
    forward = products + passes - backward
    exposed = _exposed(sizes, mode, cluster, hardware, sent, accumulation, forward, backward, reshard_after_forward)
    return StepTime(
        accumulation * products,
        accumulation * passes,
        weights / hardware.hbm_rate,
        sum(c.seconds(hardware, cluster) for c in sent),
        exposed,
    )


def _weight_bytes(
    sizes: Sizes, mode: Mode, cluster: Cluster, accumulation: int, compute_bytes: int, reshard: bool
) -> float:
    """Through device memory in a step, on one GPU."""
    found = parameters(sizes)
    trained, low = sum(p.count for p in found if p.trainable), compute_bytes < WIDE
    added = 2 * WIDE * trained * (accumulation - 1)  # to the gradients that are there
    # AdamW reads weights, gradients and moments and writes all but gradients; the norm reads gradients.
    update, norm = 7 * WIDE, WIDE
    if mode in ("none", "ddp"):
        copies = (WIDE + compute_bytes) * sum(p.count for p in found if p.has_copy) if low else 0
        buckets = 2 * WIDE * trained if mode == "ddp" else 0
        return (update + norm) * trained + accumulation * copies + added + buckets
    ranks = cluster.gpus_in_node if mode == "hsdp" else cluster.gpus
    root, *blocks = (unit.shard for unit in units(sizes, ranks))
    shard, gathered = root + sum(blocks), root + (2 if reshard else 1) * sum(blocks)
    # Cast into the buffer to send, cut up what arrives; gradients into the buffer to scatter.
    gather = (WIDE + compute_bytes) * gathered + 2 * compute_bytes * ranks * gathered
    scatter = (compute_bytes + WIDE) * ranks * shard
    return (update + norm) * shard + accumulation * gather + added + scatter


def _exposed(
    sizes: Sizes,
    mode: Mode,
    cluster: Cluster,
    hardware: Hardware,
    sent: Sequence[Collective],
    accumulation: int,
    forward: float,
    backward: float,
    reshard: bool,
) -> float:
    """Seconds of communication that nothing hides: what computation is too short for, the first weights to be
    gathered, and the last gradients to be reduced."""
    if not sent:
        return 0.0
    times = {c.name: c.seconds(hardware, cluster) for c in sent}
    if mode == "ddp":
        (gradients,) = sent
        fixed = gradients.calls * latency("all", hardware, cluster)
        tail = min(1.0, BUCKET_BYTES / gradients.bytes) * (times["all-reduce"] - fixed) + fixed / gradients.calls
        return max(tail, times["all-reduce"] - backward)
    ranks = cluster.gpus_in_node if mode == "hsdp" else cluster.gpus
    root, *blocks = (unit.shard for unit in units(sizes, ranks))
    once, gathered = root + sum(blocks), root + (2 if reshard else 1) * sum(blocks)
    gather = times["all-gather"] / accumulation
    first = gather * (root + blocks[0]) / gathered
    in_forward = gather * once / gathered - first
    in_backward = gather * (gathered - once) / gathered
    waiting = accumulation * (first + max(0.0, in_forward - forward))
    waiting += (accumulation - 1) * max(0.0, in_backward - backward)
    # Weights and gradients share the links; sums across nodes take others, at the same time.
    inside = in_backward + times["reduce-scatter"]
    longest = max(inside, times.get("all-reduce", 0.0))
    tail = (times["reduce-scatter"] + times.get("all-reduce", 0.0)) * (root + blocks[0]) / once
    return waiting + max(tail, longest - backward)
