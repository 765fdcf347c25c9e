"""From a masked autoencoder's predictions to pixels, and how far those pixels are from the truth."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmae import ops
from fastmae.evaluate.baselines import fill_inverse_distance, fill_mean_color
from fastmae.evaluate.figure import Block, Row, draw

_PLAUSIBLE = (-0.25, 1.25)  # de-normalised pixels; bicubic resizing overshoots [0, 1] by a few hundredths
_SMALLEST_ERROR = 1e-10  # keeps the PSNR of a perfect copy at 100 dB instead of infinity, which JSON cannot hold
_BATCH = 32


class Reconstruction(NamedTuple):
    """Pictures in [0, 1] units and errors on masked patches. Every tensor is float32 on the images' device."""

    original: Tensor
    """(N, C, H, W)."""
    masked: Tensor
    """(N, C, H, W), masked patches grey."""
    reconstruction: Tensor
    """(N, C, H, W), visible patches as they were, masked ones as predicted; predictions are not clamped."""
    visible: Tensor
    """bool (N, 1, H, W)."""
    mse: Tensor
    """(N,), mean over masked pixels and channels of the squared error of pixels normalised with the model's mean and
    std: for a pixel-target model, the training loss (section 4 of the paper)."""
    psnr: Tensor
    """(N,), decibels: 10 log10(1 / squared error in [0, 1] units), over masked pixels; at most 100."""


@torch.no_grad()
def reconstruct(
    model: nn.Module, images: Tensor, masking: ops.Masking, *, dtype: torch.dtype = torch.float32
) -> Reconstruction:
    """Fill in the masked patches of some images.

    A model of normalised pixels (``norm_pix_loss``) predicts each patch up to its mean and standard deviation. Those
    are taken from the *target* patch, so that the errors of such a model say nothing about colour and contrast.

    Args:
        model: a ``MaskedAutoencoderViT`` with its decoder; its mode is left as it was.
        images: uint8 (N, C, H, W), or floating and already normalised with the model's mean and std; on the model's
            device.
        masking: of the N images.
        dtype: ``torch.float32``, or ``torch.bfloat16`` or ``torch.float16`` to run the model under autocast.

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
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            pred = model(images, masking=masking, full_pred=False).pred.float()
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

    where = masking.ids_mask[..., None].expand_as(pred)
    if model.norm_pix_loss:
        masked_target = target.gather(1, where)
        variance = masked_target.var(-1, keepdim=True)
        pred = pred * (variance + 1e-6).sqrt() + masked_target.mean(-1, keepdim=True)
    filled = model.unpatchify(target.scatter(1, where, pred) * std + mean)

    visible = _visible_pixels(model, masking)
    reconstruction = original.where(visible, filled)
    return Reconstruction(
        original=original,
        masked=original.where(visible, 0.5),
        reconstruction=reconstruction,
        visible=visible,
        mse=masked_error(reconstruction, original, visible, model.std.view(1, -1, 1, 1)),
        psnr=10 * (1 / masked_error(reconstruction, original, visible).clamp_min(_SMALLEST_ERROR)).log10(),
    )


def masked_error(images: Tensor, target: Tensor, visible: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Mean squared error over the masked pixels and all channels, after division by ``scale``: (N,)."""
    hidden = (~visible).to(target.dtype)
    squared = ((images - target) / scale).square() * hidden
    return squared.sum((1, 2, 3)) / (hidden.sum((1, 2, 3)) * target.shape[1])


