"""The masks of ``random_masking`` in plain PyTorch: the same bits as the kernels, and where there is no Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmae.ops.philox import Stream, random_words

MAX_BLOCKS = 4096
"""Rectangles after which what is left to mask is masked row by row; the number of ``kernels/masking.py``."""


class RowKeys(NamedTuple):
    """What the random words of each row of a result hang on.

    Attributes:
        seed: of all rows.
        epochs, sample_ids, draws: int64 (rows,).
    """

    seed: int
    epochs: Tensor
    sample_ids: Tensor
    draws: Tensor

    def words(self, num_words: int) -> Tensor:
        """int64 (rows, num_words), values in [0, 2**32)."""
        return random_words(self.seed, self.epochs, self.sample_ids, Stream.MASK, num_words, self.draws)

    def take(self, rows: Tensor) -> RowKeys:
        """The keys of some rows."""
        return RowKeys(self.seed, self.epochs[rows], self.sample_ids[rows], self.draws[rows])


def keys_of_rows(
    n: int,
    seed: int,
    epoch: int,
    epochs: Tensor | None,
    sample_ids: Tensor | None,
    draw: int,
    masks_per_image: int,
    device: torch.device,
) -> RowKeys:
    """The keys of N * R rows, the R draws of a sample adjacent."""
    if sample_ids is None:
        sample_ids = torch.arange(n, device=device)
    if epochs is None:
        epochs = torch.full((n,), epoch, dtype=torch.int64, device=device)
    draws = torch.arange(draw, draw + masks_per_image, device=device).repeat(n)
    return RowKeys(
        seed, epochs.repeat_interleave(masks_per_image), sample_ids.repeat_interleave(masks_per_image), draws
    )


def draw_masks(
    keys: RowKeys, num_patches: int, num_kept: int, strategy: str, grid_h: int, grid_w: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids_keep, ids_mask, ids_restore and mask of each row."""
    if strategy == "random":
        keep = _random(keys, num_patches, num_kept)
    elif strategy == "block":
        keep = ~_block(keys, num_patches - num_kept, grid_h, grid_w)
    else:
        corner = keys.words(1) >> 30
        keep = _grid(corner * (strategy == "grid"), num_patches, grid_w)
    index = torch.arange(num_patches, device=keep.device)
    position = keep.cumsum(1)
    ids_restore = torch.where(keep, position - 1, num_kept + index - position)
    order = invert(ids_restore)
    mask = torch.where(keep, 0.0, 1.0)
    # Copies: of one row, a contiguous slice would be a view, which an op may not return twice.
    return order[:, :num_kept].clone(), order[:, num_kept:].clone(), ids_restore, mask


def _random(keys: RowKeys, num_patches: int, num_kept: int) -> Tensor:
    index = torch.arange(num_patches, device=keys.draws.device)
    # The patch index below the 32-bit word makes keys unique, so that one threshold a row settles ties as well.
    words = (keys.words(num_patches) << 31) | index
    return words <= words.sort(dim=1).values[:, num_kept - 1 : num_kept]


def _grid(corner: Tensor, num_patches: int, grid_w: int) -> Tensor:
    index = torch.arange(num_patches, device=corner.device)
    return (index // grid_w % 2 == corner // 2) & (index % grid_w % 2 == corner % 2)


def min_block_area(num_patches: int) -> int:
    """16 patches, as BEiT has on its grid of 14 x 14; a twelfth of smaller grids."""
    return min(16, max(1, num_patches // 12))


def _block(keys: RowKeys, num_masked: int, grid_h: int, grid_w: int) -> Tensor:
    """bool (rows, L), True for masked."""
    rows, device = len(keys.draws), keys.draws.device
    row, column = torch.arange(grid_h, device=device)[:, None], torch.arange(grid_w, device=device)
    masked = torch.zeros(rows, grid_h, grid_w, dtype=torch.bool, device=device)
    active, words, count = torch.arange(rows, device=device), keys.words(4 * 32), 0
    while len(active):
        if count == words.shape[1] // 4:
            words = keys.take(active).words(8 * count)
        remaining = num_masked - masked[active].sum((1, 2))
        if count < MAX_BLOCKS:
            top, left, h, w = _draw_block(words[:, 4 * count : 4 * count + 4], remaining, grid_h, grid_w)
        else:
            top = left = torch.zeros_like(remaining)
            h, w = torch.full_like(remaining, grid_h), torch.full_like(remaining, grid_w)
        top, left, h, w = (size[:, None, None] for size in (top, left, h, w))
        inside = (row >= top) & (row < top + h) & (column >= left) & (column < left + w)
        new = (inside & ~masked[active]).flatten(1)
        # All of them, or of the last rectangle the first ones: no rank reaches what is left unless it is the last.
        new &= new.cumsum(1) <= remaining[:, None]
        masked[active] |= new.view_as(inside)
        unfinished = new.sum(1) < remaining
        active, words, count = active[unfinished], words[unfinished], count + 1
    return masked.flatten(1)


def _draw_block(words: Tensor, remaining: Tensor, grid_h: int, grid_w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width of the next rectangle of each row, int64 (rows,), from its four words.

    Every floating point operation is one that IEEE 754 rounds exactly, so that all devices agree.
    """
    smallest = min_block_area(grid_h * grid_w)
    area = smallest + _below(words[:, 0], (remaining - smallest).clamp(min=0) + 1)
    area = area.to(torch.float32)
    # 0.3 times a power of (1 / 0.09) ** (1 / 255), from 0 to 255: no logarithm, whose last bit hangs on the device.
    aspect, growth, power = torch.full_like(area, 0.3), torch.full_like(area, 1.00948765), words[:, 1] >> 24
    for _ in range(8):
        aspect = torch.where(power & 1 == 1, aspect * growth, aspect)
        growth, power = growth * growth, power >> 1
    h = ((area * aspect).sqrt() + 0.5).long().clamp(1, grid_h)
    w = ((area / aspect).sqrt() + 0.5).long().clamp(1, grid_w)
    return _below(words[:, 2], grid_h - h + 1), _below(words[:, 3], grid_w - w + 1), h, w


def _below(words: Tensor, n: Tensor) -> Tensor:
    """32-bit words as integers in [0, n)."""
    return (words * n) >> 32


def invert(permutation: Tensor) -> Tensor:
    """The inverse of each row's permutation, by a scatter instead of a second sort."""
    index = torch.arange(permutation.shape[1], device=permutation.device).expand_as(permutation)
    return torch.empty_like(permutation).scatter_(1, permutation, index)
