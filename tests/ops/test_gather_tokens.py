"""gather_tokens against torch.gather with an expanded index."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae.ops._dispatch import is_interpreted, load_kernels
from fastmae.ops.gather_tokens import gather_tokens

pytestmark = pytest.mark.ops

# The package exports a function of the same name.
op = import_module("fastmae.ops.gather_tokens")
TRITON = load_kernels("gather_tokens") is not None
INTERPRETED = TRITON and is_interpreted()
EXAMPLES = 8 if INTERPRETED else 25
# One unit in the last place: Triton's interpreter truncates where the hardware rounds.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("n", "length", "k", "dim"), [(2, 16, 4, 32), (1, 197, 50, 192), (3, 50, 47, 5), (1, 10, 1, 1)]
)
def test_agrees(device, n, length, k, dim, dtype):
    tokens = torch.randn(n, length, dim, device=device).to(dtype)
    assert_agrees(tokens, distinct_ids(n, length, k, device))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 3),
    length=st.integers(1, 256),
    k=st.integers(1, 48 if INTERPRETED else 256),
    dim=st.sampled_from([1, 3, 24, 64, 96, 130]),
    seed=st.integers(0, 1000),
)
def test_agrees_everywhere_repeated_ids_included(n, length, k, dim, seed):
    torch.manual_seed(seed)
    assert_agrees(torch.randn(n, length, dim, dtype=torch.float64), torch.randint(0, length, (n, k)))


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


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, 1:],
        lambda t: t[::2],
        lambda t: t.transpose(0, 1),
        lambda t: t.transpose(1, 2),
        lambda t: t[..., 1::2],
        lambda t: t[:1].expand(3, -1, -1),
    ],
    ids=["rows", "samples", "swapped", "columns first", "every other column", "expanded"],
)
def test_strides(device, view):
    tokens = view(torch.randn(4, 12, 16, device=device))
    ids = torch.randint(0, tokens.shape[1], (5, tokens.shape[0]), device=device).t()
    assert_agrees(tokens, ids)


def test_strided_gradient(device):
    tokens = torch.randn(2, 9, 8, device=device, requires_grad=True)
    ids = distinct_ids(2, 9, 4, device)
    (grad,) = torch.autograd.grad(gather_tokens(tokens, ids).sum(), tokens)
    assert torch.equal(grad.sum((1, 2)), torch.full((2,), 32.0, device=device))
    (grad,) = torch.autograd.grad(
        gather_tokens(tokens, ids).transpose(1, 2), tokens, torch.ones(2, 8, 4, device=device)
    )
    assert torch.equal(plain(grad, ids), torch.ones(2, 4, 8, device=device))


def test_gradcheck(device):
    tokens = torch.randn(2, 5, 3, device=device, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[4, 0, 4], [1, 2, 3]], device=device)
    assert torch.autograd.gradcheck(lambda t: gather_tokens(t, ids), (tokens,))


def test_empty_batch(device):
    tokens = torch.randn(0, 5, 3, device=device, requires_grad=True)
    out = gather_tokens(tokens, torch.zeros(0, 2, dtype=torch.int64, device=device))
    assert out.shape == (0, 2, 3)
    out.sum().backward()
    assert tokens.grad.shape == (0, 5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype):
    tokens = torch.randn(2, 6, 8, device=device, dtype=dtype, requires_grad=True)
    ids = distinct_ids(2, 6, 3, device)
    torch.library.opcheck(op._gather_tokens, (tokens, ids))
    torch.library.opcheck(op._gather_tokens_backward, (torch.randn(2, 3, 8, device=device, dtype=dtype), ids, 6))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(device, backend):
    def f(tokens, ids):
        return (gather_tokens(tokens * 2, ids) + 1).square().sum()

    tokens = torch.randn(2, 9, 8, device=device, requires_grad=True)
    ids = distinct_ids(2, 9, 4, device)
    (want,) = torch.autograd.grad(f(tokens, ids), tokens)
    (got,) = torch.autograd.grad(torch.compile(f, fullgraph=True, backend=backend)(tokens, ids), tokens)
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
