"""A small training run in any mode of parallelism, step by step as the trainer does it, and all that is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from loading import smooth
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastmae import data, ops
from fastmae.model import create_model
from fastmae.train import parallel
from fastmae.train.batch_size import divide_batch
from fastmae.train.guard import LossScale, step_unless_non_finite
from fastmae.train.optim import parameter_groups

SEED, GLOBAL_BATCH, STEPS, IMG_SIZE = 5, 8, 20, (32, 48)

create = partial(
    create_model, "mae_vit_tiny_patch16", img_size=IMG_SIZE, patch_size=8, embed_dim=36, depth=3, num_heads=3,
    decoder_embed_dim=20, decoder_depth=3, decoder_num_heads=1, norm_pix_loss=True, seed=SEED,
)  # fmt: skip
"""Widths that two and four do not divide evenly into, so that shards are of several sizes, empty ones among them."""


@dataclass(frozen=True)
class Case:
    """One way to train; the defaults are a single process."""

    mode: str = "none"
    shard_size: int | None = None
    max_batch: int | None = None
    precision: str = "fp32"
    activation_checkpointing: str = "none"
    compile: str = "none"
    reshard_after_forward: bool = True
    clip_grad: float | None = None
    poison: int | None = None
    """Rank whose loss is NaN in step 3."""
    steps: int = STEPS
    device_type: str = "cpu"


@dataclass
class Run:
    """What a rank saw: a list entry a step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    sample_ids: list[list[list[int]]] = field(default_factory=list)
    """A list a forward pass."""
    masks: list[list[list[list[float]]]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Whole; rank 0 only."""
    counts: set[float] = field(default_factory=set)
    """Steps that the optimiser has taken, of all parameters."""


def write_images(folder: Path, count: int = 21) -> Path:
    folder.mkdir()
    for index in range(count):
        Image.fromarray(smooth(50 + index, 90 - index, index)).save(folder / f"{index}.png")
    return folder


def run_cases(rank: int, images: Path, cases: list[Case]) -> list[Run]:
    return [run_case(images, case) for case in cases]


def run_case(images: Path, case: Case) -> Run:
    place = parallel.initialize(case.mode, case.device_type, shard_size=case.shard_size)
    model = parallel.construct(create, place)
    forward = parallel.parallelize(
        model,
        place,
        seed=SEED,
        precision=case.precision,
        activation_checkpointing=case.activation_checkpointing,
        compile=case.compile,
        reshard_after_forward=case.reshard_after_forward,
    )
    dataset = data.open_dataset(images, cache_dir=images.parent / "cache")
    batch_size, accumulation = divide_batch(GLOBAL_BATCH, place.world_size, case.max_batch)
    run, options = Run(), {"rank": place.rank, "world_size": place.world_size, "num_threads": 1, "device": place.device}
    with data.create_loader(
        dataset, loader="torch", batch_size=batch_size, img_size=IMG_SIZE, seed=SEED, **options
    ) as loader:
        train(case, place, model, forward, loader, accumulation, run)
    weights = {name: whole(tensor).cpu().clone() for name, tensor in model.state_dict().items()}
    run.weights = weights if place.is_main else {}
    return run


def train(case: Case, place: parallel.Parallelism, model: nn.Module, forward: nn.Module, loader, accumulation, run):
    """As ``Trainer.train_step`` does it, ``case.steps`` times."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=0.0, betas=(0.9, 0.95), fused=True)
    scale = LossScale(place.device) if case.precision == "fp16" else None
    dtype = parallel.DTYPES[case.precision]
    for step in range(case.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(step / 3, 1.0)
        losses, ids, masks = [], [], []
        for index in range(accumulation):
            batch = next(loader)
            masking = ops.random_masking(
                len(batch.images), model.num_patches, 0.75, seed=SEED, epoch=batch.epochs, sample_ids=batch.sample_ids
            )
            with parallel.no_sync(forward, last=index == accumulation - 1):
                with torch.autocast(case.device_type, dtype, enabled=dtype != torch.float32):
                    out = forward(batch.images, masking=masking, full_pred=False)
                loss = out.loss / accumulation
                if case.poison == place.rank and step == 3:
                    loss = loss * float("nan")
                (loss if scale is None else loss * scale.value).backward()
            losses.append(loss.detach())
            ids.append(batch.sample_ids.tolist())
            masks.append(out.mask.tolist())
        norm, skipped = step_unless_non_finite(optimizer, case.clip_grad, scale)
        optimizer.zero_grad(set_to_none=True)
        run.losses.append(float(sum(losses)))
        run.norms.append(float(norm))
        run.skipped.append(float(skipped))
        run.sample_ids.append(ids)
        run.masks.append(masks)
    run.counts = {float(values["step"]) for values in optimizer.state.values()}


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together on every rank."""
    if not isinstance(tensor, DTensor):
        return tensor
    (dim,) = (d for d, placement in enumerate(tensor.placements) if placement.is_shard())
    group = tensor.device_mesh.get_group(dim)
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, tensor.to_local().detach().cpu(), group=group)
    return torch.cat(parts)


def by_position(runs: list[Run], name: str) -> np.ndarray:
    """What each rank saw in each forward pass (steps, passes, batch, ...), in the order of the global batch."""
    values = np.array([getattr(run, name) for run in runs])  # rank, step, pass, batch, ...
    values = values.swapaxes(0, 1).swapaxes(1, 2)  # step, pass, rank, batch, ...
    return values.reshape(len(values), -1, *values.shape[4:])
