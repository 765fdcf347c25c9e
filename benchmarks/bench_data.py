"""Loaders: ours on torch and on DALI, against the torchvision + Pillow loader of facebookresearch/mae.

The images are JPEGs of ImageNet's usual size (500 x 375, quality 92), cut from the embedded photographs. Every loader
gives uint8 crops of 224 x 224 with the same number of threads or worker processes. Divide ``images`` by the time; the
Pillow loader's first batches, which wait for its processes to start, are not timed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastmae.data import create_loader, fixed_crops, has_dali, open_dataset

BATCH, SIZE, STEPS = 64, (224, 224), 4
WORKERS = os.cpu_count() or 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("jpeg")
    (root / "all").mkdir()
    for i, crop in enumerate(fixed_crops(open_dataset(None), (375, 500), seed=0, epoch=0, count=256)):
        Image.fromarray(crop.permute(1, 2, 0).numpy()).save(root / "all" / f"{i:03}.jpg", quality=92)
    return root


def steps(batches) -> None:
    for _ in range(STEPS):
        next(batches)


@pytest.mark.parametrize(
    "kind", ["torch", pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="no DALI"))]
)
def bench_folder(benchmark, folder, tmp_path, kind):
    dataset = open_dataset(folder, cache_dir=tmp_path)
    options = {"batch_size": BATCH, "img_size": SIZE, "seed": 0, "num_threads": WORKERS, "cache_bytes": 0}
    benchmark.group, benchmark.extra_info["images"] = "folder of JPEGs", BATCH * STEPS
    with create_loader(dataset, loader=kind, **options) as loader:
        benchmark.pedantic(steps, args=(loader,), rounds=5, warmup_rounds=2)


def bench_folder_pillow(benchmark, folder):
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    images = ImageFolder(folder, transform)
    sampler = torch.utils.data.RandomSampler(images, replacement=True, num_samples=1 << 20)
    loader = torch.utils.data.DataLoader(images, BATCH, sampler=sampler, num_workers=WORKERS)
    benchmark.group, benchmark.extra_info["images"] = "folder of JPEGs", BATCH * STEPS
    batches = iter(loader)
    benchmark.pedantic(steps, args=(batches,), rounds=5, warmup_rounds=2)


@pytest.mark.parametrize("size", [64, 224])
def bench_photographs(benchmark, size):
    benchmark.group, benchmark.extra_info["images"] = "embedded photographs", BATCH * STEPS
    options = {"batch_size": BATCH, "img_size": (size, size), "seed": 0, "num_threads": WORKERS}
    with create_loader(open_dataset(None), **options) as loader:
        benchmark.pedantic(steps, args=(loader,), rounds=5, warmup_rounds=2)
