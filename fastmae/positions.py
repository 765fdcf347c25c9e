"""Where a patch is: fixed sine-cosine tables, for the grid that a model was made for and for others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions(dim: int, grid_size: tuple[int, int], base_grid: tuple[int, int] | None = None) -> Tensor:
    """Fixed sine-cosine table (1, 1 + L, dim), float32, rows in patch order behind a zero row for the class token.

    The first half of the channels encodes the column and the second half the row; inside each half the sines come
    first (He et al., appendix A.1, in the layout of the authors' code).

    Args:
        dim: width of the table.
        grid_size: rows and columns of patches.
        base_grid: rows and columns of the grid in whose coordinates positions are given; None for ``grid_size``. Both
            grids cover the same picture, so that the centre of patch ``i`` of ``n`` lies at
            ``(i + 1/2) * base / n - 1/2``: what is in one place of the picture has one code, however fine the grid.
            These are the coordinates of an image resize, and so of the bicubic resampling of position tables that is
            usual, which approximates what is computed here.

    Raises:
        ValueError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"embed_dim: two-dimensional sine-cosine positions need a multiple of 4, got {dim}")
    quarter = dim // 4
    frequency = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    sides = zip(grid_size, base_grid or grid_size, strict=True)
    rows, cols = torch.meshgrid(*(_coordinates(*side) for side in sides), indexing="ij")
    angles = torch.stack([cols, rows], dim=-1).reshape(-1, 2, 1) * frequency
    table = torch.cat([angles.sin(), angles.cos()], dim=-1).reshape(-1, dim)
    return F.pad(table, (0, 0, 1, 0))[None].float()


def _coordinates(count: int, base: int) -> Tensor:
    index = torch.arange(count, dtype=torch.float64)
    return index if count == base else (index + 0.5) * (base / count) - 0.5
