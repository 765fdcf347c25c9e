"""A few steps of the trainer in any mode of parallelism, and all that is known of them."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastmae import data
from fastmae.model import create_model
from fastmae.train import parallel
from fastmae.train.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from fastmae.train.ranks import Ranks
from fastmae.train.run_folder import RunFolder
from fastmae.train.task import MaskedAutoencoding
from fastmae.train.trainer import Trainer

SEED, GLOBAL_BATCH, STEPS, IMG_SIZE = 5, 8, 20, (32, 48)

# Widths that two and four do not divide evenly into, so that shards are of several sizes, empty ones among them.
MODEL = ModelConfig(
    "mae_vit_tiny_patch16", IMG_SIZE, patch_size=8, embed_dim=36, depth=2, num_heads=3, decoder_embed_dim=20,
    decoder_depth=2, decoder_num_heads=1, norm_pix_loss=True,
)  # fmt: skip
CONFIG = PretrainConfig(model=MODEL, train=TrainConfig(seed=SEED))
create = partial(create_model, **CONFIG.model_arguments())


@dataclass(frozen=True)
class Case:
    """One way to train; the defaults are a single process. ``train`` are fields of ``TrainConfig``."""

    parallel: str = "none"
    steps: int = STEPS
    poison: int | None = None
    """Rank whose loss is NaN in step 3."""
    train: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        poison = () if self.poison is None else (("poison", self.poison),)
        return "-".join([self.parallel, *(f"{name}={value}" for name, value in (*self.train, *poison))])


def case(parallel: str = "none", *, steps: int = STEPS, poison: int | None = None, **train: Any) -> Case:
    """A case from keywords."""
    return Case(parallel, steps, poison, tuple(sorted(train.items())))


@dataclass
class Run:
    """What a rank saw: a list entry per step."""

    losses: list[float] = field(default_factory=list)
    """Of this rank; over the ranks their mean is the global batch's."""
    norms: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    sample_ids: list[list[list[int]]] = field(default_factory=list)
    """A list per forward pass."""
    masks: list[list[list[list[float]]]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Whole; rank 0 only."""
    counts: set[float] = field(default_factory=set)
    """Steps that the optimiser has taken, of all parameters."""


class Recorded(MaskedAutoencoding):
    """Notes samples and masks, and spoils a loss if the case says so."""

    poisoned = False

    def __init__(self, run: Run, *args: Any) -> None:
        super().__init__(*args)
        self.run = run

    def prepare(self, batch: data.Batch) -> tuple[Any, ...]:
        inputs = super().prepare(batch)
        self.run.sample_ids[-1].append(batch.sample_ids.tolist())
        self.run.masks[-1].append(inputs[1].mask.tolist())
        return inputs

    def loss(self, *args: Any) -> Tensor:
        return super().loss(*args) * (float("nan") if self.poisoned else 1.0)


def run_case(images: Path, case: Case, device: str = "cpu") -> Run:
    """Train for ``case.steps`` steps of the schedule of a run of ``STEPS``."""
    options = {"global_batch_size": GLOBAL_BATCH, "precision": "fp32", "base_lr": 0.064, "warmup_steps": 3}
    options |= {"parallel": case.parallel, "steps": STEPS, "device": device, **dict(case.train)}
    config = replace(CONFIG, data=DataConfig(images, "torch", num_threads=1), train=replace(CONFIG.train, **options))
    place = parallel.initialize(case.parallel, device, shard_size=config.train.shard_size)
    model, run = parallel.construct(create, place), Run()
    dataset = data.open_dataset(images, cache_dir=images.parent / "cache")
    task = Recorded(run, config, model, dataset, data.create_loader)
    folder = RunFolder(images.parent / "run", resume=True, leader=False)
    with Ranks.create() as ranks:
        quiet = Console(file=io.StringIO())
        trainer = Trainer(config, task, folder, console=quiet, parallelism=place, ranks=ranks)
        trainer.reporter.add = lambda *values: [
            seen.append(float(value)) for seen, value in zip((run.losses, run.norms, run.skipped), values, strict=True)
        ]
        with trainer.loader_at(0) as trainer.loader:
            for step in range(case.steps):
                run.sample_ids.append([])
                run.masks.append([])
                task.poisoned = case.poison == place.rank and step == 3
                trainer.train_step()
    run.counts = {float(values["step"]) for values in trainer.optimizer.state.values()}
    weights = {name: whole(tensor).cpu().clone() for name, tensor in model.state_dict().items()}
    run.weights = weights if place.is_main else {}
    return run


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def by_position(runs: list[Run], name: str) -> list[np.ndarray]:
    """What all ranks saw in each step, in the order of the global batch: by forward pass, then by rank."""
    steps = zip(*(getattr(run, name) for run in runs), strict=True)
    return [np.concatenate([seen for passes in zip(*ranks, strict=True) for seen in passes]) for ranks in steps]
