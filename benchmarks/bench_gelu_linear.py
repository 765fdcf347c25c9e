"""Bias, exact GELU and product, the second half of the MLP: fastmae's one step against PyTorch's three."""

from __future__ import annotations

import op_benchmark as op
import torch
import torch.nn.functional as F

from fastmae.ops import gelu_linear

# (name, rows, F, D)
SHAPES = [("encoder-B", 8 * 50, 3072, 768), ("decoder", 8 * 197, 2048, 512)]
if op.CUDA:
    SHAPES = [(name, 32 * rows, *widths) for name, rows, *widths in [("encoder-L", 400, 4096, 1024), *SHAPES]]


def ours(h, bias, weight, out_bias):
    return gelu_linear(h, bias, weight, out_bias)


def plain(h, bias, weight, out_bias):
    return F.linear(F.gelu(h if bias is None else h + bias.to(h.dtype)), weight, out_bias)


def without_bias(h, bias, weight, out_bias):
    """In eager PyTorch the product that makes h adds the bias in passing."""
    return F.linear(F.gelu(h), weight, out_bias)


def make(shape: tuple, device: torch.device, dtype: torch.dtype) -> op.OpCase:
    name, rows, hidden, dim = shape
    inputs = {
        "h": torch.randn(1, rows, hidden, device=device, dtype=dtype),
        "bias": torch.randn(hidden, device=device),
        "weight": torch.randn(dim, hidden, device=device) * hidden**-0.5,
        "out_bias": torch.randn(dim, device=device),
    }
    size, flops = dtype.itemsize, 2 * rows * dim * hidden
    return op.OpCase(
        "gelu_linear",
        name,
        {key: x.requires_grad_() for key, x in inputs.items()},
        {"fastmae": ours, "plain": without_bias, "plain-compile": plain},
        # Forward: h and weight in, the product out. Backward: h and a gradient in, the gradients of h and weight out.
        moved=(
            rows * size * (hidden + dim) + size * dim * hidden,
            rows * size * (2 * hidden + dim) + (size + 4) * dim * hidden,
        ),
        flops=(flops, 2 * flops),
        bias=("h", "bias"),
    )


bench_gelu_linear = op.op_benchmark(make, SHAPES)
