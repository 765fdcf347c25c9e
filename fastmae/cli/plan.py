"""``fastmae plan``: memory, communication, step time, data and checkpoints of a run, on paper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Literal

from rich.console import Console
from rich.table import Table

from fastmae.cli.errors import UsageError
from fastmae.train.scaling.communication import Mode
from fastmae.train.scaling.data import MEASURED_IN, Data
from fastmae.train.scaling.hardware import Cluster, Hardware
from fastmae.train.scaling.plan import Plan, Run, make_plan
from fastmae.train.scaling.report import inputs, sections, to_json
from fastmae.train.scaling.sizes import Sizes, preset_sizes


@dataclass(frozen=True)
class PlanConfig:
    """Compute what a run takes before anything is bought or queued: memory of a GPU, communication, step time, data and
    checkpoints. Formulas and stated assumptions, nothing is run: docs/scaling.md."""

    model: str = "mae_vit_large_patch16"
    """Preset: mae_vit_{tiny,small,base,large}_patch16 or mae_vit_huge_patch14; its are the widths left at None."""
    gpus: int = 8
    """GPUs."""
    gpus_per_node: int = 8
    """GPUs of a node."""
    parallel: Literal["none", "ddp", "fsdp", "hsdp"] | None = None
    """How the GPUs share the work. None: all ways side by side."""
    global_batch: int = 4096
    """Masked images of an optimiser step."""
    batch_size: int | None = None
    """Masked images on a GPU at a time. None: what --train.batch-size auto takes on a GPU of this memory, the largest
    that fits by this estimate and divides a GPU's share of the global batch."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of matrix products."""
    residual: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the residual stream."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward computes again: nothing, the blocks' attention, or all but the blocks' inputs."""
    reshard_after_forward: bool = True
    """FSDP and HSDP: free gathered weights after the forward and gather them again for the backward."""
    attention: Literal["fused", "plain"] = "fused"
    """plain keeps the matrix of scores."""
    mask_ratio: float = 0.75
    """Share of patches that is hidden."""
    img_size: int | tuple[int, int] = 224
    """Image size in pixels, one number or height and width."""
    patch_size: int | tuple[int, int] | None = None
    """Patch size in pixels."""
    in_chans: int = 3
    """Channels of the images."""
    embed_dim: int | None = None
    """Encoder width."""
    depth: int | None = None
    """Encoder blocks."""
    num_heads: int | None = None
    """Encoder attention heads."""
    decoder_embed_dim: int | None = None
    """Decoder width."""
    decoder_depth: int | None = None
    """Decoder blocks."""
    decoder_num_heads: int | None = None
    """Decoder attention heads."""
    epochs: tuple[float, ...] = (800, 1600)
    """Lengths of a run, in passes over the data."""
    data: Data = field(default_factory=Data)
    """The images."""
    hardware: Hardware = field(default_factory=Hardware)
    """The machines."""
    json: bool = False
    """Print JSON in place of tables: bytes, seconds, operations."""


def plan(config: PlanConfig) -> int:
    """Run the command; return its exit code."""
    console = Console(highlight=False, markup=False, emoji=False)
    with _flags():
        plans = [make_plan(_run(config, mode)) for mode in _modes(config)]
    if config.json:
        print(json.dumps([to_json(one) for one in plans], indent=1))
        return 0
    show(plans, console)
    return 0


def show(plans: list[Plan], console: Console) -> None:
    """Plans side by side."""
    first, run = plans[0], plans[0].run
    nodes = f"{run.cluster.nodes} node{'s' if run.cluster.nodes > 1 else ''}"
    console.print(
        f"{first.parameters / 1e6:,.1f} million parameters and {first.tables / 1e6:.2f} of fixed positions; "
        f"{first.flops.model / 1e9:,.1f} GFLOP an image, forward and backward"
        + (f", and {first.flops.recomputed / 1e9:,.1f} computed again" if first.flops.recomputed else "")
        + f". {run.cluster.gpus} {run.hardware.name} in {nodes}, global batch {run.global_batch:,}, {run.precision}.\n"
    )
    table = Table("", *(one.run.parallel for one in plans), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for title, rows in sections(plans):
        table.add_row(title, style="bold")
        for label, values in rows:
            table.add_row(f"  {label}", *values)
        table.add_row()
    console.print(table)
    console.print("Nothing of this was measured on GPUs. It rests on these flags:", style="bold")
    found = inputs(first)
    titles = {"assumed": "assumed", "measured": f"measured ({MEASURED_IN})", "data sheet": "of data sheets"}
    for kind, title in (titles | {"data": "of the data"}).items():
        values = [f"{name.replace('_', '-')} {value}" for name, value, its_kind in found if its_kind == kind]
        if values:
            console.print(f"{title}: {', '.join(values)}")


def _run(config: PlanConfig, mode: Mode) -> Run:
    sizes = {f.name: getattr(config, f.name) for f in fields(Sizes) if f.name != "mlp_ratio"}
    return Run(
        preset_sizes(config.model, **sizes),
        Cluster(config.gpus, config.gpus_per_node),
        mode,
        config.global_batch,
        config.batch_size,
        config.mask_ratio,
        config.precision,
        {"float32": 4, "bfloat16": 2}[config.residual],
        config.attention,
        config.activation_checkpointing,
        config.reshard_after_forward,
        config.epochs,
        config.data,
        config.hardware,
    )


def _modes(config: PlanConfig) -> list[Mode]:
    if config.parallel is not None:
        return [config.parallel]
    if config.gpus == 1:
        return ["none"]
    cluster = Cluster(config.gpus, config.gpus_per_node)
    return ["ddp", "fsdp", "hsdp"] if cluster.nodes > 1 and cluster.gpus_in_node > 1 else ["ddp", "fsdp"]


@contextmanager
def _flags() -> Iterator[None]:
    """Messages name arguments; here these are flags."""
    try:
        yield
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        raise UsageError(f"--{name.replace('_', '-')}{colon}{rest}") from error
