"""gather_tokens, forward and backward, against torch.gather with an expanded index."""

from __future__ import annotations

import pytest
import torch

from fastmae.ops.gather_tokens import gather_tokens

# (name, N, L, K, D)
SHAPES = (
    [("encoder-B", 256, 196, 49, 768), ("encoder-L", 256, 196, 49, 1024), ("decoder", 256, 197, 147, 512)]
    if torch.cuda.is_available()
    else [("encoder-small", 32, 64, 16, 128), ("decoder-small", 32, 65, 48, 64)]
)


def expanded(tokens, ids):
    return torch.gather(tokens, 1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


@pytest.mark.parametrize("how", ["fastmae", "torch", "torch.compile"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[0])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def bench_gather_tokens(benchmark, device, synchronized, shape, how, backward):
    name, n, length, k, dim = shape
    benchmark.group = f"gather_tokens {name} {'backward' if backward else 'forward'}"
    tokens = torch.randn(n, length, dim, device=device, dtype=torch.bfloat16, requires_grad=backward)
    ids = torch.rand(n, length, device=device).argsort(dim=1)[:, :k].sort(dim=1).values
    function = {"fastmae": gather_tokens, "torch": expanded, "torch.compile": torch.compile(expanded)}[how]
    out = function(tokens, ids)
    grad = torch.randn_like(out)

    def step():
        if backward:
            return torch.autograd.grad(out, tokens, grad, retain_graph=True)
        return function(tokens, ids)

    step()
    written = length if backward else k
    benchmark.extra_info |= {"how": how, "useful_bytes": 2 * n * dim * (k + written)}
    benchmark(synchronized(step))
