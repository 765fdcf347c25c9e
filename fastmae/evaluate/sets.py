"""Reconstruction errors of whole sets of images, beside what needs no model, and the figure of their first images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmae import ops
from fastmae.evaluate.baselines import fill_inverse_distance, fill_mean_color
from fastmae.evaluate.figure import Block, Row, draw
from fastmae.evaluate.reconstruction import Reconstruction, Visible, masked_error, masked_psnr, reconstruct

_BATCH = 32
_MOST_MASKS = 64
_FEWEST_ROWS = 3
_QUANTILES = (0.02, 0.98)
"""Of a band's original pixels; what lies between is shown from black to white."""
_STRATEGIES = {"random": "at random", "block": "in blocks", "grid": "in a grid", "fixed-grid": "in a grid"}
_BASELINES = {"_mean_color": fill_mean_color, "_inverse_distance": fill_inverse_distance}


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
    when: str = "",
    mask_strategy: str = "random",
    visible: Visible = "pasted",
    bands: Sequence[int] = (0, 1, 2),
) -> dict[str, dict]:
    """Measure reconstructions of several sets of images beside two baselines on the same masks, and draw them.

    A set smaller than ``num_masks`` is evaluated with several masks per image (at most 64), so that one photograph also
    gives a steady number. The picture shows the first images of each set with their first mask, not chosen ones. One or
    two images are shown with several masks, in at least three rows.

    Args:
        model: a ``MaskedAutoencoderViT`` with its decoder.
        sets: uint8 (N, C, H, W), or floating in [0, 1] as a loader gives it, by heading; moved to the model's device.
        mask_ratio: in (0, 1).
        seed: of the masks.
        path: of the PNG; written whole or not at all.
        dtype: as for :func:`reconstruct`.
        names: an image's name each, by heading, for the sets that have them.
        num_masks: at least so many (image, mask) pairs are averaged where 64 masks per image suffice for it.
        num_rows: most images of a set in the picture.
        when: for the picture's title, in the manner of "after 400 steps".
        mask_strategy: of :func:`fastmae.ops.random_masking`.
        visible: as for :func:`reconstruct`.
        bands: of images with more than three channels, the ones (counted from 0) that are drawn as red, green and
            blue, or the one that is drawn grey. Each is stretched from its 2nd to its 98th percentile in the original.

    Returns:
        By heading: ``mse``, ``mse_mean_color``, ``mse_inverse_distance`` (pixels normalised with the model's mean and
        std), ``psnr``, ``psnr_mean_color``, ``psnr_inverse_distance`` (decibels), ``num_images``, ``num_shown``,
        ``masks_per_image``, ``mask_ratio``, ``mask_strategy``, ``denormalized_with_target_statistics``; for a set with
        names also ``images``, a list of ``name`` and the first six for each image. Plain Python numbers.

    Raises:
        ValueError: an empty set, names that do not fit, or what :func:`reconstruct` refuses.
    """
    options = {"names": names, "num_masks": num_masks, "num_rows": num_rows}
    options |= {"mask_strategy": mask_strategy, "visible": visible, "bands": bands}
    return FixedSets(sets, mask_ratio=mask_ratio, seed=seed, **options).evaluate(model, path, dtype=dtype, when=when)


