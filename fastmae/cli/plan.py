"""``fastmae plan``: what a run would take on n GPUs, in a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table

from fastmae.errors import usage_errors
from fastmae.train.config import ModelConfig, ParallelMode, PretrainConfig, RecipeName, TrainConfig
from fastmae.train.plan import Hardware, Plan, make_plan


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

    train = config.train
    with usage_errors({"gpus": "--gpus", "mode": "--train.parallel", "global_batch": "--train.global-batch-size"}):
        with torch.device("meta"):
            model = create_model(**config.model_arguments())
        modes: list[ParallelMode] = [train.parallel]
        if train.parallel == "auto":
            several = given.gpus > given.gpus_per_node > 1
            modes = ["none"] if given.gpus == 1 else ["ddp", "fsdp", *(["hsdp"] if several else [])]
        plans = [
            make_plan(
                model,
                gpus=given.gpus,
                gpus_per_node=given.gpus_per_node,
                mode=mode,
                global_batch=train.global_batch_size,
                batch_size=None if train.batch_size == "auto" else train.batch_size,
                mask_ratio=config.model.mask_ratio,
                precision=train.precision,
                activation_checkpointing=train.activation_checkpointing,
                reshard_after_forward=train.reshard_after_forward,
                masks_per_image=train.masks_per_image,
                num_images=given.images,
                epochs=(train.epochs or 800,),
                hardware=given.hardware,
            )
            for mode in modes
        ]
    if given.json:
        print(json.dumps([asdict(one) for one in plans], indent=1))
    else:
        _show(plans, config.model.name)
    return 0


def _show(plans: list[Plan], name: str) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    first = plans[0]
    console.print(
        f"{name}: {first.parameters / 1e6:,.1f} M weights, {first.flops_per_image / 1e9:,.1f} GFLOP per image forward "
        f"and backward; {first.gpus} GPUs on {first.nodes} node{'s' * (first.nodes > 1)}, global batch "
        f"{first.global_batch:,}. An estimate: nothing was run."
    )
    table = Table("", *(one.mode for one in plans), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def rows(title: str, names: list[str], value: Callable[[Plan, str], str]) -> None:
        table.add_row(title, style="bold")
        for row in names:
            table.add_row(f"  {row}", *(value(one, row) for one in plans))

    memory = list(first.memory)
    rows("GB per GPU", memory, lambda p, row: f"{p.memory[row] / 1e9:.2f}")
    table.add_row("  total", *(f"{sum(p.memory.values()) / 1e9:.2f}" for p in plans))
    batch = {
        "images at a time": lambda p: f"{p.batch_size:,}",
        "micro-batches per step": lambda p: f"{p.accumulation:,}",
        "images at a time that fit": lambda p: f"{p.largest_batch:,}",
    }
    rows("Batch per GPU", list(batch), lambda p, row: batch[row](p))
    collectives = list(dict.fromkeys(row for p in plans for row in p.sent))
    if collectives:
        rows(
            "GB sent per GPU and step", collectives, lambda p, row: f"{p.sent[row] / 1e9:.2f}" if row in p.sent else "-"
        )
    rows("Milliseconds per step, at least", list(first.seconds), lambda p, row: f"{p.seconds[row] * 1e3:.1f}")
    table.add_row("  total", *(f"{sum(p.seconds.values()) * 1e3:.1f}" for p in plans))
    run = {
        "images per second": lambda p: f"{p.images_per_second:,.0f}",
        "MFU": lambda p: f"{p.mfu:.2f}",
        "CPU cores per node to decode": lambda p: f"{p.cores_per_node:,.0f}",
        "GB/s read from storage": lambda p: f"{p.storage_bytes_per_second / 1e9:.2f}",
        "GB of a checkpoint": lambda p: f"{p.checkpoint_bytes / 1e9:.2f}",
    } | {f"days for {epochs} epochs": lambda p, e=epochs: f"{p.days[e]:.2f}" for epochs in first.days}
    rows("Run", list(run), lambda p, row: run[row](p))
    console.print(table)
