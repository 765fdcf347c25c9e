"""A plan of a run: memory, communication, time, data and checkpoints, from sizes and a description of the machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fastmae.train.scaling.batch import TooLargeError, fit_batch
from fastmae.train.scaling.communication import Collective, Mode, check_mode, collectives
from fastmae.train.scaling.data import Data, DataNeeds, data_needs
from fastmae.train.scaling.hardware import Cluster, Hardware
from fastmae.train.scaling.kept import kept_per_image
from fastmae.train.scaling.memory import Memory
from fastmae.train.scaling.sizes import Sizes, expect, parameters
from fastmae.train.scaling.step import StepTime, step_time
from fastmae.train.scaling.work import WIDE, Attention, Checkpointing, Flops, flops_per_image

Precision = Literal["bf16", "fp16", "fp32"]
COMPUTE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
DAY = 86400.0
REPLICATED_WRITERS = 8
"""Ranks, at most, that share the writing of a checkpoint that all hold whole."""


@dataclass(frozen=True)
class Run:
    """What is to be run, and how."""

    sizes: Sizes
    cluster: Cluster = field(default_factory=Cluster)
    parallel: Mode = "ddp"
    global_batch: int = 4096
    batch_size: int | None = None
    """Images at a time on one GPU. None: as many as fit."""
    mask_ratio: float = 0.75
    precision: Precision = "bf16"
    residual_bytes: int = 4
    attention: Attention = "fused"
    activation_checkpointing: Checkpointing = "none"
    reshard_after_forward: bool = True
    epochs: Sequence[float] = (800, 1600)
    data: Data = field(default_factory=Data)
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self):
        self.data.check()
        self.hardware.check()
        expect(self.precision in COMPUTE_BYTES, "precision", "bf16, fp16 or fp32", self.precision)
        expect(self.residual_bytes in (2, 4), "residual_bytes", "2 or 4", self.residual_bytes)
        expect(self.attention in ("fused", "plain"), "attention", "fused or plain", self.attention)
        expect(self.batch_size is None or self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        check_mode(self.parallel, self.cluster)
        share = self.cluster.gpus * self.data.masks_per_image
        divides = self.global_batch >= 1 and self.global_batch % share == 0
        each = f" with {self.data.masks_per_image} masks an image" if self.data.masks_per_image > 1 else ""
        expected = f"a multiple of {share} for {self.cluster.gpus} GPUs{each}"
        expect(divides, "global_batch", expected, self.global_batch)
        expect(all(e > 0 for e in self.epochs), "epochs", "positive numbers", self.epochs)


class CheckpointCost(NamedTuple):
    """Weights and the optimiser's state."""

    bytes: int
    bytes_per_gpu: int
    """The most that one GPU writes."""
    writing_nodes: int
    copy_seconds: float
    """From the GPU to its host: training waits for it."""
    write_seconds: float
    """To storage: in the background."""


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes, seconds and operations, nothing scaled."""

    run: Run
    parameters: int
    """Trained."""
    tables: int
    """Fixed position tables."""
    largest_batch: int
    batch_size: int
    accumulation: int
    memory: Memory
    flops: Flops
    collectives: tuple[Collective, ...]
    step: StepTime
    checkpoint: CheckpointCost
    data: DataNeeds
    days: dict[str, float]
    """By epochs."""

    @property
    def images_per_s(self) -> float:
        """Masked images, all GPUs together."""
        return self.run.global_batch / self.step.seconds

    @property
    def mfu(self) -> float:
        """Share of the peak that the mathematics' operations take."""
        rate = self.flops.model * self.images_per_s / self.run.cluster.gpus
        return rate / self.run.hardware.peak_rate(COMPUTE_BYTES[self.run.precision])


def make_plan(run: Run) -> Plan:
    """All that can be said of a run on paper.

    Raises:
        ValueError: naming the argument: sizes or a division of the batch that cannot be, or a model that does not fit.
    """
    sizes, cluster, hardware = run.sizes, run.cluster, run.hardware
    compute = COMPUTE_BYTES[run.precision]
    options: dict[str, Any] = {"compute_bytes": compute, "reshard_after_forward": run.reshard_after_forward}
    kept = kept_per_image(
        sizes, run.mask_ratio, compute_bytes=compute, residual_bytes=run.residual_bytes,
        attention=run.attention, activation_checkpointing=run.activation_checkpointing,
    )  # fmt: skip
    try:
        fit = fit_batch(
            sizes, run.parallel, cluster, hardware, kept, run.global_batch,
            most=run.batch_size, masks_per_image=run.data.masks_per_image, **options,
        )  # fmt: skip
    except TooLargeError as error:
        advice = "shard (parallel=fsdp) or keep less (activation_checkpointing=full)"
        raise ValueError(f"hardware.hbm_gb: {error}; {advice}") from error
    batch, accumulation, share = fit.batch_size, fit.accumulation, run.global_batch // cluster.gpus
    if run.batch_size is not None:
        most = f"at most {fit.largest}, which is what fits"
        expect(run.batch_size <= fit.largest, "batch_size", most, run.batch_size)
        expect(batch == run.batch_size, "batch_size", f"a divisor of the {share} images of a GPU", run.batch_size)
    sent = tuple(collectives(sizes, run.parallel, cluster, accumulation=accumulation, **options))
    step = step_time(
        sizes, run.parallel, cluster, hardware, sent, batch=batch, accumulation=accumulation,
        mask_ratio=run.mask_ratio, residual_bytes=run.residual_bytes,
        activation_checkpointing=run.activation_checkpointing, **options,
    )  # fmt: skip
    images_per_s = run.global_batch / step.seconds
    found = parameters(sizes)
    return Plan(
        run=run,
        parameters=sum(p.count for p in found if p.trainable),
        tables=sum(p.count for p in found if not p.trainable),
        largest_batch=fit.largest,
        batch_size=batch,
        accumulation=accumulation,
        memory=fit.memory,
        flops=flops_per_image(sizes, run.mask_ratio, run.activation_checkpointing),
        collectives=sent,
        step=step,
        checkpoint=_checkpoint(run),
        data=data_needs(run.data, images_per_s, cluster.nodes),
        days={f"{epochs:g}": epochs * run.data.images / images_per_s / DAY for epochs in run.epochs},
    )


def _checkpoint(run: Run) -> CheckpointCost:
    found, cluster = parameters(run.sizes), run.cluster
    trained = [p for p in found if p.trainable]
    size = WIDE * (sum(p.count for p in found) + 2 * sum(p.count for p in trained) + len(trained))
    ranks = {
        "none": 1,
        "ddp": min(REPLICATED_WRITERS, cluster.gpus),
        "fsdp": cluster.gpus,
        "hsdp": cluster.gpus_in_node,
    }
    writers = ranks[run.parallel]
    # Ranks that hold everything write far apart; those of one replica are on one node.
    nodes = {"none": 1, "ddp": min(writers, cluster.nodes), "fsdp": cluster.nodes, "hsdp": 1}[run.parallel]
    most, hardware = -(-size // writers), run.hardware
    return CheckpointCost(
        size, most, nodes, most / (hardware.pcie_gb_per_s * 1e9), size / (nodes * hardware.storage_write_gb_per_s * 1e9)
    )
