"""Visible patches of a batch, ready for the embedding: fastmae against patchify and gather, eager and compiled."""

from __future__ import annotations

import plain
import pytest
import torch
from comparison import Comparison, compiled
from measure import image_sector_bytes

from fastmae.ops import gather_patches

# (name, N, image side, patch side): a quarter of the patches stay visible.
SHAPES = (
    [("224px-p16", 256, 224, 16), ("224px-p14", 128, 224, 14)]
    if torch.cuda.is_available()
    else [("224px-p16", 32, 224, 16)]
)


def build(shape: tuple, source: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Comparison:
    name, n, side, p = shape
    images = plain.batch_of_images(n, side, device)
    if source == "float32 NCHW":
        images = torch.randn(n, 3, side, side, device=device)
    length, values = (side // p) ** 2, 3 * p * p
    ids, (mean, std) = plain.choose(n, length, length // 4, device), plain.statistics(device)

    def written_out():
        return plain.pick(plain.normalised_patches(images, p, mean, std), ids).to(dtype)

    # Pixels and ids in, patches in the dtype out.
    others = ids.numel() * (8 + dtype.itemsize * values)
    return Comparison(
        f"gather_patches, {name} {source}",
        {
            "fastmae": lambda: gather_patches(images, ids, p, mean, std, dtype),
            "plain": written_out,
            "plain-compile": compiled(written_out),
        },
        useful_bytes=others + ids.numel() * values * images.element_size(),
        sector_bytes=others + image_sector_bytes(images, ids, p),
        flops=2 * ids.numel() * values,
        dtype=dtype,
    )


@pytest.mark.parametrize("competitor", ["fastmae", "plain", "plain-compile"])
@pytest.mark.parametrize("source", ["uint8 NHWC", "float32 NCHW"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def bench_gather_patches(compete, device, dtype, shape, source, competitor):
    compete(build, shape, source, device, dtype)
