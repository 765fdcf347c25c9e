"""The patch ops refuse bad input by name, saying what came and what was expected."""

from __future__ import annotations

import pytest
import torch
from patch_cases import make_mean_std

from fastmae.ops.gather_patches import gather_patches
from fastmae.ops.masked_patch_mse import masked_patch_mse

pytestmark = pytest.mark.ops


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(2, 3, 32, 32, dtype=torch.int32)},
            r"images: expected a uint8 or floating .* got int32",
        ),
        ({"images": torch.zeros(3, 32, 32)}, r"images: .*\(N, C, H, W\), got float32 \(3, 32, 32\)"),
        ({"images": "cat.jpg"}, "images: .* got 'cat.jpg'"),
        ({"images": torch.zeros(2, 3, 32, 40)}, "images: size 32x40 does not divide into patches of 16x16"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int32)}, "ids: expected an int64 tensor .* got int32"),
        (
            {"ids": torch.zeros(1, 2, dtype=torch.int64)},
            r"ids: .*\(R \* 2, K\) for R rows an image, got int64 \(1, 2\)",
        ),
        ({"ids": torch.zeros(0, 2, dtype=torch.int64)}, r"ids: .*\(2, K\).* got int64 \(0, 2\)"),
        ({"ids": torch.tensor([[0, 4], [1, 2]])}, r"ids: expected values in \[0, 4\), got values from 0 to 4"),
        ({"ids": torch.tensor([[0, -1], [1, 2]])}, r"ids: expected values in \[0, 4\), got values from -1 to 2"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64, device="meta")}, "ids: .*device"),
        ({"patch_size": (16, 0)}, "patch_size"),
        ({"mean": None}, "mean: .* mean and std together, got None"),
        ({"std": None}, "std: .* mean and std together, got None"),
        ({"std": torch.ones(4)}, r"std: expected a float32 tensor of shape \(3,\).* got float32 \(4,\)"),
        ({"mean": torch.ones(3, dtype=torch.bfloat16)}, "mean: expected a float32 tensor .* got bfloat16"),
        ({"mean": torch.ones(3, device="meta")}, "mean: .* on cpu.* got .* on meta"),
        ({"dtype": torch.uint8}, "dtype: expected a floating point dtype or None"),
    ],
)
def test_gather_patches_names_bad_input(change, message):
    mean, std = make_mean_std(3)
    good = {
        "images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "ids": torch.tensor([[0, 1], [2, 3]]),
        "patch_size": 16, "mean": mean, "std": std,
    }  # fmt: skip
    gather_patches(**good)
    with pytest.raises(ValueError, match=message):
        gather_patches(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(2, 2, 767)}, r"pred: .*\(2, 2, 768\).* or \(2, 4, 768\).*16 \* 16 \* 3, got"),
        ({"pred": torch.zeros(4, 2, 768)}, r"pred: .*\(2, 2, 768\).* got float32 \(4, 2, 768\)"),
        ({"ids_mask": torch.zeros(3, 2, dtype=torch.int64)}, r"ids_mask: .*\(R \* 2, K\).* got int64 \(3, 2\)"),
        ({"ids_mask": torch.zeros(4, 2, dtype=torch.int64)}, r"pred: .*\(4, 2, 768\).* got float32 \(2, 2, 768\)"),
        ({"pred": torch.zeros(2, 2, 768, dtype=torch.int64)}, "pred: expected a floating point .* got int64"),
        ({"pred": torch.zeros(2, 2, 768, device="meta")}, "pred: expected a tensor on the images' device, cpu"),
        ({"images": torch.zeros(2, 3, 32, 32, requires_grad=True)}, "images: .* does not require a gradient"),
        ({"patch_size": 1, "pred": torch.zeros(2, 2, 1), "images": torch.zeros(2, 1, 2, 2), "mean": None, "std": None},
         "norm_pix: expected False for patches of a single value"),
        ({"reduction": "max"}, "reduction: expected one of mean, sum, none, got 'max'"),
        ({"eps": -1.0}, "eps: expected a number >= 0, got -1.0"),
    ],
)  # fmt: skip
def test_masked_patch_mse_names_bad_input(change, message):
    mean, std = make_mean_std(3)
    good = {
        "pred": torch.zeros(2, 2, 768), "images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        "ids_mask": torch.tensor([[0, 1], [2, 3]]), "patch_size": 16, "mean": mean, "std": std,
    }  # fmt: skip
    masked_patch_mse(**good)
    with pytest.raises(ValueError, match=message):
        masked_patch_mse(**{**good, **change})
