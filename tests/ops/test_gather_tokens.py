"""gather_tokens against torch.gather with an expanded index."""

from __future__ import annotations

import pytest
import torch
from property_cases import TINY, assert_as_accurate

from fastmae.ops.gather_tokens import gather_tokens

pytestmark = pytest.mark.ops


def plain(tokens, ids):
    return torch.gather(tokens, 1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def distinct_ids(n, length, k, device="cpu"):
    return torch.rand(n, length).argsort(dim=1)[:, :k].to(device)


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
@pytest.mark.parametrize("dtype", TINY)
@pytest.mark.parametrize(("length", "k", "dim"), [(197, 50, 768), (197, 147, 512), (257, 64, 1280), (50, 60, 40)])
def test_gpu_agrees(length, k, dim, dtype):
    tokens = torch.randn(8, length, dim, device="cuda").to(dtype).requires_grad_()
    ids = torch.randint(0, length, (8, k), device="cuda")
    assert torch.equal(gather_tokens(tokens, ids), plain(tokens, ids))
    assert_as_accurate(lambda x: gather_tokens(x, ids), lambda x: plain(x, ids), (tokens,))
