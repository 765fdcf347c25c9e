"""Two Transformer blocks, forward and backward, under autocast: fastmae's against the reference's and variants of it.

``plain``         the reference: attention written out, eager
``sdpa``          with scaled_dot_product_attention, as in today's timm
``sdpa-compile``  the same through torch.compile
``apex``          ``sdpa`` with the LayerNorm of NVIDIA's apex
``fastmae-xformers`` fastmae's blocks with xformers' attention
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from bench_attention import missing
from benchmark import Benchmark, Unavailable
from facebook import SDPAttention, with_attention
from op_benchmark import CUDA, apex_layer_norm, compiled, under_autocast
from torch import nn

from fastmae import reference
from fastmae.model.blocks import Block, run_blocks

DEPTH = 2
# (name, N, L, D, heads)
SHAPES = [("encoder-B", 8, 50, 768, 12), ("decoder", 8, 197, 512, 16)]
if CUDA:
    SHAPES = [("encoder-L", 256, 50, 1024, 16), ("encoder-B", 256, 50, 768, 12), ("decoder", 256, 197, 512, 16)]
COMPETITORS = ["fastmae", "fastmae-compile", "fastmae-xformers", "plain", "sdpa", "sdpa-compile", "apex"]


def build(shape: tuple, device: torch.device, dtype: torch.dtype) -> Benchmark:
    name, n, length, dim, heads = shape
    x = torch.randn(n, length, dim, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    shared = nn.ModuleList(reference.Block(dim, heads, 4.0) for _ in range(DEPTH)).to(device)
    parameters = list(shared.parameters())

    def on_shared(make) -> nn.ModuleList:
        with torch.device("meta"):
            blocks = nn.ModuleList(make(dim, heads, 4.0) for _ in range(DEPTH))
        blocks.load_state_dict(shared.state_dict(keep_vars=True), assign=True)
        return blocks

    def plain(attention=reference.Attention, layer_norm=None):
        blocks = on_shared(reference.Block)
        with_attention(blocks, attention)
        for norm in (norm for block in blocks for norm in (block.norm1, block.norm2) if layer_norm):
            norm.forward = lambda x, norm=norm: layer_norm(x, norm.weight, norm.bias)
        return lambda: nn.Sequential(*blocks)(x)

    def ours(backend="auto"):
        blocks = on_shared(partial(Block, backend=backend))
        return lambda: run_blocks(blocks, x)

    def step(forward):
        forward = under_autocast(forward, device, dtype)
        return lambda: torch.autograd.grad(forward(), [x, *parameters], grad)

    apex, no_xformers = apex_layer_norm(device), missing("xformers", device, dtype, length, dim // heads)
    calls = {
        "fastmae": step(ours()),
        "fastmae-compile": step(compiled(ours())),
        "fastmae-xformers": Unavailable(no_xformers) if no_xformers else step(ours("xformers")),
        "plain": step(plain()),
        "sdpa": step(plain(SDPAttention)),
        "sdpa-compile": step(compiled(plain(SDPAttention))),
        "apex": apex if isinstance(apex, Unavailable) else step(plain(SDPAttention, apex)),
    }
    # Four products of 12 D * D weights in all and two of attention, a multiply and an add each; twice that backward.
    flops = 3 * DEPTH * n * length * (2 * 12 * dim * dim + 2 * 2 * length * dim)
    return Benchmark(f"block, {name}, {DEPTH} in a row", calls, flops=flops, dtype=dtype)


@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def bench_block(compete, device, dtype, shape, competitor):
    compete(build, shape, device, dtype)
