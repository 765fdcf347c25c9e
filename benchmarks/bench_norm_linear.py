"""Residual add, LayerNorm and product: fastmae's one step against PyTorch's three, under autocast.

``apex`` has the LayerNorm of NVIDIA's apex in the place of PyTorch's.
"""

from __future__ import annotations

import apex_layer_norm
import plain
import pytest
import torch
import torch.nn.functional as F
from comparison import Comparison, Unavailable, compiled, gradient

from fastmae.ops import norm_linear

# (name, rows, D, F): the norm in front of attention.
SHAPES = (
    [("encoder-L", 256 * 50, 1024, 3072), ("encoder-B", 256 * 50, 768, 2304), ("decoder", 256 * 197, 512, 1536)]
    if torch.cuda.is_available()
    else [("encoder-B", 8 * 50, 768, 2304), ("decoder", 8 * 197, 512, 1536)]
)
COMPETITORS = ["fastmae", "plain", "plain-compile", "apex"]


def build(shape: tuple, backward: bool, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Comparison:
    name, rows, dim, out = shape
    # Rows are those of a batch of one: what is under test does not look beyond a row.
    x = torch.randn(1, rows, dim, device=device, requires_grad=backward)
    branch = torch.randn(1, rows, dim, device=device, dtype=dtype, requires_grad=backward)
    vectors = [torch.randn(dim, device=device, requires_grad=backward) for _ in range(3)]
    branch_bias, norm_weight, norm_bias = vectors
    weight = torch.randn(out, dim, device=device, requires_grad=backward)
    bias = torch.randn(out, device=device, requires_grad=backward)

    # In eager PyTorch the product that makes the branch adds its bias in passing; the compiler adds it in passing here.
    def written_out(new=None):
        new = x + branch if new is None else new
        return new, F.linear(F.layer_norm(new, (dim,), norm_weight, norm_bias, 1e-6), weight, bias)

    def written_out_with_bias():
        return written_out(x + (branch + branch_bias))

    def with_apex():
        new = x + branch
        return new, F.linear(apex_layer_norm.apply(new, norm_weight, norm_bias), weight, bias)

    calls = {
        "fastmae": lambda: norm_linear(x, branch, branch_bias, norm_weight, norm_bias, weight, bias),
        "plain": written_out,
        "plain-compile": compiled(written_out_with_bias),
        "apex": Unavailable(reason) if (reason := apex_layer_norm.missing(device)) else with_apex,
    }
    for competitor, call in calls.items():
        if not isinstance(call, Unavailable):
            calls[competitor] = plain.under_autocast(call, device, dtype)
    if backward:
        inputs, eager = [x, branch, norm_weight, norm_bias, weight, bias], ("plain", "apex")
        for competitor, call in calls.items():
            if competitor in eager and not isinstance(call, Unavailable):
                calls[competitor] = gradient(call, inputs, bias_of=branch)
            elif competitor not in eager:
                calls[competitor] = gradient(call, [*inputs, branch_bias])
    # Forward: x, branch and the weight in, the new x and the product out. Backward: the new x and two gradients in,
    # two gradients and that of the weight out. Stream and gradients of weights in float32, the rest in the dtype.
    size = dtype.itemsize
    moved = rows * (4 + size + 4) * dim + rows * size * out + size * dim * out
    if backward:
        moved = rows * (4 + 4 + 4 + size) * dim + rows * size * out + (size + 4) * dim * out
    return Comparison(
        f"norm_linear, {name} {'backward' if backward else 'forward'}", calls,
        useful_bytes=moved, flops=(4 if backward else 2) * rows * dim * out, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def bench_norm_linear(compete, device, dtype, shape, backward, competitor):
    compete(build, shape, backward, device, dtype)
