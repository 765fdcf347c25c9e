"""restore_tokens, forward and backward, against cat, gather, cat, add."""

from __future__ import annotations

import plain
import pytest
import torch
from comparison import Comparison, compiled, gradient

from fastmae.ops import restore_tokens

# (name, N, L, K, E): the decoder's input for ViT-B and ViT-L at 224 pixels, ViT-H at patch 14.
SHAPES = (
    [("patch16", 256, 196, 49, 512), ("patch14", 128, 256, 64, 512)]
    if torch.cuda.is_available()
    else [("patch16", 32, 196, 49, 512)]
)


def build(shape: tuple, backward: bool, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Comparison:
    name, n, length, k, dim = shape
    visible = torch.randn(n, k + 1, dim, device=device, dtype=dtype, requires_grad=backward)
    mask_token = torch.randn(1, 1, dim, device=device, requires_grad=backward)
    pos_embed = torch.randn(1, length + 1, dim, device=device)
    ids_restore = plain.choose(n, length, length, device)[:, torch.randperm(length, device=device)]
    compiled_form = compiled(plain.restore_tokens)
    competitors = {
        "fastmae": lambda: restore_tokens(visible, mask_token, ids_restore, pos_embed, num_prefix_tokens=1),
        "plain": lambda: plain.restore_tokens(visible, mask_token, ids_restore, pos_embed),
        "plain-compile": lambda: compiled_form(visible, mask_token, ids_restore, pos_embed),
    }
    if backward:
        competitors = {name: gradient(call, [visible, mask_token]) for name, call in competitors.items()}
    # Visible tokens in the dtype and their gradient, float32 result and its gradient; tables once.
    tables = 4 * dim * (1 if backward else length + 2)
    return Comparison(
        f"restore_tokens, {name} {'backward' if backward else 'forward'}", competitors,
        useful_bytes=tables + n * (8 * length + dim * (dtype.itemsize * (k + 1) + 4 * (length + 1))),
        flops=n * (length + 1) * dim, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("competitor", ["fastmae", "plain", "plain-compile"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[0])
def bench_restore_tokens(compete, device, dtype, shape, backward, competitor):
    compete(build, shape, backward, device, dtype)