class FixedSets:
    """Sets of images and masks that stay the same, to look at a model again and again while it trains.

    What needs no model is computed once. Arguments, results and errors are those of :func:`evaluate_sets`.
    """

    def __init__(
        self,
        sets: Mapping[str, Tensor],
        *,
        mask_ratio: float,
        seed: int,
        names: Mapping[str, Sequence[str]] | None = None,
        num_masks: int = 256,
        num_rows: int = 9,
        mask_strategy: str = "random",
        visible: Visible = "pasted",
        bands: Sequence[int] = (0, 1, 2),
    ) -> None:
        self._sets, self._names = sets, {heading: list((names or {}).get(heading, [])) for heading in sets}
        for heading, images in sets.items():
            labels = self._names[heading]
            if len(images) == 0:
                raise ValueError(f"sets[{heading!r}]: expected at least one image, got none")
            if labels and len(labels) != len(images):
                raise ValueError(f"names[{heading!r}]: expected {len(images)} names, one per image, got {len(labels)}")
            last = images.shape[1] - 1
            if last > 2 and not (len(bands) in (1, 3) and all(0 <= band <= last for band in bands)):
                raise ValueError(f"bands: expected one or three of the channels 0 to {last}, got {tuple(bands)}")
        self._mask_ratio, self._seed, self._num_masks, self._num_rows = mask_ratio, seed, num_masks, num_rows
        self._strategy, self._visible, self._bands = mask_strategy, visible, list(bands)
        self._baselines: dict[str, dict[str, Tensor]] = {}

    def evaluate(
        self, model: nn.Module, path: Path | str | None, *, dtype: torch.dtype = torch.float32, when: str = ""
    ) -> dict[str, dict]:
        """As :func:`evaluate_sets`.

        Args:
            model, dtype, when: the same.
            path: None draws nothing, as on the ranks of a sharded model that only have to join its forward.
        """
        summary, blocks = {}, []
        for heading in self._sets:
            labels = self._names[heading]
            errors, draws, rows = self._measure(model, heading, dtype)
            numbers = self._numbers(model, heading, errors, draws, rows)
            if labels:
                rows = [row._replace(name=labels[i % len(labels)]) for i, row in enumerate(rows)]
                numbers["images"] = [
                    {"name": label} | {metric: float(values[i]) for metric, values in errors.items()}
                    for i, label in enumerate(labels)
                ]
            summary[heading] = numbers
            blocks.append(Block(heading[:1].upper() + heading[1:], _describe(numbers), rows))
        if path is not None:
            self._draw(blocks, path, when, model)
        return summary

    def _numbers(
        self, model: nn.Module, heading: str, errors: Mapping[str, Tensor], draws: int, rows: Sequence[Row]
    ) -> dict[str, Any]:
        return {metric: float(values.mean()) for metric, values in errors.items()} | {
            "num_images": len(self._sets[heading]),
            "num_shown": min(len(rows), len(self._sets[heading])),
            "masks_per_image": draws,
            "mask_ratio": self._mask_ratio,
            "mask_strategy": self._strategy,
            "denormalized_with_target_statistics": bool(model.norm_pix_loss),
        }

    def _draw(self, blocks: list[Block], path: Path | str, when: str, model: nn.Module) -> None:
        masked = f"{100 * self._mask_ratio:g} % of patches masked {_STRATEGIES[self._strategy]}"
        draw(blocks, path, title=f"{_title(when)}, {masked}", note=self._note(model))

    def _note(self, model: nn.Module) -> str:
        note = ""
        if model.norm_pix_loss:
            note = "De-normalised with the target patches' own mean and standard deviation. "
        if model.in_chans > 3:
            shown = ", ".join(map(str, self._bands))
            shown = f"Band {shown}" if len(self._bands) == 1 else f"Bands {shown} as red, green, blue"
            low, high = _QUANTILES
            note += f"{shown} (of 0 to {model.in_chans - 1}), stretched from the {low:.0%} to the {high:.0%} quantile. "
        if self._visible == "pasted":
            note += "Visible patches are pasted."
        else:
            note += "Visible patches are shown as predicted, which the loss does not train."
        return f"{note} Error: mean squared, masked patches only, pixels in units of the data's standard deviation."

    def _measure(self, model: nn.Module, heading: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], int, list[Row]]:
        """Each image's errors, float64 (N,) by metric; the number of masks per image; rows for the figure."""
        images = self._sets[heading]
        draws = min(_MOST_MASKS, math.ceil(self._num_masks / len(images))) or 1
        together = max(1, _BATCH // len(images))  # draws per forward, of small sets
        num_rows = min(self._num_rows, len(images) * math.ceil(_FEWEST_ROWS / len(images)), len(images) * draws)
        drawn: dict[str, list[Tensor]] = {}
        rows: list[Row] = []
        for first in range(0, draws, together):
            some = range(first, min(first + together, draws))
            for start in range(0, len(images), _BATCH):
                batch = images[start : start + _BATCH].to(model.mean.device)
                masking = self._masking(model, start, len(batch), some)
                repeated = model.normalized(batch.repeat(len(some), 1, 1, 1))
                result = reconstruct(model, repeated, masking, dtype=dtype, visible=self._visible)
                errors = {"mse": result.mse, "psnr": result.psnr}
                if heading not in self._baselines:
                    errors |= _baseline_errors(result, model.std)
                for metric, values in errors.items():
                    drawn.setdefault(metric, []).append(values.double().cpu())
                if missing := num_rows - len(rows):
                    rows += rows_of(Reconstruction(*(part[:missing] for part in result)), self._bands)
        means = {metric: torch.cat(values).view(draws, len(images)).mean(0) for metric, values in drawn.items()}
        own = {metric: means.pop(metric) for metric in ("mse", "psnr")}
        return own | self._baselines.setdefault(heading, means), draws, rows

    def _masking(self, model: nn.Module, start: int, count: int, draws: Sequence[int]) -> ops.Masking:
        """Masks of ``count`` images from number ``start`` on, for one draw after the other."""
        device = model.mean.device
        ids = torch.arange(start, start + count, device=device)
        length, ratio = model.num_patches, self._mask_ratio
        options = {"seed": self._seed, "sample_ids": ids, "device": device}
        options |= {"strategy": self._strategy, "grid_size": model.grid_size}
        parts = [ops.random_masking(count, length, ratio, draw=draw_index, **options) for draw_index in draws]
        return ops.Masking(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def compare_masks(
    model: nn.Module,
    images: Tensor,
    masks: Sequence[tuple[float, str]],
    path: Path | str,
    *,
    names: Sequence[str],
    dtype: torch.dtype = torch.float32,
    when: str = "",
    **options: Any,
) -> list[dict]:
    """Draw the same images with several masks each, as Figure 4 of the paper does for ratios and Figure 6 for
    strategies.

    Args:
        images: as one of the sets of :func:`evaluate_sets`; each is a row, with its original at the left.
        masks: ratio and strategy of each pair of columns.
        names: of the images.
        options: ``seed``, ``num_rows``, ``visible`` and ``bands`` of :func:`evaluate_sets`.

    Returns:
        For each mask what :func:`evaluate_sets` returns for a set.
    """
    numbers, drawn, columns = [], [], ["original"]
    for ratio, strategy in masks:
        sets = FixedSets({"": images}, mask_ratio=ratio, mask_strategy=strategy, **options)
        errors, draws, rows = sets._measure(model, "", dtype)
        numbers.append(sets._numbers(model, "", errors, draws, rows))
        drawn.append(rows[: len(images)])
        one_strategy = len({strategy for _, strategy in masks}) == 1
        columns += [f"{100 * ratio:g} % {'masked' if one_strategy else strategy}", "reconstruction"]
    together = []
    for name, rows in zip(names, zip(*drawn, strict=True), strict=False):
        pictures = [rows[0].pictures[-1], *(picture for row in rows for picture in row.pictures[:2])]
        errors = ", ".join(row.caption.partition("error ")[2].partition(",")[0] for row in rows)
        together.append(Row(pictures, f"errors {errors}", name))
    ours, filled = (", ".join(f"{n[key]:.3f}" for n in numbers) for key in ("mse", "mse_inverse_distance"))
    text = f"Errors over {len(images)} images: {ours}. Inverse-distance filling, without a model: {filled}"
    draw([Block("", text, together)], path, title=_title(when), note=sets._note(model), columns=columns)
    return numbers


def _title(when: str) -> str:
    return f"Masked autoencoder {when}".strip()


def rows_of(result: Reconstruction, bands: Sequence[int] = (0, 1, 2)) -> list[Row]:
    """Masked, reconstructed and original images as rows of a figure; ``bands`` as for :func:`evaluate_sets`."""
    masked, reconstruction, original = result.masked, result.reconstruction, result.original
    if original.shape[1] > 3:
        reconstruction, original = reconstruction[:, list(bands)], original[:, list(bands)]
        low, high = original.flatten(2).quantile(original.new_tensor(_QUANTILES), 2)[..., None, None]
        span = (high - low).clamp_min(1e-3)  # noise of a constant band stays noise
        reconstruction, original = (reconstruction - low) / span, (original - low) / span
        masked = original.where(result.visible, 0.5)
    pictures = zip(masked.cpu(), reconstruction.cpu(), original.cpu(), strict=True)
    hidden = 1 - result.visible.float().mean((1, 2, 3))
    errors = zip(hidden.tolist(), result.mse.tolist(), result.psnr.tolist(), strict=True)
    captions = [f"mask {100 * ratio:.0f} %, error {mse:.3f}, {psnr:.1f} dB" for ratio, mse, psnr in errors]
    return [Row(triplet, caption) for triplet, caption in zip(pictures, captions, strict=True)]


def _baseline_errors(result: Reconstruction, std: Tensor) -> dict[str, Tensor]:
    """(N,) by metric."""
    errors = {}
    for name, fill in _BASELINES.items():
        filled = fill(result.original, result.visible)
        errors[f"mse{name}"] = masked_error(filled, result.original, result.visible, std.view(1, -1, 1, 1))
        errors[f"psnr{name}"] = masked_psnr(filled, result.original, result.visible)
    return errors


def _describe(numbers: dict) -> str:
    count = f"{numbers['num_images']} image{'s' if numbers['num_images'] > 1 else ''}"
    masks = f" x {numbers['masks_per_image']} masks" if numbers["masks_per_image"] > 1 else ""
    if numbers["num_shown"] < numbers["num_images"]:
        count += f" ({numbers['num_shown']} shown)"
    return (
        f"Error {numbers['mse']:.3f} ({numbers['psnr']:.1f} dB) over {count}{masks}. Without a model, same masks: "
        f"mean visible colour {numbers['mse_mean_color']:.3f}, inverse-distance filling "
        f"{numbers['mse_inverse_distance']:.3f}"
    )
