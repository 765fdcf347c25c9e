"""From a run's configuration to its batches and their masks: pure functions of the position in the order of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastmae import ops
from fastmae.data import Augment, Batch, LateBad
from fastmae.train.config import PretrainConfig
from fastmae.train.ranks import Ranks

_AUGMENT = ("crop", "scale", "ratio", "hflip", "vflip", "color_jitter")


def open_loader(
    create: Callable[..., Any],
    config: PretrainConfig,
    dataset: Any,
    *,
    batch_size: int,
    img_size: Any,
    position: int,
    ranks: Ranks,
    device: torch.device,
    known_bad: Sequence[LateBad],
) -> Any:
    """A loader of this rank's share of the batches from a position on.

    Args:
        create: ``fastmae.data.create_loader`` or something of its signature.
        batch_size: masked images of this rank in one forward pass.
        img_size: (height, width), or a function of the epoch that gives them.
        position: images, of all ranks, that were decoded before.
        known_bad: files found bad while training.
    """
    data, train = config.data, config.train
    return create(
        dataset,
        loader=data.loader,
        batch_size=batch_size // train.masks_per_image,
        img_size=img_size,
        seed=train.seed,
        position=position,
        rank=ranks.rank,
        world_size=ranks.size,
        device=device,
        augment=Augment(**{name: getattr(data, name) for name in _AUGMENT}),
        num_threads=data.num_threads,
        prefetch=data.prefetch,
        timeout=data.timeout,
        known_bad=known_bad,
        limit_bad=False,  # the trainer judges the finds of all ranks
        samples_per_step=train.global_batch_size // train.masks_per_image,
    )


def draw_masks(batch: Batch, model: nn.Module, config: PretrainConfig) -> ops.Masking:
    """The masks of a batch, those of an image adjacent: a pure function of the seed and of what the batch says."""
    return ops.random_masking(
        len(batch.images),
        model.num_patches,
        config.model.mask_ratio,
        seed=config.train.seed,
        epoch=batch.epochs,
        sample_ids=batch.sample_ids,
        strategy=config.model.mask_strategy,
        grid_size=model.grid_size,
        masks_per_image=config.train.masks_per_image,
    )
