"""What the patch ops share on the host: checks, the affine of byte images, launch shapes, and patches in plain PyTorch.

A patch is a flat vector of P = ph * pw * C values in the order of facebookresearch/mae's ``patchify``: row, column,
channel, the channel innermost. Patches of an image are numbered row by row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmae.ops._check import check, check_ids, grid_of

MAX_TRITON_PIXELS = 16384
"""Largest P that a kernel holds in registers; longer patches take the plain path."""


def check_images(images: Tensor, ids_name: str, ids: Tensor, patch_size: tuple[int, int]) -> None:
    """Images (N, C, H, W), uint8 or floating, that divide into patches; ids int64 (N * R, K) on their device."""
    expected = "a uint8 or floating point tensor of shape (N, C, H, W)"
    check(isinstance(images, Tensor), "images", expected, images)
    check(images.dtype == torch.uint8 or images.is_floating_point(), "images", expected, images)
    check(images.ndim == 4 and images.shape[0] > 0 and images.shape[1] > 0, "images", expected, images)
    grid_of((images.shape[2], images.shape[3]), patch_size)
    check_ids(ids_name, ids, images.shape[0], repeats=True)
    check(ids.device == images.device, ids_name, f"a tensor on the images' device, {images.device}", ids)


def check_id_values(name: str, ids: Tensor, num_patches: int) -> None:
    """On the CPU, where it costs nothing to look: every id in [0, L). On CUDA it would synchronise."""
    if ids.device.type == "cpu":
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or high >= num_patches:
            raise ValueError(f"{name}: expected values in [0, {num_patches}), got values from {low} to {high}")


def check_statistics(
    images: Tensor, mean: Tensor | None, std: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Mean and std that apply to the images: fp32 (C,), contiguous; None for floating point, and where both are."""
    if mean is None and std is None:
        return None, None
    channels = images.shape[1]
    expected = f"a float32 tensor of shape ({channels},) on {images.device}, mean and std together"
    for name, value in (("mean", mean), ("std", std)):
        check(isinstance(value, Tensor), name, expected, value)
        check(value.dtype == torch.float32 and value.shape == (channels,), name, expected, value)
        check(value.device == images.device, name, expected, value)
    if images.dtype != torch.uint8:
        return None, None
    return mean.detach().contiguous(), std.detach().contiguous()


def launch_options(images: Tensor, patch_size: tuple[int, int], values: int) -> dict[str, int | bool]:
    """What a patch kernel is compiled for: the patch, its layout, and a tile of about ``values`` values a thread.

    A program takes ROWS patches of BLOCK_P values, a power of two.
    """
    c, (ph, pw) = images.shape[1], patch_size
    block = max(16, 1 << (ph * pw * c - 1).bit_length())
    options = {
        "C": c,
        "PH": ph,
        "PW": pw,
        "INNER": is_channels_last(images),
        "ROWS": max(1, 128 * values // block),
        "BLOCK_P": block,
        "num_warps": min(16, max(4, block // (32 * values))),
    }
    # Left alone, ptxas now and then spills a register to reach an occupancy that a memory-bound kernel has no use for.
    return options if torch.version.hip else {**options, "maxnreg": 128}


def is_channels_last(images: Tensor) -> bool:
    """Whether a patch's row of pw * C values is contiguous."""
    return images.stride(3) == images.shape[1] and (images.shape[1] == 1 or images.stride(1) == 1)


def chunks(images: Tensor, ids: Tensor, patch_size: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Ranges of images, and of their rows of ids, for the plain path: on the CPU as many images as give about 1 MiB of
    float32 patches, elsewhere all.

    Temporaries then stay in the cache, and the allocator hands out the same pages again; fetching fresh ones for
    temporaries of a whole batch can cost ten times the arithmetic.
    """
    n = images.shape[0]
    repeats = ids.shape[0] // n
    values = repeats * ids.shape[1] * patch_size[0] * patch_size[1] * images.shape[1]
    size = max(1, (1 << 18) // values) if images.device.type == "cpu" else n
    starts = range(0, n, size)
    return ((slice(i, i + size), slice(i * repeats, (i + size) * repeats)) for i in starts)


def gather_plain(images: Tensor, ids: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Patches (N * R, K, P) in plain PyTorch, in the images' dtype.

    Rows of patches are rows of a matrix that ``index_select`` copies whole: several times faster on the CPU than
    indexing an image element by element, and nothing but the wanted patches moves.
    """
    (n, c, h, w), (ph, pw), shape = images.shape, patch_size, ids.shape
    grid_w, ids = w // pw, ids.reshape(n, -1)
    first = (ids // grid_w) * (ph * grid_w) + ids % grid_w
    row = torch.arange(ph, device=ids.device) * grid_w
    image = torch.arange(n, device=ids.device) * (h * grid_w)
    if is_channels_last(images):
        index = (first + image[:, None])[..., None] + row
        rows = images.permute(0, 2, 3, 1).reshape(-1, pw * c)
        return rows.index_select(0, index.flatten()).view(*shape, ph * pw * c)
    plane = torch.arange(c, device=ids.device)[:, None] * (h * grid_w)
    index = (first + image[:, None] * c)[..., None, None] + (plane + row)
    rows = images.reshape(-1, pw).index_select(0, index.flatten())
    return rows.view(*shape, c, ph * pw).transpose(2, 3).reshape(*shape, ph * pw * c)


def add_rows(matrix: Tensor, index: Tensor, rows: Tensor) -> None:
    """``matrix[index[i]] += rows[i]`` in ascending i, in place; repeats add up."""
    if matrix.is_cuda:
        # Sorts; index_add_ adds by atomics, in any order.
        matrix.index_put_((index,), rows, accumulate=True)
    else:
        matrix.index_add_(0, index, rows)


def affine_plain(
    mean: Tensor | None, std: Tensor | None, patch_size: tuple[int, int]
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Scale and shift of a patch, fp32 (P,): PyTorch broadcasts best over long rows."""
    if mean is None:
        return None, None
    scale, pixels = torch.reciprocal(std * 255.0), patch_size[0] * patch_size[1]
    return scale.repeat(pixels), (mean * scale * -255.0).repeat(pixels)


def normalise_plain(patches: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Bytes to fp32, by the affine or to [0, 1]; floating point as it is."""
    if patches.dtype != torch.uint8:
        return patches
    if scale is None:
        return patches.float().mul_(1.0 / 255.0)
    patches = patches.float()
    return torch.addcmul(shift, patches, scale, out=patches)
