"""What the tests of the loaders share: files of every kind, and batches of both loaders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.data import Dataset, create, create_loader

KINDS = [
    "torch",
    pytest.param("dali", marks=pytest.mark.skipif(not create.has_dali(), reason="needs NVIDIA DALI")),
]
OPTIONS = {"batch_size": 5, "img_size": (32, 48), "seed": 3}


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """A picture with structure at several scales, uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save_16_bit(path: Path, values: np.ndarray) -> None:
    Image.fromarray((values.astype(np.uint16) * 257) ^ 0x55).save(path)


def write_mixed(root: Path) -> Path:
    """One file of each format and mode that is accepted, odd sizes, and the EXIF orientations that matter."""
    image = Image.fromarray(smooth(90, 120, 0))
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(smooth(90, 120, 1)[..., 0]))
    image.save(root / "baseline.jpg", quality=95)
    image.save(root / "progressive.jpg", progressive=True)
    image.convert("L").save(root / "grey.jpg")
    image.convert("CMYK").save(root / "cmyk.jpg")
    image.save(root / "rgb.png")
    image.convert("L").save(root / "grey.png")
    image.convert("1").save(root / "bilevel.png")
    image.quantize(64).save(root / "palette.png")
    image.quantize(64).save(root / "palette_transparent.png", transparency=3)
    alpha.save(root / "rgba.png")
    alpha.convert("LA").save(root / "grey_alpha.png")
    save_16_bit(root / "grey16.png", smooth(90, 120, 2)[..., 0])
    image.save(root / "lossy.webp")
    alpha.save(root / "lossless.webp", lossless=True)
    Image.fromarray(smooth(2, 2, 3)).save(root / "tiny.png")
    Image.fromarray(smooth(3, 200, 4)).save(root / "long.png")
    for orientation in (3, 5, 6, 8):
        tags = Image.Exif()
        tags[0x0112] = orientation
        for suffix in ("jpg", "png", "webp"):
            Image.fromarray(smooth(60, 100, orientation)).save(root / f"turned{orientation}.{suffix}", exif=tags)
    return root


def take(dataset: Dataset, kind: str, count: int, **options):
    with create_loader(dataset, loader=kind, **(OPTIONS | options)) as loader:
        assert loader.kind == kind
        return [next(loader) for _ in range(count)]


def assert_equal(first, second) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
