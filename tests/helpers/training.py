"""A small run for the tests of training: a tiny model on a folder of random images, in the real loaders."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load_checkpoint
from PIL import Image
from rich.console import Console

from fastmae import data
from fastmae.model import create_model
from fastmae.train.checkpoint import Ranks
from fastmae.train.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from fastmae.train.parallel import Parallelism, construct
from fastmae.train.run_folder import RunFolder
from fastmae.train.task import MaskedAutoencoding
from fastmae.train.trainer import Trainer

MODEL = ModelConfig(
    name="mae_vit_tiny_patch16",
    img_size=(32, 48),
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)
TRAIN = TrainConfig(
    global_batch_size=8,
    steps=12,
    warmup_steps=3,
    base_lr=0.03,
    precision="bf16",
    device="cpu",
    log_every_steps=4,
    checkpoint_every_seconds=None,
)

FLAGS = """
--recipe photographs --train.optimizer adamw
--model.img-size 32 48 --model.patch-size 8 --model.embed-dim 32 --model.depth 2 --model.num-heads 2
--model.decoder-embed-dim 16 --model.decoder-depth 1 --model.decoder-num-heads 2
--train.global-batch-size 8 --train.steps 240 --train.log-every-steps 30 --train.checkpoint-every-steps 4
--train.num-threads 1 --train.precision fp32 --train.device cpu --data.num-threads 1 --data.loader torch
"""
"""The same for the command line."""

needs_dali = pytest.mark.skipif(not data.has_dali(), reason="needs DALI")
LOADERS = ["torch", pytest.param("dali", marks=needs_dali)]


def write_images(folder: Path, count: int = 11) -> Path:
    """JPEGs of smooth colours and sizes of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((60 + 7 * index, 90 - 3 * index), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg")
    return folder


def write_shards(folder: Path, images: Path, per_shard: int = 4) -> Path:
    """The files of a folder in tar shards, a few in each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = sorted(images.glob("[!.]*"))  # without the index
    for start in range(0, len(paths), per_shard):
        with tarfile.open(folder / f"{start:04}.tar", "w") as shard:
            for path in paths[start : start + per_shard]:
                shard.add(path, path.name)
    return folder


def make_trainer(
    out: Path,
    images: Path,
    *,
    resume: bool = False,
    model=MODEL,
    loader="torch",
    options: dict | None = None,
    dataset: data.Dataset | None = None,
    task: type[MaskedAutoencoding] = MaskedAutoencoding,
    create_loader=data.create_loader,
    place: Parallelism | None = None,
    ranks: Ranks | None = None,
    console: Console | None = None,
    callbacks=(),
    **train,
) -> Trainer:
    """A trainer in a fresh (or continued) run folder, with fields of ``TRAIN`` replaced and ``options`` of the data."""
    config = PretrainConfig(
        out=out,
        resume=resume,
        model=model,
        data=DataConfig(path=images, loader=loader, num_threads=1, **options or {}),
        train=replace(TRAIN, **train),
    )
    model = construct(lambda: create_model(**config.model_arguments()), place or Parallelism())
    model = model if place else model.to(config.train.device)
    cache = None if ranks is None else images.parent / f"cache-{ranks.rank}"
    dataset = dataset or data.open_dataset(images, max_bad_fraction=config.data.max_bad_fraction, cache_dir=cache)
    return Trainer(
        config,
        task(config, model, dataset, create_loader),
        RunFolder(out, resume=resume, leader=place is None or place.is_main),
        console=console or Console(file=io.StringIO()),
        parallelism=place,
        ranks=ranks,
        callbacks=callbacks,
    )


def fitted(out: Path, images: Path, **options) -> Trainer:
    """A trainer of :func:`make_trainer` after its whole run."""
    trainer = make_trainer(out, images, **options)
    assert trainer.fit() == "finished"
    trainer.run.close()
    return trainer


def numbers(run) -> list[tuple]:
    """What must be equal bit for bit in two logs: everything but time and memory."""
    names = ("step", "samples", "epoch", "lr", "bad_files", "failed_saves", "loss", "grad_norm", "skipped_steps")
    names += ("rollbacks",)
    return [tuple(row[name] for name in names) for row in run.read_metrics()]


def assert_same_tensors(one: Path, other: Path) -> None:
    a, b = load_checkpoint(one)[0], load_checkpoint(other)[0]
    a, b = ({k: t for k, t in tensors.items() if not k.startswith("rng.")} for tensors in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
