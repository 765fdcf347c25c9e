"""gather_tokens against torch.gather with an expanded index."""

from __future__ import annotations

import torch
from op_benchmark import CUDA, OpCase, choose, op_benchmark, pick

from fastmae.ops import gather_tokens

# (name, N, L, K, D)
SHAPES = [("encoder-B", 32, 196, 49, 768), ("decoder", 32, 197, 147, 512)]
if CUDA:
    SHAPES = [("encoder-L", 256, 196, 49, 1024), ("decoder", 256, 197, 147, 512)]


def make(shape: tuple, device: torch.device, dtype: torch.dtype) -> OpCase:
    name, n, length, k, dim = shape
    tokens = torch.randn(n, length, dim, device=device, dtype=dtype, requires_grad=True)
    return OpCase(
        "gather_tokens",
        name,
        {"x": tokens, "ids": choose(n, length, k, device)},
        {"fastmae": lambda x, ids: gather_tokens(x, ids), "plain": pick, "plain-compile": pick},
        forward_bytes=n * (8 * k + dtype.itemsize * dim * 2 * k),
        backward_bytes=n * (8 * k + dtype.itemsize * dim * (k + length)),
    )


bench_gather_tokens = op_benchmark(make, SHAPES)
