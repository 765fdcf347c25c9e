"""Augmentation of labelled images as a function of (seed, epoch, image): RandAugment, random erasing, mixup, cutmix.

What is random is drawn on the host by Philox, from numbers that the sampler knows, so that nothing waits for a device.
Pixels change on the device of the batch, all images of one operation together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from fastmae.data.augment import Augment, crop_boxes
from fastmae.evaluate.features import to_device
from fastmae.ops.philox import Stream, random_words, to_unit
from fastmae.train.classification import LabelledDataConfig

LAYERS, APPLIED = 2, 0.5
"""RandAugment's operations per image, and the probability that each is applied (timm's ``rand-m9-mstd0.5-inc1``)."""
_ERASED = Augment(scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
"""Area and aspect ratio of an erased rectangle, as in timm."""


@dataclass(frozen=True)
class BatchAugment:
    """Everything random that happens to labelled images behind the loader, which crops and flips.

    Images are mixed in pairs of neighbours in the order of all ranks' images, where timm mixes the first with the last
    of a batch: pairs do not depend on batch size and ranks. Batches then hold an even number of images.

    Attributes:
        seed: of all draws.
        num_classes: K.
        config: what is done. RandAugment takes 8-bit images of three channels.
    """

    seed: int
    num_classes: int
    config: LabelledDataConfig

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.config.mixup > 0 or self.config.cutmix > 0

    def __call__(
        self,
        images: Tensor,
        labels: np.ndarray,
        sample_ids: np.ndarray,
        epochs: np.ndarray,
        normalized: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """A batch, augmented.

        Args:
            images: (N, C, H, W), of a loader: ``uint8``, or float32 in [0, 1].
            labels: int64 (N,), classes; -1 for unknown.
            sample_ids, epochs: int64 (N,), the keys of the draws.
            normalized: makes of a loader's images what the model takes.

        Returns:
            Images (N, C, H, W), ``uint8`` or float32 and normalised; and targets float32 (N, K), shares of the classes,
            which sum to 1, but to 0 for an image whose class is unknown.
        """
        keys, size, config = (self.seed, epochs, sample_ids), images.shape[-2:], self.config
        if config.randaugment:
            images = randaugment(images, *draw_operations(*keys, config.randaugment, config.randaugment_std))
        if (config.erasing or self.mixes) and images.dtype == torch.uint8:
            images = images.float() / 255  # noise and blends are not bytes
        images = normalized(images)
        if config.erasing:
            erase(images, *draw_erasing(*keys, size, config.erasing))
        targets = smoothed_targets(to_device(labels, images.device), self.num_classes, config.label_smoothing)
        if self.mixes:
            images, targets = mix(images, targets, *draw_mixing(*keys, size, config.mixup, config.cutmix))
        return images, targets


def smoothed_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """float32 (N, K): ``1 - smoothing`` on the class, and ``smoothing`` spread over all; zeros for a label of -1."""
    known = (labels >= 0)[:, None]
    one_hot = F.one_hot(labels.clamp(min=0), num_classes)
    return (one_hot * (1 - smoothing) + smoothing / num_classes) * known


# ---------------------------------------------------------------------------------------------------------------------
# RandAugment (Cubuk et al. 2020). Operations and scales are those of timm, "increasing": more magnitude, more change.


def draw_operations(
    seed: int, epochs: np.ndarray, sample_ids: np.ndarray, magnitude: float, std: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Operations (N, 2), numbers in ``OPERATIONS`` or -1 for none; their levels in [0, 1]; and signs -1 or 1."""
    words = random_words(seed, epochs, sample_ids, Stream.AUGMENT, 5 * LAYERS)
    applied, which, radius, angle, sign = np.moveaxis(to_unit(words).reshape(-1, LAYERS, 5), 2, 0)
    operations = np.where(applied < APPLIED, (which * len(OPERATIONS)).astype(np.int64), -1)
    normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * math.pi * angle)  # Box and Muller
    levels = (magnitude + std * normal).clip(0, 10) / 10
    return operations, levels, np.where(sign < 0.5, -1.0, 1.0)


