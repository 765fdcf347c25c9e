"""Visible patches of a batch, ready for the embedding: fastmae against patchify and gather, eager and compiled.

``copy`` moves as many bytes as the op must (the chosen pixels in, bf16 patches out) and is what memory allows.
"""

from __future__ import annotations

import pytest
import torch

from fastmae.ops.gather_patches import gather_patches

CUDA = torch.cuda.is_available()
# (name, N, image side, patch side): a quarter of the patches stay visible.
SHAPES = [("224px-p16", 256, 224, 16), ("224px-p14", 256, 224, 14)] if CUDA else [("64px-p8", 32, 64, 8)]
MASK_RATIO = 0.75
COMPETITORS = ["fastmae", "plain", "plain-compile", "copy"]


def plain(images, ids, p, mean, std):
    """The float image, all patches of it, then the chosen ones, as facebookresearch/mae goes about it."""
    if images.dtype == torch.uint8:
        images = (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    n, c, h, w = images.shape
    x = torch.einsum("nchpwq->nhwpqc", images.reshape(n, c, h // p, p, w // p, p)).reshape(n, -1, p * p * c)
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1])).bfloat16()


@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("source", ["uint8-nhwc", "float32-nchw"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def bench_gather_patches(benchmark, device, synchronized, shape, source, competitor):
    name, n, side, p = shape
    num_patches = (side // p) ** 2
    images = torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    if source == "float32-nchw":
        images = torch.randn(n, 3, side, side, device=device)
    kept = int(num_patches * (1 - MASK_RATIO))
    ids = torch.rand(n, num_patches, device=device).argsort(1)[:, :kept].sort(1).values
    mean, std = torch.full((3,), 0.45, device=device), torch.full((3,), 0.225, device=device)
    values = n * kept * p * p * 3
    useful = values * (images.element_size() + 2)
    block = torch.empty(useful // 2, dtype=torch.uint8, device=device)
    compiled = torch.compile(plain, fullgraph=True)
    run = {
        "fastmae": lambda: gather_patches(images, ids, p, mean, std, torch.bfloat16),
        "plain": lambda: plain(images, ids, p, mean, std),
        "plain-compile": lambda: compiled(images, ids, p, mean, std),
        "copy": block.clone,
    }[competitor]
    run()
    benchmark.group = f"gather_patches {name} {source}"
    benchmark.extra_info.update(competitor=competitor, useful_bytes=useful)
    benchmark(synchronized(run))
