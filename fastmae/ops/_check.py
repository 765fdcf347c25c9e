"""Argument checks that the ops share: ``ValueError`` that names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def describe(value: object) -> str:
    """A tensor as dtype, shape and device; anything else as its repr."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return repr(value)


def check(condition: bool, name: str, expected: str | Callable[[], str], value: object) -> None:
    """Raise ``ValueError`` unless the condition holds.

    A text with sizes in it is given as a function, which is called on failure only: under torch.compile a size in a
    string becomes a constant of the graph.
    """
    if not condition:
        expected = expected if isinstance(expected, str) else expected()
        raise ValueError(f"{name}: expected {expected}, got {describe(value)}")


def check_ids(name: str, ids: Tensor, batch: int, *, repeats: bool = False) -> None:
    """An index tensor: int64 (N, K) with K >= 1, or (N * R, K) with R >= 1 where an image may have R rows.

    Values are not read, which would synchronise a GPU.
    """
    valid = isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.ndim == 2
    if valid and ids.shape[1] > 0:
        rows = ids.shape[0]
        if rows == batch or (repeats and rows > 0 and rows % batch == 0):
            return
    several = f", or (R * {batch}, K) for R rows an image" if repeats else ""
    check(False, name, f"an int64 tensor of shape ({batch}, K), K >= 1{several}", ids)


def check_floating(name: str, tensor: Tensor, expected: str | Callable[[], str]) -> None:
    """A float32, float64, float16 or bfloat16 tensor."""
    check(isinstance(tensor, Tensor) and tensor.is_floating_point(), name, expected, tensor)


def as_pair(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    """A size as (height, width); an int means a square."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    valid = len(pair) == 2 and all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in pair)
    check(valid, name, "a positive int or a pair (height, width) of positive ints", size)
    return pair


def grid_of(image_size: tuple[int, int], patch_size: tuple[int, int], name: str = "images") -> tuple[int, int]:
    """Rows and columns of patches; the image must divide into them."""
    (height, width), (ph, pw) = image_size, patch_size
    if height % ph or width % pw or height < ph or width < pw:
        raise ValueError(f"{name}: size {height}x{width} does not divide into patches of {ph}x{pw}")
    return height // ph, width // pw


def num_kept(num_patches: int, mask_ratio: float | None, num_keep: int | None = None) -> int:
    """``K = int(L * (1 - mask_ratio))``, float rounding included, as facebookresearch/mae computes it; or ``num_keep``,
    where the ratio is None."""
    if num_keep is not None:
        check(mask_ratio is None, "mask_ratio", "None when num_keep is given", mask_ratio)
        valid = isinstance(num_keep, int) and not isinstance(num_keep, bool) and 0 < num_keep < num_patches
        check(valid, "num_keep", f"an int from 1 to {num_patches - 1}", num_keep)
        return num_keep
    valid = isinstance(mask_ratio, int | float) and 0 < mask_ratio < 1
    check(valid, "mask_ratio", "a number strictly between 0 and 1", mask_ratio)
    kept = int(num_patches * (1 - mask_ratio))
    if not 0 < kept < num_patches:
        raise ValueError(
            f"mask_ratio: {mask_ratio} of {num_patches} patches keeps {kept}; at least one patch must stay visible "
            "and one masked"
        )
    return kept
