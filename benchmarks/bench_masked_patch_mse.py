"""The loss on masked patches: fastmae against facebookresearch/mae's ``forward_loss``.

``fastmae`` has predictions for the masked patches alone, as in training, ``fastmae-full`` and ``plain`` for all, as in
facebookresearch/mae; ``plain-gathered`` spares PyTorch the visible patches. The bytes are those of ``fastmae``.
"""

from __future__ import annotations

import op_benchmark as op
import torch
from torch import Tensor

from fastmae.ops import masked_patch_mse

# (name, N, image side, patch side): three quarters of the patches are masked.
SHAPES = [("224px-p16", 256, 224, 16), ("224px-p14", 128, 224, 14)] if op.CUDA else [("224px-p16", 32, 224, 16)]
COMPETITORS = ("fastmae", "fastmae-full", "plain", "plain-compile", "plain-gathered", "plain-gathered-compile")


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """(N, L): the mean over each patch, targets normalised by patch."""
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    return (pred.float() - target).square().mean(-1)


def make(shape: tuple, device: torch.device, dtype: torch.dtype) -> op.OpCase:
    name, n, side, p = shape
    images, length, values = op.images_of(name, n, side, device), (side // p) ** 2, 3 * p * p
    masked, (mean, std) = length - length // 4, op.mean_and_std(device)
    ids = op.choose(n, length, masked, device)
    options = {"device": device, "dtype": dtype, "requires_grad": True}
    full, gathered = (torch.randn(n, rows, values, **options) for rows in (length, masked))
    mask = torch.zeros(n, length, device=device).scatter_(1, ids, 1.0)

    def ours(full, gathered, images, ids, mask):
        return masked_patch_mse(gathered, images, ids, p, mean=mean, std=std)

    def ours_full(full, gathered, images, ids, mask):
        return masked_patch_mse(full, images, ids, p, mean=mean, std=std)

    def plain(full, gathered, images, ids, mask):
        return (squared_error(full, op.normalised_patches(images, p, mean, std)) * mask).sum() / mask.sum()

    def plain_gathered(full, gathered, images, ids, mask):
        return squared_error(gathered, op.pick(op.normalised_patches(images, p, mean, std), ids)).mean()

    functions = (ours, ours_full, plain, plain, plain_gathered, plain_gathered)
    # Pixels and ids; predictions, and in the backward their gradients; a loss or a gradient per patch.
    moved = ids.numel() * (values * (images.element_size() + dtype.itemsize) + 8 + 4)
    # Scale and shift, mean, variance, normalise; then difference and square, or difference and scale.
    flops = 10 * ids.numel() * values
    return op.OpCase(
        "masked_patch_mse",
        name,
        {"full": full, "gathered": gathered, "images": images, "ids": ids, "mask": mask},
        dict(zip(COMPETITORS, functions, strict=True)),
        moved=(moved, moved + ids.numel() * values * dtype.itemsize),
        flops=(flops, flops),
        sector_bytes=op.wasted_sector_bytes(images, p, ids.numel()),
        same={"fastmae": "plain-gathered-compile", "fastmae-full": "plain-compile"},
    )


bench_masked_patch_mse = op.op_benchmark(make, SHAPES, COMPETITORS)
