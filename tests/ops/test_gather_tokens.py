"""gather_tokens against torch.gather with an expanded index."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from property_cases import plain_only

from fastmae.ops.gather_tokens import gather_tokens

pytestmark = pytest.mark.ops

# The package exports a function of the same name.
op = import_module("fastmae.ops.gather_tokens")
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# One unit in the last place: Triton's interpreter truncates where the hardware rounds.
TOLERANCE = {F64: 1e-14, F32: 1e-6, F16: 2e-3, BF16: 1.6e-2}


def plain(tokens, ids):
    return torch.gather(tokens, 1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def distinct_ids(n, length, k, device="cpu"):
    return torch.rand(n, length).argsort(dim=1)[:, :k].to(device)


def assert_agrees(tokens, ids):
    """Values exactly; the gradient against that in float64, rounded once."""
    tokens = tokens.detach().requires_grad_()
    out = gather_tokens(tokens, ids)
    assert out.is_contiguous()
    assert torch.equal(out, plain(tokens, ids))
    grad_out = torch.randn(out.shape, device=out.device).to(out.dtype)
    (grad,) = torch.autograd.grad(out, tokens, grad_out)
    wide = tokens.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(plain(wide, ids), wide, grad_out.double())
    assert grad.dtype == tokens.dtype
    tolerance = TOLERANCE[tokens.dtype]
    torch.testing.assert_close(grad.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("n", "length", "k", "dim", "dtype"),
    [(2, 16, 4, 32, F16), (1, 197, 50, 192, BF16), (3, 50, 47, 5, F64), (1, 10, 1, 1, F32)],
)
def test_agrees(device, n, length, k, dim, dtype):
    tokens = torch.randn(n, length, dim, device=device).to(dtype)
    assert_agrees(tokens, distinct_ids(n, length, k, device))


def test_gradient_of_distinct_ids_is_exact(device):
    tokens = torch.randn(2, 30, 48, device=device, dtype=torch.bfloat16, requires_grad=True)
    ids = distinct_ids(2, 30, 10, device)
    grad_out = torch.randn(2, 10, 48, device=device).bfloat16()
    (grad,) = torch.autograd.grad(gather_tokens(tokens, ids), tokens, grad_out)
    assert torch.equal(plain(grad, ids), grad_out)
    assert int((grad != 0).any(-1).sum()) == 20


def test_repeated_ids_are_summed_in_float32(device):
    # 1 and 32 halves of a bfloat16 step: lost one by one in bfloat16, an eighth together.
    tokens = torch.zeros(1, 3, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.full((1, 33), 1, device=device)
    grad_out = torch.full((1, 33, 8), 2.0**-8, device=device, dtype=torch.bfloat16)
    grad_out[:, 0] = 1
    (grad,) = torch.autograd.grad(gather_tokens(tokens, ids), tokens, grad_out)
    assert grad[0, :, 0].tolist() == [0, 1.125, 0]


def test_empty_batch(device):
    tokens = torch.randn(0, 5, 3, device=device, requires_grad=True)
    out = gather_tokens(tokens, torch.zeros(0, 2, dtype=torch.int64, device=device))
    assert out.shape == (0, 2, 3)
    out.sum().backward()
    assert tokens.grad.shape == (0, 5, 3)


def test_opcheck(device):
    tokens = torch.randn(2, 6, 8, device=device, dtype=BF16, requires_grad=True)
    ids = distinct_ids(2, 6, 3, device)
    torch.library.opcheck(op._gather_tokens, (tokens, ids))
    torch.library.opcheck(op._gather_tokens_backward, (torch.randn(2, 3, 8, device=device, dtype=BF16), ids, 6))


@plain_only
def test_compile(device):
    def f(tokens, ids):
        return (gather_tokens(tokens * 2, ids) + 1).square().sum()

    tokens = torch.randn(2, 9, 8, device=device, requires_grad=True)
    ids = distinct_ids(2, 9, 4, device)
    (want,) = torch.autograd.grad(f(tokens, ids), tokens)
    (got,) = torch.autograd.grad(torch.compile(f, fullgraph=True)(tokens, ids), tokens)
    torch.testing.assert_close(got, want)


def test_second_derivative_is_refused(device):
    tokens = torch.randn(1, 4, 3, device=device, requires_grad=True)
    out = gather_tokens(tokens, torch.zeros(1, 2, dtype=torch.int64, device=device))
    (grad,) = torch.autograd.grad(out.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("name", "tokens", "ids"),
    [
        ("tokens", torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64)),
        ("tokens", torch.zeros(2, 4, 3, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)),
        ("tokens", torch.zeros(2, 4, 0), torch.zeros(2, 1, dtype=torch.int64)),
        ("ids", torch.zeros(2, 4, 3), torch.zeros(2, 1, dtype=torch.int32)),
        ("ids", torch.zeros(2, 4, 3), torch.zeros(3, 1, dtype=torch.int64)),
        ("ids", torch.zeros(2, 4, 3), torch.zeros(2, 0, dtype=torch.int64)),
        ("ids", torch.zeros(2, 4, 3), torch.tensor([[0], [4]])),
        ("ids", torch.zeros(2, 4, 3), torch.tensor([[0], [-1]])),
        ("ids", torch.zeros(2, 4, 3), torch.zeros(2, 1, dtype=torch.int64, device="meta")),
    ],
)
def test_bad_arguments(name, tokens, ids):
    with pytest.raises(ValueError, match=name):
        gather_tokens(tokens, ids)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("length", "k", "dim"), [(197, 50, 768), (197, 147, 512), (257, 64, 1280), (50, 60, 40)])
def test_gpu_agrees(length, k, dim, dtype):
    tokens = torch.randn(8, length, dim, device="cuda").to(dtype)
    assert_agrees(tokens, torch.randint(0, length, (8, k), device="cuda"))