def evaluate_sets(
    model: nn.Module,
    sets: Mapping[str, Tensor],
    *,
    mask_ratio: float,
    seed: int,
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    names: Mapping[str, Sequence[str]] | None = None,
    num_masks: int = 256,
    num_rows: int = 9,
) -> dict[str, dict]:
    """Measure reconstructions of several sets of images beside two baselines on the same masks, and draw them.

    A set smaller than ``num_masks`` is evaluated with several masks an image (at most 64), so that one photograph gives
    a steady number too. The picture shows the first images of each set with their first mask, not chosen ones.

    Args:
        model: a ``MaskedAutoencoderViT`` with its decoder.
        sets: uint8 (N, C, H, W) by heading; moved to the model's device.
        mask_ratio: in (0, 1).
        seed: of the masks.
        path: of the PNG; written whole or not at all.
        dtype: as for ``reconstruct``.
        names: a caption an image by heading, where there are any.
        num_masks: at least so many (image, mask) pairs are averaged.
        num_rows: most images of a set in the picture.

    Returns:
        By heading: ``mse``, ``mse_mean_color``, ``mse_inverse_distance`` (pixels normalised with the model's mean and
        std), ``psnr``, ``psnr_mean_color``, ``psnr_inverse_distance`` (decibels), ``num_images``, ``masks_per_image``,
        ``mask_ratio``, ``denormalized_with_target_statistics``. Plain Python numbers.

    Raises:
        ValueError: an empty set, or what ``reconstruct`` refuses.
    """
    summary, blocks = {}, []
    for heading, images in sets.items():
        if len(images) == 0:
            raise ValueError(f"sets[{heading!r}]: expected at least one image, got none")
        numbers, rows = _evaluate(model, images, mask_ratio, seed, dtype, num_masks, num_rows)
        labels = (names or {}).get(heading, [])
        rows = [row._replace(name=name) for row, name in zip(rows, labels, strict=False)] + rows[len(labels) :]
        summary[heading] = numbers
        blocks.append(Block(heading, _describe(numbers), rows))
    note = "De-normalised with the target patches' own mean and standard deviation. " if model.norm_pix_loss else ""
    draw(
        blocks,
        path,
        title=f"Masked autoencoder, {100 * mask_ratio:g} % of patches masked",
        note=f"{note}Visible patches are pasted. Error: mean squared, masked patches only, pixels in units of the "
        "data's standard deviation.",
    )
    return summary


def _evaluate(
    model: nn.Module, images: Tensor, mask_ratio: float, seed: int, dtype: torch.dtype, num_masks: int, num_rows: int
) -> tuple[dict, list[Row]]:
    device = model.mean.device
    std = model.std.view(1, -1, 1, 1)
    draws = min(64, max(1, math.ceil(num_masks / len(images))))
    fills = {"_mean_color": fill_mean_color, "_inverse_distance": fill_inverse_distance}
    sums = dict.fromkeys([f"{metric}{fill}" for fill in ("", *fills) for metric in ("mse", "psnr")], 0.0)
    rows: list[Row] = []
    for draw_index in range(draws):
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH].to(device)
            ids = torch.arange(start, start + len(batch), device=device)
            masking = ops.random_masking(
                len(batch), model.num_patches, mask_ratio, seed=seed, epoch=draw_index, sample_ids=ids, device=device
            )
            result = reconstruct(model, batch, masking, dtype=dtype)
            sums["mse"] += float(result.mse.sum())
            sums["psnr"] += float(result.psnr.sum())
            for name, fill in fills.items():
                filled = fill(result.original, result.visible)
                sums[f"mse{name}"] += float(masked_error(filled, result.original, result.visible, std).sum())
                error = masked_error(filled, result.original, result.visible).clamp_min(_SMALLEST_ERROR)
                sums[f"psnr{name}"] += float((10 * (1 / error).log10()).sum())
            if draw_index == 0:
                rows += rows_of(result)[: num_rows - len(rows)]
    numbers = {name: value / (draws * len(images)) for name, value in sums.items()}
    numbers |= {
        "num_images": len(images),
        "masks_per_image": draws,
        "mask_ratio": mask_ratio,
        "denormalized_with_target_statistics": bool(model.norm_pix_loss),
    }
    return numbers, rows


def rows_of(result: Reconstruction) -> list[Row]:
    """The images of a reconstruction as rows of a figure."""
    pictures = zip(result.masked.cpu(), result.reconstruction.cpu(), result.original.cpu(), strict=True)
    hidden = 1 - result.visible.float().mean((1, 2, 3))
    errors = zip(hidden.tolist(), result.mse.tolist(), result.psnr.tolist(), strict=True)
    captions = [f"mask {100 * ratio:.0f} %, error {mse:.3f}, {psnr:.1f} dB" for ratio, mse, psnr in errors]
    return [Row(*triplet, caption) for triplet, caption in zip(pictures, captions, strict=True)]


def _describe(numbers: dict) -> str:
    count = f"{numbers['num_images']} image{'s' if numbers['num_images'] > 1 else ''}"
    masks = f" x {numbers['masks_per_image']} masks" if numbers["masks_per_image"] > 1 else ""
    return (
        f"Error {numbers['mse']:.3f} ({numbers['psnr']:.1f} dB) over {count}{masks}. Without a model, same masks: "
        f"mean visible colour {numbers['mse_mean_color']:.3f}, inverse-distance filling "
        f"{numbers['mse_inverse_distance']:.3f}"
    )


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
