"""Two Transformer blocks, forward and backward, under autocast: fastmae's against the reference's and variants of it.

``plain``         the reference: attention written out, eager
``sdpa``          with scaled_dot_product_attention, as in today's timm
``sdpa-compile``  the same through torch.compile
``apex``          ``sdpa`` with the LayerNorm of NVIDIA's apex
``fastmae-xformers`` fastmae's blocks with xformers' attention
"""

from __future__ import annotations

import apex_layer_norm
import plain
import pytest
import torch
from comparison import Comparison, Unavailable, compiled
from levers import SDPAttention, with_attention
from torch import nn

from fastmae import reference
from fastmae.model.blocks import Block, run_blocks
from fastmae.ops import _xformers

DEPTH = 2
# (name, N, L, D, heads)
SHAPES = (
    [("encoder-L", 256, 50, 1024, 16), ("encoder-B", 256, 50, 768, 12), ("decoder", 256, 197, 512, 16)]
    if torch.cuda.is_available()
    else [("encoder-B", 8, 50, 768, 12), ("decoder", 8, 197, 512, 16)]
)
COMPETITORS = ["fastmae", "fastmae-compile", "fastmae-xformers", "plain", "sdpa", "sdpa-compile", "apex"]


def build(shape: tuple, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Comparison:
    name, n, length, dim, heads = shape
    x = torch.randn(n, length, dim, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    shared = nn.ModuleList(reference.Block(dim, heads, 4.0) for _ in range(DEPTH)).to(device)
    parameters = list(shared.parameters())

    def on_shared(make) -> nn.ModuleList:
        with torch.device("meta"):
            blocks = nn.ModuleList(make() for _ in range(DEPTH))
        blocks.load_state_dict(shared.state_dict(keep_vars=True), assign=True)
        return blocks

    def plain_blocks(attention=None, norm=None):
        blocks = on_shared(lambda: reference.Block(dim, heads, 4.0))
        if attention:
            with_attention(blocks, attention)
        for block in blocks if norm else ():
            for name, old in (("norm1", block.norm1), ("norm2", block.norm2)):
                new = norm(dim, eps=old.eps)
                new.weight, new.bias = old.weight, old.bias
                setattr(block, name, new)
        return lambda: nn.Sequential(*blocks)(x)

    def fast_blocks(backend):
        blocks = on_shared(lambda: Block(dim, heads, 4.0, backend))
        return lambda: run_blocks(blocks, x)

    def passes(forward):
        forward = plain.under_autocast(forward, device, dtype)
        return lambda: torch.autograd.grad(forward(), [x, *parameters], grad)

    def without_xformers() -> str | None:
        try:
            return _xformers.require(device)
        except ValueError as error:
            return str(error)

    no_apex, no_xformers = apex_layer_norm.missing(device), without_xformers()
    competitors = {
        "fastmae": passes(fast_blocks("auto")),
        "fastmae-compile": passes(compiled(fast_blocks("auto"))),
        "fastmae-xformers": Unavailable(no_xformers) if no_xformers else passes(fast_blocks("xformers")),
        "plain": passes(plain_blocks()),
        "sdpa": passes(plain_blocks(SDPAttention)),
        "sdpa-compile": passes(compiled(plain_blocks(SDPAttention))),
        "apex": Unavailable(no_apex) if no_apex else passes(plain_blocks(SDPAttention, apex_layer_norm.LayerNorm)),
    }
    # Four products of 12 D * D weights in all and two of attention, a multiply and an add each; twice that backward.
    flops = 3 * DEPTH * n * length * (2 * 12 * dim * dim + 2 * 2 * length * dim)
    return Comparison(f"block, {name}, {DEPTH} in a row", competitors, flops=flops, dtype=dtype)


@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def bench_block(compete, device, dtype, shape, competitor):
    compete(build, shape, device, dtype)
