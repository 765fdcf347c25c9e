"""Crops, flips and colour jitter as pure functions of (seed, epoch, sample id), for a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fastmae.ops.philox import Stream, random_words, to_unit

_TRIES = 10
Crop = Literal["random", "center", "fixed"]


@dataclass(frozen=True)
class Augment:
    """Crop, flips and colour jitter; the default is the paper's random resized crop (He et al. 2022, tables 1e and 8).

    The paper does not give the crop's scale; 0.2 to 1 is that of facebookresearch/mae. The rows of table 1e: "none" is
    ``crop="center", hflip=0``; "crop, fixed size" is ``crop="fixed"``; "crop, rand size" is the default; "crop + color
    jit" is the default with ``color_jitter``, usually 0.4.

    Attributes:
        scale: smallest and largest area of a random crop, as a share of the image's.
        ratio: smallest and largest aspect ratio of a random crop, width over height.
        hflip, vflip: probability of a horizontal and of a vertical flip.
        crop: ``"random"``, of random size and aspect ratio; ``"fixed"``, the largest of the training size's aspect
            ratio, at a random place; or ``"center"``, the same in the middle.
        color_jitter: strength s of brightness, contrast and saturation, each multiplied by a factor from 1 - s to
            1 + s, and of hue, turned by up to s / 4 of the circle (MoCo v2: 0.4, 0.4, 0.4, 0.1).
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    crop: Crop = "random"
    color_jitter: float = 0.0

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: expected 0 < smallest <= largest <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio: expected 0 < smallest <= largest, got {self.ratio}")
        for name in ("hflip", "vflip"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a probability from 0 to 1, got {value}")
        if self.crop not in get_args(Crop):
            raise ValueError(f"crop: expected 'random', 'center' or 'fixed', got {self.crop!r}")
        if not 0 <= self.color_jitter <= 2:
            raise ValueError(f"color_jitter: expected a strength from 0 to 2, got {self.color_jitter}")


def crop_boxes(
    sample_ids: np.ndarray,
    epochs: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    *,
    seed: int,
    augment: Augment,
    img_size: tuple[int, int] | None = None,
    stream: Stream = Stream.CROP,
) -> np.ndarray:
    """Crop boxes; random ones by the algorithm of ``torchvision.transforms.RandomResizedCrop.get_params``.

    Ten tries of an area and an aspect ratio (uniform in its logarithm); the first that fits is placed uniformly. If
    none fits, the centre of the image, cut to the nearest allowed aspect ratio.

    Args:
        sample_ids, epochs: int64 (n,), the keys of the draws.
        heights, widths: int64 (n,), pixels, of the upright images.
        img_size: height and width to which the crops will be resized; for ``crop="center"`` and ``"fixed"``.
        stream: of the random numbers.

    Returns:
        int64 (n, 4): top, left, height, width.
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    if augment.crop == "random":
        return _random_boxes(sample_ids, epochs, heights, widths, seed, augment, stream)
    if img_size is None:
        raise ValueError(f"img_size: needed for crop={augment.crop!r}")
    crop_h, crop_w = largest_size(heights, widths, img_size)
    if augment.crop == "center":
        return np.stack([(heights - crop_h) // 2, (widths - crop_w) // 2, crop_h, crop_w], 1)
    words = random_words(seed, epochs, sample_ids, stream, 2)
    return np.stack([*_place(words, heights - crop_h, widths - crop_w), crop_h, crop_w], 1)


def largest_size(heights: np.ndarray, widths: np.ndarray, img_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths, int64 (n,), of the largest boxes of the aspect ratio of ``img_size`` in images."""
    scale = np.minimum(heights / img_size[0], widths / img_size[1])
    crop_h = np.rint(img_size[0] * scale).astype(np.int64).clip(1, heights)
    return crop_h, np.rint(img_size[1] * scale).astype(np.int64).clip(1, widths)


def _random_boxes(sample_ids, epochs, heights, widths, seed: int, augment: Augment, stream: Stream) -> np.ndarray:
    words = random_words(seed, epochs, sample_ids, stream, 2 * _TRIES + 2)
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
    top, left = _place(words[:, -2:], heights - crop_h, widths - crop_w)
    if not found.all():
        central_h, central_w = _central_size(heights, widths, augment.ratio)
        crop_h, crop_w = np.where(found, crop_h, central_h), np.where(found, crop_w, central_w)
        top = np.where(found, top, (heights - crop_h) // 2)
        left = np.where(found, left, (widths - crop_w) // 2)
    return np.stack([top, left, crop_h, crop_w], 1)


def _place(words: np.ndarray, free_height: np.ndarray, free_width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # word * range < 2**63, and the upper bits of the product are uniform over the range.
    return (words[:, 0] * (free_height + 1)) >> 32, (words[:, 1] * (free_width + 1)) >> 32


def _central_size(heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    aspect = widths / heights
    crop_h = np.where(aspect < ratio[0], np.rint(widths / ratio[0]), heights)
    crop_w = np.where(aspect > ratio[1], np.rint(heights * ratio[1]), widths)
    return np.maximum(crop_h, 1).astype(np.int64), np.maximum(crop_w, 1).astype(np.int64)


def flips(sample_ids: np.ndarray, epochs: np.ndarray, *, seed: int, augment: Augment) -> np.ndarray:
    """Which samples to mirror: bool (n, 2), left and right, top and bottom."""
    return to_unit(random_words(seed, epochs, sample_ids, Stream.FLIP, 2)) < (augment.hflip, augment.vflip)


def jitter_factors(sample_ids: np.ndarray, epochs: np.ndarray, *, seed: int, augment: Augment) -> np.ndarray | None:
    """Factors of brightness, contrast and saturation, and the turn of hue as a share of the circle, from -0.5 to 0.5.

    Returns:
        float64 (n, 4), or None without jitter.
    """
    strength = augment.color_jitter
    if not strength:
        return None
    units = to_unit(random_words(seed, epochs, sample_ids, Stream.JITTER, 4))
    low = np.array([*[max(1 - strength, 0.0)] * 3, -strength / 4])
    high = np.array([*[1 + strength] * 3, strength / 4])
    return low + (high - low) * units


def jitter_into(out: np.ndarray, factors: np.ndarray) -> None:
    """Change an image's colours: brightness, contrast, saturation, hue, in this order, each by torchvision.

    Args:
        out: uint8 (height, width, 3), changed.
        factors: float64 (4,), a row of ``jitter_factors``.
    """
    import torchvision.transforms.functional as F
    from PIL import Image

    # On Pillow's images, because PyTorch's arithmetic would start a team of threads for each calling thread.
    image = Image.fromarray(out)
    brightness, contrast, saturation, hue = factors.tolist()
    image = F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(image, brightness), contrast), saturation)
    out[:] = np.asarray(F.adjust_hue(image, hue))
