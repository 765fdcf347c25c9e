"""restore_tokens against cat, gather, cat, add."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from property_cases import plain_only

from fastmae.ops.restore_tokens import restore_tokens

pytestmark = pytest.mark.ops

# The package exports a function of the same name.
op = import_module("fastmae.ops.restore_tokens")
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
# One unit in the last place: Triton's interpreter truncates where the hardware rounds.
TOLERANCE = {F64: 1e-13, F32: 1e-5, F16: 2e-3, BF16: 1.6e-2}


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


def assert_agrees(visible, mask_token, ids_restore, pos_embed, p, tolerance=TOLERANCE):
    """Values exactly as PyTorch rounds them, the dtype too; gradients against those in float64."""
    out = restore_tokens(visible, mask_token, ids_restore, pos_embed, p)
    expected = plain(visible, mask_token, ids_restore, pos_embed, p)
    assert out.dtype == expected.dtype
    assert out.is_contiguous()
    one_ulp = tolerance[out.dtype] if out.dtype in (torch.float16, torch.bfloat16) else 0.0
    torch.testing.assert_close(out, expected, rtol=one_ulp, atol=0)
    inputs = [t for t in (visible, mask_token, pos_embed) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    grad_out = torch.randn(out.shape, device=out.device).to(out.dtype)
    got = torch.autograd.grad(out, inputs, grad_out)
    want = torch.autograd.grad(plain(wide[0], wide[1], ids_restore, *wide[2:], p=p), wide, grad_out.double())
    for tensor, a, b in zip(inputs, got, want, strict=True):
        assert a.dtype == tensor.dtype
        assert a.shape == tensor.shape
        torch.testing.assert_close(a.double(), b, rtol=tolerance[a.dtype], atol=tolerance[a.dtype])


@pytest.mark.parametrize("table", [False, True], ids=["token", "table"])
@pytest.mark.parametrize(
    ("sizes", "dtypes"),
    [
        ((2, 16, 4, 32, 1), (F32, F32, F32)),
        ((3, 25, 24, 5, 2), (F64, F64, F64)),
        ((1, 49, 12, 96, 0), (BF16, BF16, BF16)),
        ((2, 16, 4, 32, 1), (BF16, F32, F32)),
        ((3, 25, 24, 5, 2), (F16, BF16, F16)),
        ((2, 8, 8, 16, 1), (F32, F32, F32)),  # nothing is masked
    ],
)
def test_agrees(device, sizes, dtypes, table):
    assert_agrees(*make(*sizes, dtypes, device, table))


def test_tables_of_more_samples_than_one_partial_sum(device):
    visible, mask_token, ids_restore, pos_embed, p = make(2 * op._SAMPLES + 3, 5, 2, 8, 1, device=device, table=True)
    assert_agrees(visible, mask_token, ids_restore, pos_embed, p)


def test_mask_token_gradient_is_summed_in_float32(device):
    # 4096 bfloat16 ones: a bfloat16 sum stops at 256.
    visible, mask_token, ids_restore, _, _ = make(16, 257, 1, 8, 0, (BF16, BF16, BF16), device)
    restore_tokens(visible, mask_token, ids_restore).sum().backward()
    assert mask_token.grad.flatten().tolist() == [4096] * 8


def test_one_gradient_alone(device):
    visible, mask_token, ids_restore, pos_embed, p = make(2, 9, 4, 8, 1, device=device)
    inputs = [visible, mask_token, pos_embed]
    expected = torch.autograd.grad(plain(*inputs[:2], ids_restore, pos_embed, p).square().sum(), inputs)
    for wanted, want in enumerate(expected):
        detached = [t if i == wanted else t.detach() for i, t in enumerate(inputs)]
        out = restore_tokens(*detached[:2], ids_restore, detached[2], p)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), inputs[wanted]), (want,))


def test_empty_batch(device):
    visible, mask_token, ids_restore, pos_embed, p = make(0, 5, 2, 3, 1, device=device)
    out = restore_tokens(visible, mask_token, ids_restore, pos_embed, p)
    assert out.shape == (0, 6, 3)
    out.sum().backward()
    assert not mask_token.grad.any()
    assert not pos_embed.grad.any()


@pytest.mark.parametrize("table", [False, True])
def test_opcheck(device, table):
    visible, mask_token, ids_restore, pos_embed, p = make(2, 6, 2, 8, 1, (BF16, F32, F32), device, table)
    token, positions = mask_token.detach()[0].requires_grad_(), pos_embed.detach()[0].requires_grad_()
    torch.library.opcheck(op._restore_tokens, (visible, token, ids_restore, positions if table else None, p))
    grad = torch.randn(2, 7, 8, device=device)
    torch.library.opcheck(op._backward_visible, (grad, ids_restore, 1, 2, BF16))
    torch.library.opcheck(op._backward_mask_token, (grad, ids_restore, 1, 2, len(token), F32))


@plain_only
def test_compile(device):
    def f(visible, mask_token, ids_restore, pos_embed):
        return restore_tokens(visible * 2, mask_token, ids_restore, pos_embed, 1).square().sum()

    visible, mask_token, ids_restore, pos_embed, _ = make(2, 9, 4, 8, 1, device=device)
    inputs = (visible, mask_token, pos_embed)
    want = torch.autograd.grad(f(visible, mask_token, ids_restore, pos_embed), inputs)
    compiled = torch.compile(f, fullgraph=True)
    got = torch.autograd.grad(compiled(visible, mask_token, ids_restore, pos_embed), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivative_is_refused(device):
    visible, mask_token, ids_restore, _, p = make(1, 4, 2, 3, 1, device=device)
    out = restore_tokens(visible, mask_token, ids_restore, None, p)
    (grad,) = torch.autograd.grad(out.square().sum(), visible, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


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
    arguments = {
        "visible": torch.zeros(2, 3, 4),
        "mask_token": torch.zeros(4),
        "ids_restore": torch.arange(6).repeat(2, 1),
        "pos_embed": None,
        "num_prefix_tokens": 1,
    }
    restore_tokens(**arguments)
    with pytest.raises(ValueError, match=name):
        restore_tokens(**(arguments | changes))


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, F32), (BF16, BF16, BF16)])
@pytest.mark.parametrize(("length", "k", "dim"), [(196, 49, 512), (256, 64, 512), (100, 31, 40)])
def test_gpu_agrees(length, k, dim, dtypes):
    loose = TOLERANCE | {F32: 1e-4}
    assert_agrees(*make(16, length, k, dim, 1, dtypes, "cuda"), tolerance=loose)
