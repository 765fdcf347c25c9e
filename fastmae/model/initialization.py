"""Initial values of parameters: random weights, keyed by seed and name, and sine-cosine position tables."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int) -> None:
    """The paper's initialisation (appendix A.1): :func:`draw_parameter` for every trained parameter.

    Skips frozen parameters (position tables) and those on the meta device.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_meta:
            parameter.copy_(draw_parameter(name, parameter.shape, seed))


def draw_parameter(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The initial value of a parameter, float32 on the CPU.

    Matrices (the patch projection flattened to one) are Xavier-uniform, biases zero, LayerNorm scales one, tokens
    normal with standard deviation 0.02. This is facebookresearch/mae's initialisation with one difference: its
    initialiser visits linear layers only and so leaves the patch projection's bias at ``nn.Conv2d``'s default, uniform
    within 1 / sqrt(P). Here it is zero, as in ViT's official code, which the paper follows.

    The generator is keyed by ``(seed, name)``, so a value does not depend on the order of construction, the device or
    the process that draws it.
    """
    value = torch.empty(shape, device="cpu")
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if name.endswith("token"):
        return value.normal_(std=0.02, generator=generator)
    if value.ndim > 1:
        nn.init.xavier_uniform_(value.flatten(1), generator=generator)
        return value
    return value.fill_(1.0 if "norm" in name.split(".")[-2] and name.endswith("weight") else 0.0)


def sincos_positions(dim: int, grid_size: tuple[int, int], base_grid: tuple[int, int] | None = None) -> Tensor:
    """Fixed sine-cosine table (1, 1 + L, dim), float32: a zero row for the class token, then patches row by row.

    The first half of the channels encodes the column, the second half the row; within each half sines come first (He
    et al., appendix A.1, in the layout of the authors' code).

    Args:
        dim: width of the table.
        grid_size: rows and columns of patches.
        base_grid: the grid in whose coordinates positions are expressed; None for ``grid_size``. Both grids cover the
            same picture, so the centre of patch ``i`` of ``n`` lies at ``(i + 1/2) * base / n - 1/2``, and a place in
            the picture has one code however fine the grid. These are the coordinates of an image resize: the usual
            bicubic resampling of position tables approximates what is computed here exactly.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
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
