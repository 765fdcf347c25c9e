"""gather_tokens against torch.gather with an expanded index."""

from __future__ import annotations

import op_benchmark as op
import torch

from fastmae.ops import gather_tokens

# (name, N, L, K, D)
SHAPES = [("encoder-B", 32, 196, 49, 768), ("decoder", 32, 197, 147, 512)]
if op.CUDA:
    SHAPES = [("encoder-L", 256, 196, 49, 1024), ("decoder", 256, 197, 147, 512)]


def make(shape: tuple, device: torch.device, dtype: torch.dtype) -> op.OpCase:
    name, n, length, k, dim = shape
    tokens = torch.randn(n, length, dim, device=device, dtype=dtype, requires_grad=True)
    ours = lambda x, ids: gather_tokens(x, ids)  # noqa: E731
    return op.OpCase(
        "gather_tokens",
        name,
        {"x": tokens, "ids": op.choose(n, length, k, device)},
        {"fastmae": ours, "plain": op.pick, "plain-compile": op.pick},
        moved=(n * (8 * k + dtype.itemsize * dim * 2 * k), n * (8 * k + dtype.itemsize * dim * (k + length))),
    )


bench_gather_tokens = op.op_benchmark(make, SHAPES)
