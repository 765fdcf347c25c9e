"""Bias, exact GELU and product: fastmae's one step against PyTorch's three, forward and backward, under autocast."""

from __future__ import annotations

import plain
import pytest
import torch
import torch.nn.functional as F
from comparison import Comparison, compiled, gradient

from fastmae.ops import gelu_linear

# (name, rows, F, D): the second half of the MLP.
SHAPES = (
    [("encoder-L", 256 * 50, 4096, 1024), ("encoder-B", 256 * 50, 3072, 768), ("decoder", 256 * 197, 2048, 512)]
    if torch.cuda.is_available()
    else [("encoder-B", 8 * 50, 3072, 768), ("decoder", 8 * 197, 2048, 512)]
)


def build(shape: tuple, backward: bool, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Comparison:
    name, rows, hidden, dim = shape
    h = torch.randn(1, rows, hidden, device=device, dtype=dtype, requires_grad=backward)
    weight = torch.randn(dim, hidden, device=device, requires_grad=backward)
    bias, out_bias = (torch.randn(d, device=device, requires_grad=backward) for d in (hidden, dim))

    # In eager PyTorch the product that makes h adds the bias in passing; the compiler adds it in passing here.
    def written_out():
        return F.linear(F.gelu(h), weight, out_bias)

    def written_out_with_bias():
        return F.linear(F.gelu(h + bias), weight, out_bias)

    calls = {
        "fastmae": lambda: gelu_linear(h, bias, weight, out_bias),
        "plain": written_out,
        "plain-compile": compiled(written_out_with_bias),
    }
    calls = {name: plain.under_autocast(call, device, dtype) for name, call in calls.items()}
    if backward:
        eager = gradient(calls["plain"], [h, weight, out_bias], bias_of=h)
        calls = {name: gradient(call, [h, bias, weight, out_bias]) for name, call in calls.items() if name != "plain"}
        calls["plain"] = eager
    # Forward: h and the weight in, the product out. Backward: h and a gradient in, those of h and of the weight out.
    size = dtype.itemsize
    moved = rows * size * (hidden + dim) + size * dim * hidden
    if backward:
        moved = rows * size * (2 * hidden + dim) + (size + 4) * dim * hidden
    return Comparison(
        f"gelu_linear, {name} {'backward' if backward else 'forward'}", calls,
        useful_bytes=moved, flops=(4 if backward else 2) * rows * dim * hidden, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("competitor", ["fastmae", "plain", "plain-compile"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def bench_gelu_linear(compete, device, dtype, shape, backward, competitor):
    compete(build, shape, backward, device, dtype)
