"""What the patch kernels move through memory, counted in Triton's interpreter: their byte budgets, exactly."""

from __future__ import annotations

import pytest
import torch
from patch_cases import Case, counted_traffic, make_ids, make_images, make_mean_std

from fastmae.ops import _dispatch
from fastmae.ops.gather_patches import gather_patches
from fastmae.ops.masked_patch_mse import masked_patch_mse

pytestmark = pytest.mark.ops


def test_moves_only_the_wanted_patches(monkeypatch):
    if not _dispatch.is_interpreted():
        pytest.skip("counts the accesses of Triton's interpreter")
    case = Case(2, 3, (64, 64), (16, 16), 0.25)
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case)
    with counted_traffic(monkeypatch) as traffic:
        out = gather_patches(images, ids, case.patch, *make_mean_std(3), torch.bfloat16)
    assert traffic.bytes_read(images) == out.numel()
    # A patch's row is 48 bytes at a multiple of 16: at most two sectors.
    assert traffic.sectors_read(images) <= 2 * 16 * ids.numel()
    assert traffic.bytes_written(out) == 2 * out.numel()


@pytest.mark.parametrize("full", [True, False])
def test_moves_what_the_budget_says(full, monkeypatch):
    if not _dispatch.is_interpreted():
        pytest.skip("counts the accesses of Triton's interpreter")
    case, (mean, std) = Case(2, 3, (64, 64), (16, 16), 0.75), make_mean_std(3)
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case)
    pred = torch.randn(case.n, case.num_patches if full else ids.shape[1], case.pixels, requires_grad=True)
    masked = ids.numel() * case.pixels
    with counted_traffic(monkeypatch) as forward:
        loss = masked_patch_mse(pred, images, ids, 16, mean=mean, std=std)
    assert forward.bytes_read(images) == masked
    assert forward.bytes_read(pred) == 4 * masked
    assert sum(a.size * size for a, size in forward.written) == 4 * ids.numel()
    with counted_traffic(monkeypatch) as backward:
        (grad,) = torch.autograd.grad(loss, pred)
    assert backward.bytes_read(images) == masked
    assert backward.bytes_read(pred) == 4 * masked
    assert backward.bytes_written(grad) == 4 * grad.numel()
