"""restore_tokens against cat, gather, cat, add."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from property_cases import assert_as_accurate

from fastmae.ops.restore_tokens import restore_tokens

pytestmark = pytest.mark.ops

# The package exports a function of the same name.
op = import_module("fastmae.ops.restore_tokens")
F32, BF16 = torch.float32, torch.bfloat16


def plain(visible, mask_token, ids_restore, pos_embed=None, p=0):
    """As facebookresearch/mae writes it, with P prefix tokens instead of one."""
    n, rows, dim = visible.shape
    length = ids_restore.shape[1]
    missing = visible.new_zeros(n, length + p - rows, dim)
    x = torch.cat([visible[:, p:], missing], dim=1)
    x = torch.gather(x, 1, ids_restore[..., None].expand(-1, -1, dim))
    x = torch.where((ids_restore >= rows - p)[..., None], mask_token.reshape(1, -1, dim).expand(n, length, dim), x)
    x = torch.cat([visible[:, :p], x.to(torch.promote_types(visible.dtype, mask_token.dtype))], dim=1)
    return x if pos_embed is None else x + pos_embed


def make(n, length, k, dim, p, dtypes=(torch.float32,) * 3, device="cpu", table=False):
    visible = torch.randn(n, p + k, dim, device=device).to(dtypes[0]).requires_grad_()
    mask_token = torch.randn(1, length if table else 1, dim, device=device).to(dtypes[1]).requires_grad_()
    pos_embed = torch.randn(1, p + length, dim, device=device).to(dtypes[2]).requires_grad_()
    return visible, mask_token, torch.rand(n, length, device=device).argsort(dim=1), pos_embed, p


def assert_agrees(visible, mask_token, ids_restore, pos_embed, p):
    inputs = visible, mask_token, pos_embed
    ours, theirs = (lambda x, token, table, f=f: f(x, token, ids_restore, table, p) for f in (restore_tokens, plain))
    assert_as_accurate(ours, theirs, inputs)


def test_tables_of_more_samples_than_one_partial_sum(device):
    visible, mask_token, ids_restore, pos_embed, p = make(2 * op._SAMPLES + 3, 5, 2, 8, 1, device=device, table=True)
    assert_agrees(visible, mask_token, ids_restore, pos_embed, p)


def test_mask_token_gradient_is_summed_in_float32(device):
    # 4096 bfloat16 ones: a bfloat16 sum stops at 256.
    visible, mask_token, ids_restore, _, _ = make(16, 257, 1, 8, 0, (BF16, BF16, BF16), device)
    restore_tokens(visible, mask_token, ids_restore).sum().backward()
    assert mask_token.grad.flatten().tolist() == [4096] * 8


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_alone(device, wanted):
    visible, mask_token, ids_restore, pos_embed, p = make(2, 9, 4, 8, 1, device=device)
    inputs = [t.requires_grad_(i == wanted) for i, t in enumerate((visible, mask_token, pos_embed))]
    assert_agrees(*inputs[:2], ids_restore, inputs[2], p)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("visible", {"visible": torch.zeros(2, 3)}),
        ("visible", {"visible": torch.zeros(2, 1, 4)}),
        ("visible", {"visible": torch.zeros(2, 3, 4, dtype=torch.int64)}),
        ("mask_token", {"mask_token": torch.zeros(1, 4)}),
        ("mask_token", {"mask_token": torch.zeros(5)}),
        ("mask_token", {"mask_token": torch.zeros(1, 5, 4)}),
        ("mask_token", {"mask_token": torch.zeros(4, device="meta")}),
        ("ids_restore", {"ids_restore": torch.zeros(2, 6)}),
        ("ids_restore", {"ids_restore": torch.zeros(3, 6, dtype=torch.int64)}),
        ("ids_restore", {"ids_restore": torch.zeros(2, 1, dtype=torch.int64)}),
        ("ids_restore", {"ids_restore": torch.full((2, 6), 6)}),
        ("pos_embed", {"pos_embed": torch.zeros(1, 6, 4)}),
        ("pos_embed", {"pos_embed": torch.zeros(7, 4)}),
        ("num_prefix_tokens", {"num_prefix_tokens": -1}),
        ("num_prefix_tokens", {"num_prefix_tokens": True}),
    ],
)
def test_bad_arguments(name, changes):
    arguments = {"visible": torch.zeros(2, 3, 4), "mask_token": torch.zeros(4), "num_prefix_tokens": 1}
    arguments |= {"ids_restore": torch.arange(6).repeat(2, 1), "pos_embed": None}
    restore_tokens(**arguments)
    with pytest.raises(ValueError, match=name):
        restore_tokens(**(arguments | changes))


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, F32), (BF16, BF16, BF16)])
@pytest.mark.parametrize(("length", "k", "dim"), [(196, 49, 512), (256, 64, 512), (100, 31, 40)])
def test_gpu_agrees(length, k, dim, dtypes):
    assert_agrees(*make(16, length, k, dim, 1, dtypes, "cuda"))
