"""What the tests of the loaders share: files of every kind, and batches of both loaders."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.data import Dataset, create_loader, has_dali
from fastmae.data.decode import UndecodableImage, decode

needs_dali = pytest.mark.skipif(not has_dali(), reason="needs NVIDIA DALI")
KINDS = ["torch", pytest.param("dali", marks=needs_dali)]
OPTIONS = {"batch_size": 5, "img_size": (32, 48), "seed": 3}


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """A picture with structure at several scales, uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def noise(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image_file(format_: str, image: np.ndarray | Image.Image, **options) -> bytes:
    """An image file, with Pillow's options."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format_, **options)
    return file.getvalue()


def picture_bytes(seed: int) -> bytes:
    """A JPEG file of 64 x 64 pixels."""
    return image_file("JPEG", smooth(64, 64, seed), quality=90)


def refused_by_dali_alone(seed: int) -> bytes:
    """A JPEG file with one wrong bit, which torchvision decodes and DALI does not, found by trying."""
    import nvidia.dali.fn as fn
    from nvidia.dali import Pipeline

    whole, random, pipeline = picture_bytes(seed), np.random.default_rng(seed), None
    tables = whole.index(b"\xff\xc4"), whole.index(b"\xff\xda")  # behind the size, before the scan
    while True:
        damaged = bytearray(whole)
        damaged[random.integers(*tables)] ^= 1 << random.integers(8)
        content = np.frombuffer(bytes(damaged), np.uint8)
        try:
            if decode(content).shape != (64, 64, 3):
                continue
        except UndecodableImage:
            continue
        if pipeline is None:
            pipeline = Pipeline(1, 1, None, prefetch_queue_depth=1)
            with pipeline:
                pipeline.set_outputs(fn.decoders.image(fn.external_source(name="encoded")))
            pipeline.build()
        pipeline.feed_input("encoded", [content])
        try:
            pipeline.run()
        except RuntimeError:
            return bytes(damaged)


def rotated(orientation: int) -> Image.Exif:
    """EXIF data of an image that is stored turned."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


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
    content = (root / "cmyk.jpg").read_bytes()
    assert content[6:11] == b"Adobe"
    (root / "cmyk_unmarked.jpg").write_bytes(content[:2] + content[18:])
    (root / "ycck.jpg").write_bytes(content[:17] + b"\2" + content[18:])
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
        for suffix in ("jpg", "png", "webp"):
            Image.fromarray(smooth(60, 100, orientation)).save(
                root / f"turned{orientation}.{suffix}", exif=rotated(orientation)
            )
    return root


def take(dataset: Dataset, kind: str, count: int, **options):
    with create_loader(dataset, loader=kind, **(OPTIONS | options)) as loader:
        assert loader.kind == kind
        return [next(loader) for _ in range(count)]


def assert_equal(first, second) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def write_shards(root: Path, files: list[Path], per_shard: int) -> Path:
    """Pack files into tar shards, a few in each."""
    root.mkdir()
    for start in range(0, len(files), per_shard):
        with tarfile.open(root / f"part-{start:06}.tar", "w") as tar:
            for path in files[start : start + per_shard]:
                tar.add(path, arcname=path.name)
    return root


def write_source(kind: str, root: Path, count: int = 11) -> Path:
    """Small images of several sizes and formats as a ``"folder"``, as ``"shards"`` or by a ``"list"``."""
    folder = root / "images"
    folder.mkdir(parents=True)
    for i in range(count):
        suffix = ("jpg", "png", "webp")[i % 3]
        Image.fromarray(smooth(40 + 3 * i, 70 - 2 * i, i)).save(folder / f"{i:02}.{suffix}")
    files = sorted(folder.iterdir())
    if kind == "shards":
        return write_shards(root / "shards", files, per_shard=4)
    if kind == "list":
        listed = root / "list.txt"
        listed.write_text("".join(f"images/{path.name}\n" for path in reversed(files)))
        return listed
    return folder


def png(damaged: bool, seed: int = 0, size: tuple[int, int] = (40, 50)) -> bytes:
    """A PNG whose header and end are good; its pixels are not if ``damaged``."""
    data = bytearray(image_file("PNG", smooth(*size, seed)))
    if damaged:
        data[len(data) // 2] ^= 0xFF
    return bytes(data)