def randaugment(images: Tensor, operations: np.ndarray, levels: np.ndarray, signs: np.ndarray) -> Tensor:
    """Images uint8 (N, 3, H, W), each with its operations applied in turn: a new tensor."""
    images, functions = images.clone(memory_format=torch.contiguous_format), list(OPERATIONS.values())
    values = to_device(np.stack([levels, signs]), images.device).float()[..., None, None, None]
    for layer in range(operations.shape[1]):
        order = np.argsort(operations[:, layer], kind="stable")  # images of one operation together, in one copy
        numbers, starts = np.unique(operations[order, layer], return_index=True)
        parts = to_device(order, images.device).tensor_split(starts[1:].tolist())
        for number, rows in zip(numbers.tolist(), parts, strict=True):
            if number >= 0:
                changed = functions[number](images[rows], *values[:, rows, layer])
                images.index_copy_(0, rows, changed.round().clamp(0, 255).to(torch.uint8))
    return images


Coefficient = Tensor | float


def _affine(
    x: Tensor,
    a: Coefficient = 1.0,
    b: Coefficient = 0.0,
    c: Coefficient = 0.0,
    d: Coefficient = 0.0,
    e: Coefficient = 1.0,
    f: Coefficient = 0.0,
) -> Tensor:
    """Each output pixel (x, y) from the input at (a x + b y + c, d x + e y + f), bilinearly, grey outside."""
    count, _, height, width = x.shape
    rows, columns = (torch.arange(side, device=x.device) + 0.5 for side in (height, width))
    rows = rows[:, None]
    # No matrix product: its rounding could depend on how many images there are.
    places = (a * columns + b * rows + c) * (2 / width) - 1, (d * columns + e * rows + f) * (2 / height) - 1
    grid = torch.stack([place.expand(count, 1, height, width) for place in places], -1)[:, 0]
    return F.grid_sample(x.float() - 128, grid, align_corners=False) + 128


