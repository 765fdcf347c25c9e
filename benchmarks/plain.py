"""What the ops replace, as facebookresearch/mae and timm write it in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmae.reference import patchify

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pick(x: Tensor, ids: Tensor) -> Tensor:
    """Rows ids (N, K) of x (N, L, D)."""
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1]))


def normalised_patches(images: Tensor, patch_size: int, mean: Tensor, std: Tensor) -> Tensor:
    """All patches of a batch, through a float image if it comes as bytes."""
    if images.dtype == torch.uint8:
        images = (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    return patchify(images, (patch_size, patch_size))


def random_masking(n: int, length: int, keep: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids_keep, ids_mask, ids_restore and mask by two sorts."""
    shuffle = torch.rand(n, length, device=device).argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    mask = torch.ones(n, length, device=device)
    mask[:, :keep] = 0
    return shuffle[:, :keep], shuffle[:, keep:], restore, mask.gather(1, restore)


def restore_tokens(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor) -> Tensor:
    """Repeat, cat, gather, cat, add; the first token is the class token."""
    n, rows, _ = visible.shape
    missing = mask_token.repeat(n, ids_restore.shape[1] + 1 - rows, 1)
    x = pick(torch.cat([visible[:, 1:], missing], dim=1), ids_restore)
    return torch.cat([visible[:, :1], x], dim=1) + pos_embed


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """(N, L): the mean over each patch, targets normalised by patch."""
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    return (pred.float() - target).square().mean(-1)


def batch_of_images(n: int, side: int, device: torch.device) -> Tensor:
    """Raw bytes, channels last in memory, as decoders deliver them."""
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)


def choose(n: int, length: int, count: int, device: torch.device) -> Tensor:
    """Ascending ids (N, count), different for every image."""
    return torch.rand(n, length, device=device).argsort(1)[:, :count].sort(1).values


def statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)


def under_autocast(call: Callable[[], object], device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """The call with autocast around it (none for float32); weights are cast anew in each, as in a training step."""

    def run():
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return call()

    return run
