"""``fastmae plan``: what a run would take on n GPUs, in a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table

from fastmae.errors import usage_errors
from fastmae.train.config import ModelConfig, ParallelMode, PretrainConfig, RecipeName, TrainConfig
from fastmae.train.plan import Hardware, Plan, make_plan

_TABLE = {
    "memory": ("GB per GPU", 1e-9, 2),
    "batch": ("Batch per GPU", 1, 0),
    "sent": ("GB sent per GPU and step", 1e-9, 2),
    "seconds": ("Milliseconds per step, at least", 1e3, 1),
    "run": ("Run", 1, 2),
}
"""Title, unit and digits of each part of a plan; of memory and seconds, the total too."""


@dataclass(frozen=True)
class PlanConfig:
    """Estimate memory, communication and time of a run on n GPUs. Nothing is run; times are floors. Flags are those of
    fastmae pretrain; without --train.parallel all ways to share the work stand side by side."""

    recipe: RecipeName = "imagenet-vit-l"
    """Recipe that gives all other flags their defaults."""
    gpus: int = 8
    """GPUs in all."""
    gpus_per_node: int = 8
    """GPUs per node."""
    images: int = 1_281_167
    """Images in the data set; the default is ImageNet-1k's number."""
    json: bool = False
    """Print JSON instead of a table: bytes, seconds, FLOPs."""
    hardware: Hardware = field(default_factory=Hardware)
    """What a GPU and its links do."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def plan(config: PretrainConfig, given: PlanConfig) -> int:
    """Print the plan of a configuration; return the exit code."""
    import torch

    from fastmae.model import create_model

    modes: list[ParallelMode] = [config.train.parallel]
    if config.train.parallel == "auto":
        several = given.gpus > given.gpus_per_node > 1
        modes = ["none"] if given.gpus == 1 else ["ddp", "fsdp", *(["hsdp"] if several else [])]
    size = {"gpus": given.gpus, "gpus_per_node": given.gpus_per_node, "num_images": given.images}
    with usage_errors({"global_batch": "--train.global-batch-size", "max_batch": "--train.batch-size"}):
        with torch.device("meta"):
            model = create_model(**config.model_arguments())
        plans = [make_plan(config, model, mode, **size, hardware=given.hardware) for mode in modes]
    if given.json:
        print(json.dumps([asdict(one) for one in plans], indent=1))
    else:
        _show(plans, config)
    return 0


def _show(plans: list[Plan], config: PretrainConfig) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    first = plans[0]
    console.print(
        f"{config.model.name}: {first.parameters / 1e6:,.1f} M weights, {first.flops_per_image / 1e9:,.1f} GFLOP per "
        f"image forward and backward; {first.gpus} GPUs on {first.nodes} node{'s' * (first.nodes > 1)}, global batch "
        f"{config.train.global_batch_size:,}. An estimate: nothing was run."
    )
    table = Table("", *(one.mode for one in plans), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for part, (title, unit, digits) in _TABLE.items():
        values = [getattr(one, part) for one in plans]
        if part in ("memory", "seconds"):
            values = [value | {"total": sum(value.values())} for value in values]
        names = list(dict.fromkeys(name for value in values for name in value))
        if names:
            table.add_row(title, style="bold")
        for name in names:
            table.add_row(f"  {name}", *(_cell(value.get(name), unit, digits) for value in values))
    console.print(table)


def _cell(value: float | None, unit: float, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and unit == 1 else f"{value * unit:.{digits}f}"
