"""The loss on masked patches, forward and backward: fastmae against forward_loss written out, eager and compiled.

``fastmae`` has predictions for the masked patches alone, as in training, ``fastmae-full`` and ``plain`` for all, as in
facebookresearch/mae; ``plain-gathered`` spares PyTorch the visible patches. The bytes are those of ``fastmae``.
"""

from __future__ import annotations

import plain
import pytest
import torch
from comparison import Comparison, compiled, gradient
from measure import image_sector_bytes

from fastmae.ops import masked_patch_mse

# (name, N, image side, patch side): three quarters of the patches are masked.
SHAPES = (
    [("224px-p16", 256, 224, 16), ("224px-p14", 128, 224, 14)]
    if torch.cuda.is_available()
    else [("224px-p16", 32, 224, 16)]
)
COMPETITORS = ["fastmae", "fastmae-full", "plain", "plain-compile", "plain-gathered", "plain-gathered-compile"]


def build(shape: tuple, backward: bool, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Comparison:
    name, n, side, p = shape
    length, values = (side // p) ** 2, 3 * p * p
    masked = length - length // 4
    images, (mean, std) = plain.batch_of_images(n, side, device), plain.statistics(device)
    ids = plain.choose(n, length, masked, device)
    mask = torch.zeros(n, length, device=device).scatter_(1, ids, 1.0)
    options = {"device": device, "dtype": dtype, "requires_grad": backward}
    full, gathered = (torch.randn(n, rows, values, **options) for rows in (length, masked))

    def written_out():
        return (plain.squared_error(full, plain.normalised_patches(images, p, mean, std)) * mask).sum() / mask.sum()

    def written_out_gathered():
        target = plain.pick(plain.normalised_patches(images, p, mean, std), ids)
        return plain.squared_error(gathered, target).mean()

    calls = {
        "fastmae": (gathered, lambda: masked_patch_mse(gathered, images, ids, p, mean=mean, std=std)),
        "fastmae-full": (full, lambda: masked_patch_mse(full, images, ids, p, mean=mean, std=std)),
        "plain": (full, written_out),
        "plain-compile": (full, compiled(written_out)),
        "plain-gathered": (gathered, written_out_gathered),
        "plain-gathered-compile": (gathered, compiled(written_out_gathered)),
    }
    # Predictions, and in the backward their gradients; ids; a loss or a gradient a patch.
    others = ids.numel() * (values * dtype.itemsize * (2 if backward else 1) + 8 + 4)
    return Comparison(
        f"masked_patch_mse, {name} {'backward' if backward else 'forward'}",
        {name: gradient(call, [pred]) if backward else call for name, (pred, call) in calls.items()},
        useful_bytes=others + ids.numel() * values,
        sector_bytes=others + image_sector_bytes(images, ids, p),
        # Scale and shift, mean, variance, normalise; then difference and square, or difference and scale.
        flops=10 * ids.numel() * values,
        dtype=dtype,
    )


@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def bench_masked_patch_mse(compete, device, dtype, shape, backward, competitor):
    compete(build, shape, backward, device, dtype)
