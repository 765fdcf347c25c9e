"""restore_tokens against repeat, cat, gather, cat, add."""

from __future__ import annotations

import op_benchmark as op
import torch
from torch import Tensor

from fastmae.ops import restore_tokens

# (name, N, L, K, E): the decoder's input for ViT-B and ViT-L at 224 pixels, ViT-H at patch 14.
SHAPES = [("patch16", 32, 196, 49, 512)]
if op.CUDA:
    SHAPES = [("patch16", 256, 196, 49, 512), ("patch14", 128, 256, 64, 512)]


def plain(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor) -> Tensor:
    """The first token is the class token."""
    n, rows, _ = visible.shape
    missing = mask_token.repeat(n, ids_restore.shape[1] + 1 - rows, 1)
    x = op.pick(torch.cat([visible[:, 1:], missing], dim=1), ids_restore)
    return torch.cat([visible[:, :1], x], dim=1) + pos_embed


def ours(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor) -> Tensor:
    return restore_tokens(visible, mask_token, ids_restore, pos_embed, num_prefix_tokens=1)


def make(shape: tuple, device: torch.device, dtype: torch.dtype) -> op.OpCase:
    name, n, length, k, dim = shape
    inputs = {
        "visible": torch.randn(n, k + 1, dim, device=device, dtype=dtype, requires_grad=True),
        "mask_token": torch.randn(1, 1, dim, device=device, requires_grad=True),
        "ids_restore": torch.rand(n, length, device=device).argsort(1),
        "pos_embed": torch.randn(1, length + 1, dim, device=device),
    }
    # Visible tokens in the dtype, the result in float32, or the gradients of both; tables once.
    moved = n * (8 * length + dim * (dtype.itemsize * (k + 1) + 4 * (length + 1)))
    flops = n * (length + 1) * dim
    return op.OpCase(
        "restore_tokens",
        name,
        inputs,
        {"fastmae": ours, "plain": plain, "plain-compile": plain},
        moved=(moved + 4 * dim * (length + 2), moved + 4 * dim),
        flops=(flops, flops),
    )


bench_restore_tokens = op.op_benchmark(make, SHAPES)