def _rotate(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    angle = level * sign * math.radians(30)
    cos, sin, v, u = angle.cos(), angle.sin(), x.shape[-2] / 2, x.shape[-1] / 2  # about the middle (u, v)
    return _affine(x, cos, sin, u - cos * u - sin * v, -sin, cos, v + sin * u - cos * v)


def _grey(x: Tensor) -> Tensor:
    """Luma by ITU-R 601, in integers as Pillow computes it: (N, 1, H, W)."""
    red, green, blue = x.int().split(1, 1)
    return (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16


def _blend(x: Tensor, other: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """From ``other`` at a factor of 0 over the image at 1 and beyond."""
    return other + (x - other) * (1 + 0.9 * level * sign).clamp(min=0.1)


def _contrast(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    # A sum of integers does not depend on how it is divided among threads.
    mean = (_grey(x).sum((1, 2, 3), keepdim=True).double() / x[0, 0].numel() + 0.5).floor().float()
    return _blend(x.float(), mean, level, sign)


def _sharpness(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    kernel = torch.ones(3, 1, 3, 3, device=x.device)
    kernel[:, :, 1, 1] = 5
    x = x.float()
    smooth = x.clone()
    smooth[..., 1:-1, 1:-1] = (F.conv2d(x, kernel, groups=3) / 13).round()  # the border has no neighbours
    return _blend(x, smooth, level, sign)


def _posterize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    step = 2 ** (4 + (4 * level).floor())
    return (x / step).floor() * step


def _solarize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return torch.where(x < 256 - (256 * level).floor(), x, 255 - x)


def _solarize_add(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return torch.where(x < 128, (x + (110 * level).floor()).clamp(max=255), x.float())


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "AutoContrast": lambda x, level, sign: vision.autocontrast(x).float(),
    "Equalize": lambda x, level, sign: vision.equalize(x).float(),
    "Invert": lambda x, level, sign: (255 - x).float(),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": lambda x, level, sign: _solarize(x, level, sign).float(),
    "SolarizeAdd": _solarize_add,
    "Color": lambda x, level, sign: _blend(x.float(), _grey(x).float(), level, sign),
    "Contrast": _contrast,
    "Brightness": lambda x, level, sign: _blend(x.float(), torch.zeros_like(level), level, sign),
    "Sharpness": _sharpness,
    "ShearX": lambda x, level, sign: _affine(x, b=0.3 * level * sign),
    "ShearY": lambda x, level, sign: _affine(x, d=0.3 * level * sign),
    "TranslateX": lambda x, level, sign: _affine(x, c=0.45 * level * sign * x.shape[-1]),
    "TranslateY": lambda x, level, sign: _affine(x, f=0.45 * level * sign * x.shape[-2]),
}
"""By timm's names: ``uint8`` images (N, 3, H, W), levels in [0, 1] and signs (N, 1, 1, 1) to images 0 to 255."""


# ---------------------------------------------------------------------------------------------------------------------
# Random erasing (Zhong et al. 2020), mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019)


def draw_erasing(
    seed: int, epochs: np.ndarray, sample_ids: np.ndarray, size: tuple[int, int], probability: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles int64 (N, 4), top, left, height, width, all 0 where nothing is erased; seeds of the noise (N,)."""
    sides = (np.full(len(sample_ids), side) for side in size)
    options = {"seed": seed, "augment": _ERASED, "stream": Stream.ERASE}
    boxes = crop_boxes(sample_ids, epochs, *sides, **options)
    words = random_words(seed, epochs, sample_ids, Stream.ERASE, 3, draw=1)
    boxes[to_unit(words[:, 0]) >= probability] = 0
    return boxes, (words[:, 1] << 31) ^ words[:, 2]


def erase(images: Tensor, boxes: np.ndarray, seeds: np.ndarray) -> None:
    """Put standard normal noise into rectangles of normalised images (N, C, H, W)."""
    generator = torch.Generator(images.device)
    for row in np.flatnonzero(boxes[:, 2]).tolist():
        top, left, height, width = boxes[row].tolist()
        generator.manual_seed(int(seeds[row]))
        noise = torch.randn(images.shape[1], height, width, generator=generator, device=images.device)
        images[row, :, top : top + height, left : left + width] = noise


def draw_mixing(
    seed: int, epochs: np.ndarray, sample_ids: np.ndarray, size: tuple[int, int], mixup: float, cutmix: float
) -> tuple[np.ndarray, np.ndarray]:
    """How each image is mixed with its neighbour; an even number of images, of which two in a row are a pair.

    Returns:
        Shares (N,) of the image itself, and rectangles int64 (N, 4) that come from the neighbour: height 0 for mixup.
    """
    height, width = size
    cuts, share, y, x = to_unit(random_words(seed, epochs[::2], sample_ids[::2], Stream.MIX, 4)).T
    cuts = cuts < 0.5 if mixup and cutmix else np.full(len(cuts), cutmix > 0)
    alpha = np.where(cuts, cutmix, mixup)
    share = betaincinv(alpha, alpha, share)
    sides = [(side * np.sqrt(1 - share)).astype(np.int64) for side in size]
    middles = (y * height).astype(np.int64), (x * width).astype(np.int64)
    corners = [
        [(middle + part).clip(0, limit) for part in (-(side // 2), side // 2)]
        for middle, side, limit in zip(middles, sides, size, strict=True)
    ]
    (top, bottom), (left, right) = corners
    boxes = np.stack([top, left, bottom - top, right - left], 1) * cuts[:, None]
    share = np.where(cuts, 1 - boxes[:, 2] * boxes[:, 3] / (height * width), share)
    return share.repeat(2), boxes.repeat(2, 0)


def mix(images: Tensor, targets: Tensor, shares: np.ndarray, boxes: np.ndarray) -> tuple[Tensor, Tensor]:
    """Normalised images and targets, mixed as :func:`draw_mixing` says: new tensors."""
    device, count = images.device, len(images)
    partner = torch.arange(count, device=device) ^ 1
    own = to_device(shares, device).float()
    top, left, height, width = to_device(boxes, device).T[..., None, None, None]
    y, x = (torch.arange(n, device=device) for n in images.shape[-2:])
    inside = (y[:, None] >= top) & (y[:, None] < top + height) & (x >= left) & (x < left + width)
    weight = torch.where(height > 0, (~inside).float(), own[:, None, None, None])
    return images[partner].lerp(images, weight), targets[partner].lerp(targets, own[:, None])
