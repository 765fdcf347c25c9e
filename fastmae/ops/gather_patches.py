"""Gather some patches of images, normalised on the way: the encoder's input, without a float image in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmae.ops import patches
from fastmae.ops._check import as_pair, check
from fastmae.ops._dispatch import load_kernels, takes_triton

_kernels = load_kernels("gather_patches")


def gather_patches(
    images: Tensor,
    ids: Tensor,
    patch_size: int | Sequence[int],
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The patches of each image that ``ids`` names, in the order of ``ids``.

    Equal to ``patchify(images)`` of facebookresearch/mae followed by a gather, but reads only those patches.
    Channels-last memory (a permuted NHWC buffer) is the fast case. With R rows of ids an image (repeated masks, as
    ``random_masking(masks_per_image=R)`` draws them), every row reads the same image; no image is copied.

    Args:
        images: (N, C, H, W), any strides. uint8 is raw and becomes ``(x / 255 - mean) / std``, or ``x / 255`` without
            mean and std, computed in float32. Floating point is taken as already normalised: mean and std are not
            applied, and the values are copied.
        ids: int64 (N * R, K), R >= 1, rows n * R to n * R + R - 1 being of image n; values in [0, L),
            L = (H / ph) * (W / pw), patches counted row by row; may repeat.
        patch_size: (ph, pw), or an int for a square.
        mean, std: float32 (C,) on the images' device, in [0, 1] units; both or neither.
        dtype: of the result; None means the autocast dtype where autocast is active, else float32 for uint8, else the
            images' dtype.

    Returns:
        (N * R, K, ph * pw * C). Differentiable with respect to floating point images, once; the gradients of an
        image's copies of a patch are added in the order of its rows, in float32 or better.

    Raises:
        ValueError: on a wrong shape, dtype or device. Values of ids are checked on the CPU only.
    """
    patch_size = as_pair("patch_size", patch_size)
    patches.check_images(images, "ids", ids, patch_size)
    if dtype is None:
        dtype = _default_dtype(images)
    check(isinstance(dtype, torch.dtype) and dtype.is_floating_point, "dtype", "a floating point dtype or None", dtype)
    mean, std = patches.check_statistics(images, mean, std)
    return _gather_patches(images, ids, mean, std, *patch_size, dtype)


def _default_dtype(images: Tensor) -> torch.dtype:
    device_type = images.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.float32 if images.dtype == torch.uint8 else images.dtype


@torch.library.custom_op("fastmae::gather_patches", mutates_args=())
def _gather_patches(
    images: Tensor, ids: Tensor, mean: Tensor | None, std: Tensor | None, ph: int, pw: int, dtype: torch.dtype
) -> Tensor:
    n, c, h, w = images.shape
    (rows, k), pixels = ids.shape, ph * pw * c
    patches.check_id_values("ids", ids, (h // ph) * (w // pw))
    out = torch.empty(rows, k, pixels, dtype=dtype, device=images.device)
    if not takes_triton(images, _kernels) or pixels > patches.MAX_TRITON_PIXELS:
        affine = patches.affine_plain(mean, std, (ph, pw))
        for part, part_rows in patches.chunks(images, ids, (ph, pw)):
            x = patches.gather_plain(images[part], ids[part_rows], (ph, pw))
            out[part_rows] = patches.normalise_plain(x, *affine)
        return out
    options = patches.launch_options(images, (ph, pw), values=32)
    with torch.cuda.device_of(images):
        # R rows of K ids are, in memory, one row of R * K.
        _kernels.gather_patches_fwd_kernel[(-(-rows * k // options["ROWS"]),)](
            out, images, ids.contiguous(), mean, std, rows * k, rows // n * k, w // pw, *images.stride(), **options
        )
    return out


@_gather_patches.register_fake
def _(images, ids, mean, std, ph, pw, dtype):
    return images.new_empty(ids.shape[0], ids.shape[1], ph * pw * images.shape[1], dtype=dtype)


@torch.library.custom_op("fastmae::gather_patches_backward", mutates_args=())
def _gather_patches_backward(
    grad: Tensor, ids: Tensor, shape: Sequence[int], channels_last: bool, ph: int, pw: int, dtype: torch.dtype
) -> Tensor:
    n, c, h, w = shape
    pixels, grid_h, grid_w = ph * pw * c, h // ph, w // pw
    ids = ids.reshape(n, -1)
    k = ids.shape[1]
    if not takes_triton(grad, _kernels) or pixels > patches.MAX_TRITON_PIXELS or dtype == torch.float64:
        image = torch.arange(n, device=ids.device)[:, None] * (grid_h * grid_w)
        compute = torch.promote_types(dtype, torch.float32)
        x = torch.zeros(n * grid_h * grid_w, pixels, dtype=compute, device=grad.device)
        patches.add_rows(x, (ids + image).flatten(), grad.reshape(n * k, pixels).to(compute))
        x = x.to(dtype).view(n, grid_h, grid_w, ph, pw, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
        return x.contiguous(memory_format=_memory_format(channels_last))
    out = torch.empty(n, c, h, w, dtype=dtype, device=grad.device, memory_format=_memory_format(channels_last))
    options = patches.launch_options(out, (ph, pw), values=32)
    del options["ROWS"]
    with torch.cuda.device_of(grad):
        _kernels.gather_patches_bwd_kernel[(n * grid_h * grid_w,)](
            out, grad.contiguous(), ids.contiguous(), k, grid_h * grid_w, grid_w, *out.stride(),
            BLOCK_K=256, **options,
        )  # fmt: skip
    return out


@_gather_patches_backward.register_fake
def _(grad, ids, shape, channels_last, ph, pw, dtype):
    return grad.new_empty(shape, dtype=dtype).contiguous(memory_format=_memory_format(channels_last))


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _setup_context(ctx, inputs, output):
    images, ids, _mean, _std, ctx.ph, ctx.pw, _dtype = inputs
    ctx.save_for_backward(ids)
    ctx.shape, ctx.dtype = list(images.shape), images.dtype
    ctx.channels_last = images.shape[1] > 1 and patches.is_channels_last(images)


def _backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    grad_images = None
    if ctx.needs_input_grad[0]:
        grad_images = _gather_patches_backward(grad, ids, ctx.shape, ctx.channels_last, ctx.ph, ctx.pw, ctx.dtype)
    return grad_images, None, None, None, None, None, None


_gather_patches.register_autograd(_backward, setup_context=_setup_context)
