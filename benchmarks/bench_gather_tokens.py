"""gather_tokens, forward and backward, against torch.gather with an expanded index."""

from __future__ import annotations

import plain
import pytest
import torch
from comparison import Comparison, compiled, gradient

from fastmae.ops import gather_tokens

# (name, N, L, K, D)
SHAPES = (
    [("encoder-L", 256, 196, 49, 1024), ("decoder", 256, 197, 147, 512)]
    if torch.cuda.is_available()
    else [("encoder-B", 32, 196, 49, 768), ("decoder", 32, 197, 147, 512)]
)


def build(shape: tuple, backward: bool, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Comparison:
    name, n, length, k, dim = shape
    tokens = torch.randn(n, length, dim, device=device, dtype=dtype, requires_grad=backward)
    ids = plain.choose(n, length, k, device)
    compiled_form = compiled(plain.pick)
    competitors = {
        "fastmae": lambda: gather_tokens(tokens, ids),
        "plain": lambda: plain.pick(tokens, ids),
        "plain-compile": lambda: compiled_form(tokens, ids),
    }
    if backward:
        competitors = {name: gradient(call, [tokens]) for name, call in competitors.items()}
    return Comparison(
        f"gather_tokens, {name} {'backward' if backward else 'forward'}", competitors,
        useful_bytes=n * (8 * k + dtype.itemsize * dim * (k + (length if backward else k))), dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("competitor", ["fastmae", "plain", "plain-compile"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[0])
def bench_gather_tokens(compete, device, dtype, shape, backward, competitor):
    compete(build, shape, backward, device, dtype)
