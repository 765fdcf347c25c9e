"""From a masked autoencoder's predictions to pixels, and how far those pixels are from the truth."""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastmae import ops

_PLAUSIBLE = (-0.25, 1.25)  # de-normalised pixels; bicubic resizing overshoots [0, 1] by a few hundredths
Visible = Literal["pasted", "predicted"]
_SMALLEST_ERROR = 1e-10  # keeps the PSNR of a perfect copy at 100 dB instead of infinity, which JSON cannot hold


class Reconstruction(NamedTuple):
    """Pictures in [0, 1] units and errors on masked patches. Every tensor is float32 on the images' device."""

    original: Tensor
    """(N, C, H, W)."""
    masked: Tensor
    """(N, C, H, W), masked patches grey."""
    reconstruction: Tensor
    """(N, C, H, W), masked patches as predicted, visible ones as they were or as predicted; predictions are not
    clamped."""
    visible: Tensor
    """bool (N, 1, H, W)."""
    mse: Tensor
    """(N,), mean over masked pixels and channels of the squared error of pixels normalised with the model's mean and
    std: for a pixel-target model, the training loss (paper, section 3, "Reconstruction target")."""
    psnr: Tensor
    """(N,), decibels: 10 log10(1 / squared error in [0, 1] units), over masked pixels; at most 100."""


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    images: Tensor,
    masking: ops.Masking,
    *,
    dtype: torch.dtype = torch.float32,
    visible: Visible = "pasted",
) -> Reconstruction:
    """Fill in the masked patches of some images.

    A model of normalised pixels (``norm_pix_loss``) predicts each patch up to its mean and standard deviation. Those
    are taken from the *target* patch, so that the errors of such a model say nothing about colour and contrast.

    Args:
        model: a ``MaskedAutoencoderViT`` with its decoder; its mode is left as it was.
        images: uint8 (N, C, H, W), or floating and already normalised with the model's mean and std; on the model's
            device.
        masking: of the N images, one mask each.
        dtype: ``torch.float32``, or ``torch.bfloat16`` or ``torch.float16`` to run the model under autocast.
        visible: how visible patches look in the reconstruction: ``"pasted"`` from the image, or ``"predicted"`` as in
            the paper's figures, which is blurred since the loss does not train it. Errors are the same.

    Raises:
        ValueError: the model has no decoder, or an argument does not fit the model.

    Warns:
        UserWarning: floating images that, de-normalised, lie far outside [0, 1].
    """
    if getattr(model, "decoder_pred", None) is None:
        raise ValueError(
            f"model: expected a masked autoencoder with its decoder (decoder_pred), got {type(model).__name__} without "
            "one; an encoder alone cannot reconstruct pixels, so load a pretraining checkpoint"
        )
    if getattr(model, "num_outputs", None) is not None:
        raise ValueError(f"model: expected one that predicts pixels, got one of {model.num_outputs} values per patch")
    if len(masking.mask) != len(images):
        raise ValueError(f"masking: expected one mask for each of {len(images)} images, got {len(masking.mask)} masks")
    if visible not in get_args(Visible):
        raise ValueError(f"visible: expected 'pasted' or 'predicted', got {visible!r}")
    whole = visible == "predicted"
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            pred = model(images, masking=masking, full_pred=whole).pred.float()
    finally:
        model.train(was_training)

    target = model.patchify(images).float()
    mean, std = (t.repeat(target.shape[-1] // model.in_chans) for t in (model.mean, model.std))  # channels come last
    if images.dtype == torch.uint8:
        target = (target / 255 - mean) / std
        original = images.float() / 255
    else:
        original = model.unpatchify(target * std + mean)
        _warn_if_implausible(original, images)

    where = masking.ids_mask[..., None].expand(-1, -1, target.shape[-1])
    if model.norm_pix_loss:
        predicted_target = target if whole else target.gather(1, where)
        variance = predicted_target.var(-1, keepdim=True)
        pred = pred * (variance + 1e-6).sqrt() + predicted_target.mean(-1, keepdim=True)
    filled = model.unpatchify((pred if whole else target.scatter(1, where, pred)) * std + mean)

    seen = _visible_pixels(model, masking)
    reconstruction = filled if whole else original.where(seen, filled)
    return Reconstruction(
        original=original,
        masked=original.where(seen, 0.5),
        reconstruction=reconstruction,
        visible=seen,
        mse=masked_error(reconstruction, original, seen, model.std.view(1, -1, 1, 1)),
        psnr=masked_psnr(reconstruction, original, seen),
    )


def masked_error(images: Tensor, target: Tensor, visible: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Mean squared error over the masked pixels and all channels, after division by ``scale``: (N,)."""
    hidden = (~visible).to(target.dtype)
    squared = ((images - target) / scale).square() * hidden
    return squared.sum((1, 2, 3)) / (hidden.sum((1, 2, 3)) * target.shape[1])


def masked_psnr(images: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """Peak signal-to-noise ratio over the masked pixels of pictures in [0, 1] units, in decibels, at most 100: (N,)."""
    return -10 * masked_error(images, target, visible).clamp_min(_SMALLEST_ERROR).log10()


def _visible_pixels(model: nn.Module, masking: ops.Masking) -> Tensor:
    """bool (N, 1, H, W): the mask of patches, spread over their pixels."""
    (ph, pw), (rows, columns) = model.patch_size, model.grid_size
    grid = masking.mask.view(-1, 1, rows, columns) == 0
    return grid.repeat_interleave(ph, 2).repeat_interleave(pw, 3)


def _warn_if_implausible(original: Tensor, normalized: Tensor) -> None:
    low, high = original.aminmax()
    if not (low >= _PLAUSIBLE[0] and high <= _PLAUSIBLE[1]):
        raw_low, raw_high = normalized.aminmax()
        warnings.warn(
            "images: floating images are taken as normalised with the model's mean and std; values from "
            f"{raw_low:.3g} to {raw_high:.3g} stand for pixels from {low:.3g} to {high:.3g}, expected within [0, 1]. "
            "Pass uint8 images to have them normalised here.",
            stacklevel=3,
        )
