"""restore_tokens, forward and backward, against cat, gather, cat, add."""

from __future__ import annotations

import pytest
import torch

from fastmae.ops.restore_tokens import restore_tokens

# (name, N, L, K, E): the decoder's input for ViT-B and ViT-L at 224 pixels, ViT-H at patch 14.
SHAPES = (
    [("patch16", 256, 196, 49, 512), ("patch14", 256, 256, 64, 512)]
    if torch.cuda.is_available()
    else [("small", 32, 64, 16, 64), ("patch16", 8, 196, 49, 512)]
)


def facebookresearch(visible, mask_token, ids_restore, pos_embed):
    """The expression of facebookresearch/mae."""
    n, rows, dim = visible.shape
    missing = mask_token.repeat(n, ids_restore.shape[1] + 1 - rows, 1)
    x = torch.cat([visible[:, 1:], missing], dim=1)
    x = torch.gather(x, 1, ids_restore[..., None].expand(-1, -1, dim))
    return torch.cat([visible[:, :1], x], dim=1) + pos_embed


def fused(visible, mask_token, ids_restore, pos_embed):
    return restore_tokens(visible, mask_token, ids_restore, pos_embed, num_prefix_tokens=1)


@pytest.mark.parametrize("how", ["fastmae", "torch", "torch.compile"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[0])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def bench_restore_tokens(benchmark, device, synchronized, shape, how, backward):
    name, n, length, k, dim = shape
    benchmark.group = f"restore_tokens {name} {'backward' if backward else 'forward'}"
    visible = torch.randn(n, k + 1, dim, device=device, dtype=torch.bfloat16, requires_grad=backward)
    mask_token = torch.randn(1, 1, dim, device=device, requires_grad=backward)
    pos_embed = torch.randn(1, length + 1, dim, device=device)
    ids_restore = torch.rand(n, length, device=device).argsort(dim=1)
    function = {"fastmae": fused, "torch": facebookresearch, "torch.compile": torch.compile(facebookresearch)}[how]
    out = function(visible, mask_token, ids_restore, pos_embed)
    grad = torch.randn_like(out)

    def step():
        if backward:
            return torch.autograd.grad(out, (visible, mask_token), grad, retain_graph=True)
        return function(visible, mask_token, ids_restore, pos_embed)

    step()
    # bfloat16 visible tokens, float32 result and gradient.
    useful = n * dim * (2 * (k + 1) + 4 * (length + 1))
    benchmark.extra_info |= {"how": how, "useful_bytes": useful}
    benchmark(synchronized(step))
