"""The loss of masked autoencoding: squared error on masked patches, the targets never stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmae.ops import patches
from fastmae.ops._check import as_pair, check
from fastmae.ops._dispatch import load_kernels, takes_triton

_kernels = load_kernels("masked_patch_mse")
_REDUCTIONS = ("mean", "sum", "none")


def masked_patch_mse(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int | Sequence[int],
    norm_pix: bool = True,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared error between predicted and true pixels of masked patches, as ``forward_loss`` of
    facebookresearch/mae computes it (He et al. 2022, section 3, "Reconstruction target").

    With ``norm_pix`` a target patch is normalised by its own mean and unbiased variance:
    ``(t - mean) / sqrt(var + eps)``. Statistics and loss are computed in float32, or float64 if pred is float64,
    whatever the dtypes that come in, under autocast too. Neither the targets nor a float image is stored where Triton
    runs; elsewhere the masked patches alone are. With R rows of pred and of ids_mask an image (repeated masks), every
    row reads the same image; no image is copied.

    Args:
        pred: (N * R, M, P) in the order of ids_mask, or (N * R, L, P) for all patches, of which the masked ones are
            used; P = ph * pw * C in the order of ``patchify`` (row, column, channel). With shape[1] equal to that of
            ids_mask it is taken to be in the order of ids_mask.
        images: (N, C, H, W), any strides. uint8 is raw and becomes ``(x / 255 - mean) / std``, or ``x / 255`` without
            mean and std. Floating point is taken as already normalised: mean and std are not applied.
        ids_mask: int64 (N * R, M), R >= 1, rows n * R to n * R + R - 1 being of image n; values in [0, L),
            L = (H / ph) * (W / pw), patches counted row by row.
        patch_size: (ph, pw), or an int for a square.
        norm_pix: whether targets are normalised patch by patch; needs P > 1.
        mean, std: float32 (C,) on the images' device, in [0, 1] units; both or neither.
        eps: added to the variance.
        reduction: "mean" over the N * R * M patches, "sum" of their losses, or "none".

    Returns:
        float32 (float64 if pred is): a scalar, or (N * R, M) for "none": each the mean over the P values of a patch.
        Differentiable with respect to pred, once; grad is 0 for the visible patches of a full pred.

    Raises:
        ValueError: on a wrong shape, dtype or device, on an unknown reduction, and where images require a gradient,
            since targets are data. Values of ids_mask are checked on the CPU only.
    """
    patch_size = as_pair("patch_size", patch_size)
    patches.check_images(images, "ids_mask", ids_mask, patch_size)
    _check_pred(pred, images, ids_mask, patch_size)
    check(reduction in _REDUCTIONS, "reduction", f"one of {', '.join(_REDUCTIONS)}", reduction)
    check(eps >= 0, "eps", "a number >= 0", eps)
    if norm_pix and pred.shape[2] == 1:
        raise ValueError("norm_pix: expected False for patches of a single value, whose unbiased variance is undefined")
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError("images: expected a tensor that does not require a gradient (targets are data): detach it")
    mean, std = patches.check_statistics(images, mean, std)
    loss = _masked_patch_mse(pred, images, ids_mask, mean, std, *patch_size, norm_pix, float(eps))
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _check_pred(pred: Tensor, images: Tensor, ids_mask: Tensor, patch_size: tuple[int, int]) -> None:
    (_, c, h, w), (ph, pw) = images.shape, patch_size
    (n, masked), total, pixels = ids_mask.shape, (h // ph) * (w // pw), ph * pw * c
    valid = isinstance(pred, Tensor) and pred.is_floating_point() and pred.ndim == 3 and pred.shape[0] == n
    valid = valid and pred.shape[1] in (masked, total) and pred.shape[2] == pixels
    expected = lambda: (  # noqa: E731
        f"a floating point tensor of shape ({n}, {masked}, {pixels}), in the order of ids_mask, "
        f"or ({n}, {total}, {pixels}), all patches, where {pixels} = ph * pw * C = {ph} * {pw} * {c}"
    )
    check(valid, "pred", expected, pred)
    check(pred.device == images.device, "pred", f"a tensor on the images' device, {images.device}", pred)


def _runs_triton(pred: Tensor, images: Tensor) -> bool:
    """Double precision is for checking gradients, not for training: it has no kernel."""
    doubles = torch.float64 in (pred.dtype, images.dtype)
    return takes_triton(pred, _kernels) and not doubles and pred.shape[2] <= patches.MAX_TRITON_PIXELS


@torch.library.custom_op("fastmae::masked_patch_mse", mutates_args=())
def _masked_patch_mse(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    ph: int,
    pw: int,
    norm_pix: bool,
    eps: float,
) -> Tensor:
    (n, m), (h, w) = ids_mask.shape, images.shape[2:]
    patches.check_id_values("ids_mask", ids_mask, (h // ph) * (w // pw))
    loss = torch.empty(n, m, dtype=_compute_dtype(pred), device=pred.device)
    if not _runs_triton(pred, images):
        affine = patches.affine_plain(mean, std, (ph, pw))
        for part, rows in patches.chunks(images, ids_mask, (ph, pw)):
            x = _residual_plain(pred[rows], images[part], ids_mask[rows], affine, (ph, pw), norm_pix, eps)
            loss[rows] = torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1])
        return loss
    options = patches.launch_options(images, (ph, pw), values=16)
    pred = pred if pred.stride(2) == 1 else pred.contiguous()
    with torch.cuda.device_of(pred):
        _kernels.masked_patch_mse_fwd_kernel[(-(-n * m // options["ROWS"]),)](
            loss, pred, images, ids_mask.contiguous(), mean, std, n * m, m, n // images.shape[0], w // pw, eps,
            pred.stride(0), pred.stride(1), *images.stride(),
            FULL=pred.shape[1] != m, NORM_PIX=norm_pix, **options,
        )  # fmt: skip
    return loss


@_masked_patch_mse.register_fake
def _(pred, images, ids_mask, mean, std, ph, pw, norm_pix, eps):
    return pred.new_empty(ids_mask.shape, dtype=_compute_dtype(pred))


@torch.library.custom_op("fastmae::masked_patch_mse_backward", mutates_args=())
def _masked_patch_mse_backward(
    grad: Tensor,
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    ph: int,
    pw: int,
    norm_pix: bool,
    eps: float,
) -> Tensor:
    (n, m), w = ids_mask.shape, images.shape[3]
    length, pixels = pred.shape[1:]
    runs_triton = _runs_triton(pred, images)
    new = torch.empty if runs_triton or length == m else torch.zeros
    grad_pred = new(n, length, pixels, dtype=pred.dtype, device=pred.device)
    if not runs_triton:
        affine = patches.affine_plain(mean, std, (ph, pw))
        for part, rows in patches.chunks(images, ids_mask, (ph, pw)):
            ids = ids_mask[rows]
            x = _residual_plain(pred[rows], images[part], ids, affine, (ph, pw), norm_pix, eps)
            x *= grad[rows, :, None] * (-2.0 / pixels)
            if length == m:
                grad_pred[rows] = x
            else:
                matrix = grad_pred[rows].view(-1, pixels)
                patches.add_rows(matrix, _flat(ids, length), x.view(-1, pixels).to(pred.dtype))
        return grad_pred
    options = patches.launch_options(images, (ph, pw), values=16)
    pred = pred if pred.stride(2) == 1 else pred.contiguous()
    with torch.cuda.device_of(pred):
        _kernels.masked_patch_mse_bwd_kernel[(-(-n * length // options["ROWS"]),)](
            grad_pred, grad, pred, images, ids_mask.contiguous(), mean, std,
            n * length, m, length, n // images.shape[0], w // pw, eps,
            *grad.stride(), pred.stride(0), pred.stride(1), *images.stride(),
            FULL=length != m, NORM_PIX=norm_pix, BLOCK_M=max(32, 1024 // options["ROWS"]), **options,
        )  # fmt: skip
    return grad_pred


@_masked_patch_mse_backward.register_fake
def _(grad, pred, images, ids_mask, mean, std, ph, pw, norm_pix, eps):
    return pred.new_empty(pred.shape)


def _setup_context(ctx, inputs, output):
    pred, images, ids_mask, mean, std, *ctx.settings = inputs
    ctx.save_for_backward(pred, images, ids_mask, mean, std)


def _backward(ctx, grad):
    grad_pred = _masked_patch_mse_backward(grad, *ctx.saved_tensors, *ctx.settings) if ctx.needs_input_grad[0] else None
    return grad_pred, None, None, None, None, None, None, None, None


_masked_patch_mse.register_autograd(_backward, setup_context=_setup_context)


def _compute_dtype(pred: Tensor) -> torch.dtype:
    return torch.float64 if pred.dtype == torch.float64 else torch.float32


def _flat(ids: Tensor, num_patches: int) -> Tensor:
    """ids (N, M) as (N * M,) rows of an (N * L, ...) matrix, N here the rows of pred."""
    return (ids + torch.arange(ids.shape[0], device=ids.device)[:, None] * num_patches).flatten()


def _residual_plain(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    affine: tuple[Tensor, Tensor] | tuple[None, None],
    patch_size: tuple[int, int],
    norm_pix: bool,
    eps: float,
) -> Tensor:
    """``target - pred`` of the masked patches, (N * R, M, P), a new tensor; gathers before it computes."""
    target = patches.gather_plain(images, ids_mask, patch_size)
    target = patches.normalise_plain(target, *affine).to(_compute_dtype(pred))
    if norm_pix:
        target -= target.mean(-1, keepdim=True)
        norm = torch.linalg.vector_norm(target, dim=-1, keepdim=True)
        target *= (norm.square_() / (target.shape[-1] - 1) + eps).rsqrt_()
    if pred.shape[1] != ids_mask.shape[1]:
        pred = pred.reshape(-1, pred.shape[-1]).index_select(0, _flat(ids_mask, pred.shape[1])).view(target.shape)
    return target.sub_(pred)
