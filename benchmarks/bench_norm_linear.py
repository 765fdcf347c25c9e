"""Residual add, LayerNorm and product, in front of attention: fastmae's one step against PyTorch's three.

``apex`` has the LayerNorm of NVIDIA's apex in the place of PyTorch's.
"""

from __future__ import annotations

from functools import partial

import op_benchmark as op
import torch
import torch.nn.functional as F
from benchmark import Unavailable

from fastmae.ops import norm_linear

# (name, rows, D, F)
SHAPES = [("encoder-B", 8 * 50, 768, 2304), ("decoder", 8 * 197, 512, 1536)]
if op.CUDA:
    SHAPES = [(name, 32 * rows, *widths) for name, rows, *widths in [("encoder-L", 400, 1024, 3072), *SHAPES]]


def ours(x, branch, branch_bias, norm_weight, norm_bias, weight, bias):
    """The new stream, if there is a branch to add, and the product."""
    new, out = norm_linear(x, branch, branch_bias, norm_weight, norm_bias, weight, bias)
    return out if branch is None else (new, out)


def plain(x, branch, branch_bias, norm_weight, norm_bias, weight, bias):
    new = x if branch is None else (x + (branch + branch_bias)).to(x.dtype)
    normed = F.layer_norm(new, new.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), 1e-6)
    out = F.linear(normed, weight, bias)
    return out if branch is None else (new, out)


def torch_layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def without_bias(layer_norm, x, branch, branch_bias, norm_weight, norm_bias, weight, bias):
    """In eager PyTorch the product that makes the branch adds its bias in passing."""
    new = x + branch
    return new, F.linear(layer_norm(new, norm_weight, norm_bias), weight, bias)


def make(shape: tuple, device: torch.device, dtype: torch.dtype, stream: torch.dtype = torch.float32) -> op.OpCase:
    """``stream``: dtype of the residual stream."""
    name, rows, dim, out = shape
    # Rows are those of a batch of one: the op does not look beyond a row.
    inputs = {
        "x": torch.randn(1, rows, dim, device=device).to(stream),
        "branch": torch.randn(1, rows, dim, device=device, dtype=dtype),
        **{key: torch.randn(dim, device=device) for key in ("branch_bias", "norm_weight", "norm_bias")},
        "weight": torch.randn(out, dim, device=device) * dim**-0.5,
        "bias": torch.randn(out, device=device),
    }
    apex, size, flops = op.apex_layer_norm(device), dtype.itemsize, 2 * rows * dim * out
    return op.OpCase(
        "norm_linear",
        name,
        {key: x.requires_grad_() for key, x in inputs.items()},
        {
            "fastmae": ours,
            "plain": partial(without_bias, torch_layer_norm),
            "plain-compile": plain,
            "apex": apex if isinstance(apex, Unavailable) else partial(without_bias, apex),
        },
        # Forward: x, branch and the weight in, the new x and the product out. Backward: the new x and two gradients in,
        # two gradients and that of the weight out. Stream and gradients of weights in float32, the rest in the dtype.
        moved=(
            rows * (4 + size + 4) * dim + rows * size * out + size * dim * out,
            rows * (4 + 4 + 4 + size) * dim + rows * size * out + (size + 4) * dim * out,
        ),
        flops=(flops, 2 * flops),
        bias=("branch", "branch_bias"),
    )


bench_norm_linear = op.op_benchmark(make, SHAPES, ("fastmae", "plain", "plain-compile", "apex"))
