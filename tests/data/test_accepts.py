"""Which images a data set is for: decided from headers, before training, and cheap at any number of images."""

from __future__ import annotations

import io
import os
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from fastmae.data import DataError, choose_loader, has_dali, open_dataset
from fastmae.data.formats import Format


def values(*shape: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def tiff(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def npy(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def picture(mode: str, format_: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(values(20, 30, 3))
    (Image.fromarray(values(20, 30, dtype="uint16")) if mode == "I;16" else image.convert(mode)).save(buffer, format_)
    return buffer.getvalue()


def lzw_tiff() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values(20, 30, 3)).save(buffer, "TIFF", compression="tiff_lzw")
    return buffer.getvalue()


def zstd_tiff() -> bytes:
    """A TIFF that says it is compressed by Zstandard; its header is all that is read."""
    plain = tiff(values(20, 30, 3), photometric="rgb")
    tag = struct.pack("<HHIHH", 259, 3, 1, 1, 0)
    assert plain.count(tag) == 1
    return plain.replace(tag, struct.pack("<HHIHH", 259, 3, 1, 50000, 0))


def rgb_png(width: int, height: int, rows: bytes, bits: int = 8) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def huge_png(width: int, height: int) -> bytes:
    """The header of a decompression bomb, and an end."""
    return rgb_png(width, height, b"\0" * 99)


def deep_png() -> bytes:
    """Colour of 16 bits, which Pillow does not write."""
    values = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(">u2")
    return rgb_png(30, 20, b"".join(b"\0" + row.tobytes() for row in values), bits=16)


def reasons(tmp_path: Path, files: dict[str, bytes], **options) -> dict[str, str]:
    """Why files are refused, by name; a good file stands beside them."""
    root = tmp_path / "images"
    root.mkdir(exist_ok=True)
    for name, content in files.items():
        (root / name).write_bytes(content)
    dataset = open_dataset(root, max_bad_fraction=1, cache_dir=tmp_path / "cache", **options)
    return {os.path.relpath(bad.path, root): bad.reason for bad in dataset.bad}


RANGE = {"value_range": (0, 255)}
GOOD = {
    "colour": (3, {}, {f"{m}.{f}".lower(): picture(m, f) for m, f in [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"),
               ("P", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("RGB", "WEBP"), ("1", "PNG")]}
               | {"c.tif": tiff(values(20, 30, 3)), "g.tiff": tiff(values(20, 30)), "a.npy": npy(values(20, 30, 3)),
                  "g.npy": npy(values(20, 30))}),
    "grey": (1, {}, {"g.jpg": picture("L", "JPEG"), "g.png": picture("I;16", "PNG"), "g.npy": npy(values(20, 30)),
                     "h.npy": npy(values(20, 30, 1)), "g.tif": tiff(values(20, 30))}),
    "thirteen bands": (13, RANGE, {
        "a.npy": npy(values(20, 30, 13)),
        "b.tif": tiff(values(20, 30, 13), photometric="minisblack", planarconfig="contig"),
        "planar.tif": tiff(values(13, 20, 30), planarconfig="separate", photometric="minisblack"),
        "sixteen.npy": npy(values(20, 30, 13, dtype="uint16")),
        "real.npy": npy(values(20, 30, 13, dtype="float32")),
        "signed.npy": npy(values(20, 30, 13, dtype="int16")),
        "double.npy": npy(values(20, 30, 13, dtype="float64")),
        "other byte order.npy": npy(values(20, 30, 13).astype(">u2"))}),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_accepted_images_decode_to_what_the_header_says(tmp_path, kind):
    channels, options, files = GOOD[kind]
    assert reasons(tmp_path, files, channels=channels, **options) == {}
    dataset = open_dataset(tmp_path / "images", channels=channels, cache_dir=tmp_path / "cache", **options)
    assert len(dataset) == len(files)
    for i in range(len(dataset)):
        assert dataset.shape(i) == (20, 30)
        pixels = dataset.decode(i)
        assert pixels.shape == (20, 30, channels), dataset.path(i)
        assert pixels.dtype == (np.float32 if options else np.uint8)


REFUSED = {
    "bomb.png": (3, huge_png(20000, 8000), {"max_pixels": 100_000_000}, "huge: 8000 x 20000 pixels, more than --data"),
    "beyond.png": (3, huge_png(60000, 60000), {}, "huge: "),
    "large.npy": (3, npy(values(40, 40, 3)), {"max_pixels": 1000}, "huge: 40 x 40"),
    "bands.npy": (3, npy(values(20, 30, 13)), {}, "13 channels: expected 3"),
    "colour.jpg": (1, picture("RGB", "JPEG"), {}, "3 channels: expected 1"),
    "photo.png": (4, picture("RGBA", "PNG"), {}, "3 channels: expected 4"),
    "sixteen.tif": (1, tiff(values(20, 30, dtype="uint16")), {}, "uint16 pixels: expected uint8, or --data.value"),
    "real.npy": (1, npy(values(20, 30, dtype="float32")), {}, "float32 pixels: expected uint8, or --data.value-range"),
    "complex.npy": (1, npy(values(20, 30, dtype="complex64")), RANGE, "type complex64 are not supported"),
    "volume.npy": (1, npy(values(5, 20, 30, 2)), {}, "(5, 20, 30, 2): expected (height, width)"),
    "pages.tif": (1, tiff(values(4, 20, 30), photometric="minisblack"), {}, "4 pages of one size"),
    "lzw.tif": (3, lzw_tiff(), {}, "LZW compression needs a package"),
    "zstd.tif": (3, zstd_tiff(), {}, "ZSTD compression needs a package"),
    "deep.png": (3, deep_png(), RANGE, "16-bit colour PNG"),
    "cut.tif": (3, tiff(values(20, 30, 3))[:-9], {}, "truncated"),
    "cut.npy": (3, npy(values(20, 30, 3))[:-9], {}, "truncated"),
    "object.npy": (1, npy(np.array([[{}]]), allow_pickle=True), {}, "type object"),
    "broken.npy": (1, b"\x93NUMPY\x01\x00\x10\x00{'descr': garbage", {}, "unreadable header"),
    "broken.tif": (1, b"II*\0\xff\xff\xff\xff" + bytes(100), {}, "unreadable header"),
}  # fmt: skip


def test_16_bit_colour_comes_with_its_upper_bits(tmp_path):
    assert reasons(tmp_path, {"deep.png": deep_png()}) == {}
    dataset = open_dataset(tmp_path / "images", cache_dir=tmp_path / "cache")
    expected = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)) >> 8
    assert np.abs(dataset.decode(0).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_reason(tmp_path, name):
    if name in ("lzw.tif", "zstd.tif") and (find_spec("imagecodecs") or find_spec("compression")):
        pytest.skip("the decoders are installed, so nothing is missing")
    channels, content, options, expected = REFUSED[name]
    good = {"good.npy": npy(values(20, 30, channels))}
    found = reasons(tmp_path, {name: content} | good, channels=channels, **options)
    assert list(found) == [name]
    assert expected in found[name]


def test_arrays_beside_images_that_are_not_meant_are_left_aside(tmp_path):
    assert (
        reasons(
            tmp_path, {"a.jpg": picture("RGB", "JPEG"), "raw.cr2": tiff(values(20, 30, 3)), "x.bin": npy(values(3, 3))}
        )
        == {}
    )
    assert len(open_dataset(tmp_path / "images", cache_dir=tmp_path / "cache")) == 1


@pytest.mark.skipif(not has_dali(), reason="needs NVIDIA DALI")
def test_dali_is_for_photographs(tmp_path):
    reasons(tmp_path, {"a.jpg": picture("RGB", "JPEG")})
    options = {"cache_dir": tmp_path / "cache"}
    assert choose_loader(open_dataset(tmp_path / "images", **options)) == "dali"
    assert choose_loader(open_dataset(tmp_path / "images", **RANGE, **options)) == "torch"
    reasons(tmp_path, {"b.tif": tiff(values(20, 30, 3))})
    dataset = open_dataset(tmp_path / "images", **options)
    assert dataset.formats == {Format.JPEG, Format.TIFF}
    assert choose_loader(dataset) == "torch"
    with pytest.raises(DataError, match="has TIFF files: use torch"):
        choose_loader(dataset, "dali")
