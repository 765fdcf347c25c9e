"""Visible patches of a batch, ready for the embedding: fastmae against patchify and gather."""

from __future__ import annotations

import op_benchmark as op
import torch

from fastmae.ops import gather_patches

# (name, N, image side, patch side): a quarter of the patches stay visible.
SIZES = [("224px-p16", 256, 224, 16), ("224px-p14", 128, 224, 14)] if op.CUDA else [("224px-p16", 32, 224, 16)]
SHAPES = [(f"{name} {source}", *sizes) for name, *sizes in SIZES for source in ("uint8 NHWC", "float32 NCHW")]


def make(shape: tuple, device: torch.device, dtype: torch.dtype) -> op.OpCase:
    name, n, side, p = shape
    images, length, values = op.images_of(name, n, side, device), (side // p) ** 2, 3 * p * p
    ids, affine = op.choose(n, length, length // 4, device), op.mean_and_std(device)

    def plain(images, ids):
        patches = op.pick(op.normalised_patches(images, p, *affine), ids)
        return patches.to(dtype) if torch.is_autocast_enabled(device.type) else patches

    ours = lambda images, ids: gather_patches(images, ids, p, *affine)  # noqa: E731
    return op.OpCase(
        "gather_patches",
        name,
        {"images": images, "ids": ids},
        {"fastmae": ours, "plain": plain, "plain-compile": plain},
        # Pixels and ids in, patches in the dtype out.
        moved=(ids.numel() * (8 + values * (images.element_size() + dtype.itemsize)), 0),
        flops=(2 * ids.numel() * values, 0),
        sector_bytes=op.wasted_sector_bytes(images, p, ids.numel()),
    )


bench_gather_patches = op.op_benchmark(make, SHAPES, directions=("",))
