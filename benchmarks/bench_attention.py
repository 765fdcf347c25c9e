"""Attention at the lengths of a masked autoencoder: each backend, forward and backward."""

from __future__ import annotations

import pytest
import torch

from fastmae.ops import _xformers, attention_qkvpacked

CUDA = torch.cuda.is_available()
# (name, N, L, H, Dh): encoder and decoder of ViT-B and ViT-L at 224 pixels, a quarter visible.
SHAPES = (
    [("encoder-B", 256, 50, 12, 64), ("encoder-L", 256, 50, 16, 64), ("decoder", 256, 197, 16, 32)]
    if CUDA
    else [("encoder-small", 32, 17, 4, 32), ("decoder-small", 32, 65, 2, 32)]
)
BACKENDS = ["plain", "sdpa", "xformers"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def bench_attention(benchmark, device, synchronized, shape, backend):
    name, n, length, heads, dim = shape
    benchmark.group = f"attention {name} forward+backward"
    qkv = torch.randn(n, length, 3, heads, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(n, length, heads, dim, device=device, dtype=torch.bfloat16)
    if backend == "xformers":
        # Only what is not there is left out: a backend that is there and fails must be seen to fail.
        try:
            _xformers.require(device)
        except ValueError as error:
            pytest.skip(str(error))

    def step():
        qkv.grad = None
        attention_qkvpacked(qkv, backend).backward(grad)

    benchmark.extra_info["backend"] = backend
    benchmark(synchronized(step))
