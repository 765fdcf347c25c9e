"""The loss on masked patches, forward and backward: fastmae against forward_loss written out, eager and compiled.

``fastmae-masked`` has predictions for the masked patches alone, as in training; the others for all, as in
facebookresearch/mae. ``plain-gathered`` spares PyTorch the visible patches. ``copy`` moves as many bytes as
``fastmae-masked`` must: predictions and pixels twice, gradients once.
"""

from __future__ import annotations

import pytest
import torch

from fastmae.ops.masked_patch_mse import masked_patch_mse

CUDA = torch.cuda.is_available()
# (name, N, image side, patch side): three quarters of the patches are masked.
SHAPES = [("224px-p16", 256, 224, 16), ("224px-p14", 256, 224, 14)] if CUDA else [("64px-p8", 32, 64, 8)]
MASK_RATIO = 0.75
COMPETITORS = [
    "fastmae-masked", "fastmae-full", "plain", "plain-compile", "plain-gathered", "plain-gathered-compile", "copy"
]  # fmt: skip


def normalised_patches(images, p, mean, std):
    n, c, h, w = images.shape
    images = (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    return torch.einsum("nchpwq->nhwpqc", images.reshape(n, c, h // p, p, w // p, p)).reshape(n, -1, p * p * c)


def squared_error(pred, target):
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    return (pred.float() - target).square().mean(-1)


def plain(pred, images, mask, p, mean, std):
    return (squared_error(pred, normalised_patches(images, p, mean, std)) * mask).sum() / mask.sum()


def plain_gathered(pred, images, ids, p, mean, std):
    target = normalised_patches(images, p, mean, std)
    return squared_error(pred, torch.gather(target, 1, ids[..., None].expand(-1, -1, target.shape[-1]))).mean()


@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def bench_masked_patch_mse(benchmark, device, synchronized, shape, competitor):
    name, n, side, p = shape
    num_patches, pixels = (side // p) ** 2, p * p * 3
    images = torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    masked = num_patches - int(num_patches * (1 - MASK_RATIO))
    ids = torch.rand(n, num_patches, device=device).argsort(1)[:, :masked].sort(1).values
    mask = torch.zeros(n, num_patches, device=device).scatter_(1, ids, 1.0)
    mean, std = torch.full((3,), 0.45, device=device), torch.full((3,), 0.225, device=device)
    is_full = competitor in ("fastmae-full", "plain", "plain-compile")
    rows = num_patches if is_full else masked
    pred = torch.randn(n, rows, pixels, device=device, dtype=torch.bfloat16, requires_grad=True)
    useful = n * masked * pixels * (2 * (2 + 1) + 2)
    block = torch.empty(useful // 2, dtype=torch.uint8, device=device)

    function = plain if is_full else plain_gathered
    function = torch.compile(function, fullgraph=True) if competitor.endswith("compile") else function
    chosen = mask if is_full else ids

    def fast():
        return torch.autograd.grad(masked_patch_mse(pred, images, ids, p, mean=mean, std=std), pred)

    def rival():
        return torch.autograd.grad(function(pred, images, chosen, p, mean, std), pred)

    run = block.clone if competitor == "copy" else fast if competitor.startswith("fastmae") else rival
    run()
    benchmark.group = f"masked_patch_mse {name} forward+backward"
    benchmark.extra_info.update(competitor=competitor, useful_bytes=useful)
    benchmark(synchronized(run))
