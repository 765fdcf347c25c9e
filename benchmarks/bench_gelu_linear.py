"""Bias, exact GELU and product, the second half of the MLP: fastmae's one step against PyTorch's three."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from op_benchmark import CUDA, OpCase, op_benchmark

from fastmae.ops import gelu_linear

# (name, rows, F, D)
SHAPES = [("encoder-B", 8 * 50, 3072, 768), ("decoder", 8 * 197, 2048, 512)]
if CUDA:
    SHAPES = [
        ("encoder-L", 256 * 50, 4096, 1024),
        ("encoder-B", 256 * 50, 3072, 768),
        ("decoder", 256 * 197, 2048, 512),
    ]


def ours(h, bias, weight, out_bias):
    return gelu_linear(h, bias, weight, out_bias)


def plain(h, bias, weight, out_bias):
    return F.linear(F.gelu(h if bias is None else h + bias.to(h.dtype)), weight, out_bias)


def without_bias(h, bias, weight, out_bias):
    """In eager PyTorch the product that makes h adds the bias in passing."""
    return F.linear(F.gelu(h), weight, out_bias)


def make(shape: tuple, device: torch.device, dtype: torch.dtype) -> OpCase:
    name, rows, hidden, dim = shape
    inputs = {
        "h": torch.randn(1, rows, hidden, device=device, dtype=dtype),
        "bias": torch.randn(hidden, device=device),
        "weight": torch.randn(dim, hidden, device=device) * hidden**-0.5,
        "out_bias": torch.randn(dim, device=device),
    }
    for x in inputs.values():
        x.requires_grad_()
    size = dtype.itemsize
    return OpCase(
        "gelu_linear",
        name,
        inputs,
        {"fastmae": ours, "plain": without_bias, "plain-compile": plain},
        # Forward: h and weight in, the product out. Backward: h and a gradient in, the gradients of h and weight out.
        forward_bytes=rows * size * (hidden + dim) + size * dim * hidden,
        backward_bytes=rows * size * (2 * hidden + dim) + (size + 4) * dim * hidden,
        forward_flops=2 * rows * dim * hidden,
        backward_flops=4 * rows * dim * hidden,
        bias=("h", "bias"),
    )


bench_gelu_linear = op_benchmark(make, SHAPES)
