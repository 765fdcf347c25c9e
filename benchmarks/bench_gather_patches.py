"""Visible patches of a batch, ready for the embedding: fastmae against patchify and gather."""

from __future__ import annotations

import torch
from op_benchmark import (
    CUDA,
    OpCase,
    choose,
    images_of,
    mean_and_std,
    normalised_patches,
    op_benchmark,
    pick,
    wasted_sector_bytes,
)

from fastmae.ops import gather_patches

# (name, N, image side, patch side): a quarter of the patches stay visible.
SHAPES = [("224px-p16", 32, 224, 16)]
if CUDA:
    SHAPES = [("224px-p16", 256, 224, 16), ("224px-p14", 128, 224, 14)]
SHAPES = [(f"{name} {source}", *sizes) for name, *sizes in SHAPES for source in ("uint8 NHWC", "float32 NCHW")]


def make(shape: tuple, device: torch.device, dtype: torch.dtype) -> OpCase:
    name, n, side, p = shape
    images = torch.randn(n, 3, side, side, device=device) if "float32" in name else images_of(n, side, device)
    length, values = (side // p) ** 2, 3 * p * p
    ids, (mean, std) = choose(n, length, length // 4, device), mean_and_std(device)

    def plain(images, ids):
        patches = pick(normalised_patches(images, p, mean, std), ids)
        return patches.to(dtype) if torch.is_autocast_enabled(device.type) else patches

    return OpCase(
        "gather_patches",
        name,
        {"images": images, "ids": ids},
        {
            "fastmae": lambda images, ids: gather_patches(images, ids, p, mean, std),
            "plain": plain,
            "plain-compile": plain,
        },
        # Pixels and ids in, patches in the dtype out.
        forward_bytes=ids.numel() * (8 + values * (images.element_size() + dtype.itemsize)),
        forward_flops=2 * ids.numel() * values,
        sector_bytes=wasted_sector_bytes(images, p, ids.numel()),
    )


bench_gather_patches = op_benchmark(make, SHAPES, directions=("",))
