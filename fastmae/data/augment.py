"""Random crops and flips as pure functions of (seed, epoch, sample id), for a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmae.ops.philox import Stream, random_words, to_unit

_TRIES = 10


@dataclass(frozen=True)
class Augment:
    """Random resized crop and flips; the defaults are those of He et al. 2022, appendix A.1.

    Attributes:
        scale: smallest and largest area of the crop, as a share of the image's.
        ratio: smallest and largest aspect ratio of the crop, width over height.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip, for pictures that have no up and down (or are very few).
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: expected 0 < smallest <= largest <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio: expected 0 < smallest <= largest, got {self.ratio}")
        for name in ("hflip", "vflip"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a probability from 0 to 1, got {value}")


def crop_boxes(
    sample_ids: np.ndarray, epochs: np.ndarray, heights: np.ndarray, widths: np.ndarray, *, seed: int, augment: Augment
) -> np.ndarray:
    """Crop boxes by the algorithm of ``torchvision.transforms.RandomResizedCrop.get_params``.

    Ten tries of an area and an aspect ratio (uniform in its logarithm); the first that fits is placed uniformly. If
    none fits, the centre of the image, cut to the nearest allowed aspect ratio.

    Args:
        sample_ids, epochs: int64 (n,), the keys of the draws.
        heights, widths: int64 (n,), pixels, of the upright images.

    Returns:
        int64 (n, 4): top, left, height, width.
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    words = random_words(seed, epochs, sample_ids, Stream.CROP, 2 * _TRIES + 2)
    units = to_unit(words)
    smallest, largest = augment.scale
    area = (heights * widths)[:, None] * (smallest + (largest - smallest) * units[:, :_TRIES])
    narrow, wide = np.log(augment.ratio)
    ratio = np.exp(narrow + (wide - narrow) * units[:, _TRIES : 2 * _TRIES])
    crop_w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    crop_h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (crop_w > 0) & (crop_w <= widths[:, None]) & (crop_h > 0) & (crop_h <= heights[:, None])
    first, rows = fits.argmax(1), np.arange(len(fits))
    crop_h, crop_w, found = crop_h[rows, first], crop_w[rows, first], fits.any(1)
    # word * range < 2**63, and the upper bits of the product are uniform over the range.
    top = (words[:, -2] * (heights - crop_h + 1)) >> 32
    left = (words[:, -1] * (widths - crop_w + 1)) >> 32
    if not found.all():
        central_h, central_w = _central_size(heights, widths, augment.ratio)
        crop_h, crop_w = np.where(found, crop_h, central_h), np.where(found, crop_w, central_w)
        top = np.where(found, top, (heights - crop_h) // 2)
        left = np.where(found, left, (widths - crop_w) // 2)
    return np.stack([top, left, crop_h, crop_w], 1)


def _central_size(heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    aspect = widths / heights
    crop_h = np.where(aspect < ratio[0], np.rint(widths / ratio[0]), heights)
    crop_w = np.where(aspect > ratio[1], np.rint(heights * ratio[1]), widths)
    return np.maximum(crop_h, 1).astype(np.int64), np.maximum(crop_w, 1).astype(np.int64)


def flips(sample_ids: np.ndarray, epochs: np.ndarray, *, seed: int, augment: Augment) -> np.ndarray:
    """Which samples to mirror: bool (n, 2), left and right, top and bottom."""
    return to_unit(random_words(seed, epochs, sample_ids, Stream.FLIP, 2)) < (augment.hflip, augment.vflip)
