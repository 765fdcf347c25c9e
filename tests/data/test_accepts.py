"""Which images a data set is for: decided from headers, before training."""

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
from loading import image_file
from PIL import Image

from fastmae.data import DataError, choose_loader, has_dali, open_dataset


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
    if mode == "I;16":
        return image_file(format_, Image.fromarray(values(20, 30, dtype="uint16")))
    return image_file(format_, Image.fromarray(values(20, 30, 3)).convert(mode))


def png(width: int, height: int, rows: bytes, bits: int = 8) -> bytes:
    """Colour of 16 bits, which Pillow does not write, or a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


DEEP = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(">u2")
DEEP_PNG = png(30, 20, b"".join(b"\0" + row.tobytes() for row in DEEP), bits=16)
PLAIN_TIFF = tiff(values(20, 30, 3), photometric="rgb")
COMPRESSION = struct.Struct("<HHIHH")
ZSTD_TIFF = PLAIN_TIFF.replace(COMPRESSION.pack(259, 3, 1, 1, 0), COMPRESSION.pack(259, 3, 1, 50000, 0))
RANGE = {"value_range": (0, 255)}
BANDS = values(20, 30, 13)


def write(root: Path, files: dict[str, bytes]) -> Path:
    root.mkdir(exist_ok=True)
    for name, content in files.items():
        (root / name).write_bytes(content)
    return root


GOOD = {
    "colour": (3, {}, {f"{m}.{f}".lower(): picture(m, f) for m, f in [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"),
               ("P", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("RGB", "WEBP"), ("1", "PNG")]}
               | {"c.tif": PLAIN_TIFF, "g.tiff": tiff(values(20, 30)), "a.npy": npy(values(20, 30, 3)),
                  "g.npy": npy(values(20, 30)), "deep.png": DEEP_PNG}),
    "grey": (1, {}, {"g.jpg": picture("L", "JPEG"), "g.png": picture("I;16", "PNG"), "g.npy": npy(values(20, 30)),
                     "h.npy": npy(values(20, 30, 1)), "g.tif": tiff(values(20, 30))}),
    "thirteen bands": (13, RANGE, {f"{dtype}.npy": npy(BANDS.astype(dtype)) for dtype in
                                   ("uint8", "uint16", "int16", "float32", "float64", ">u2")}
                       | {"b.tif": tiff(BANDS, photometric="minisblack", planarconfig="contig"),
                          "p.tif": tiff(values(13, 20, 30), planarconfig="separate", photometric="minisblack")}),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_accepted_images_decode_to_what_the_header_says(tmp_path, kind):
    channels, options, files = GOOD[kind]
    root = write(tmp_path / "images", files)
    dataset = open_dataset(root, channels=channels, cache_dir=tmp_path / "cache", max_bad_fraction=0, **options)
    assert len(dataset) == len(files)
    for i in range(len(dataset)):
        pixels = dataset.decode(i)
        assert (dataset.shape(i), pixels.shape) == ((20, 30), (20, 30, channels)), dataset.path(i)
        assert pixels.dtype == (np.float32 if options else np.uint8)
        if dataset.path(i).endswith("deep.png"):
            assert np.abs(pixels - (DEEP >> 8).astype(int)).max() <= 1


REFUSED = [
    (3, {}, {
        "beyond.png": (png(60000, 60000, b""), "huge: "),
        "bands.npy": (npy(BANDS), "13 channels: expected 3 (--model.in-chans 13)"),
        "planes.npy": (npy(values(13, 20, 30)), "looks channels-first: --data.channels-first --model.in-chans 13"),
        "cut.tif": (PLAIN_TIFF[:-9], "truncated"),
        "cut.npy": (npy(values(20, 30, 3))[:-9], "truncated"),
        "a.gif": (b"GIF89a" + bytes(40), "GIF is not supported"),
        "broken.npy": (b"\x93NUMPY\x01\x00\x10\x00{'descr': garbage", "unreadable header"),
        "broken.tif": (b"II*\0\xff\xff\xff\xff" + bytes(100), "unreadable header")}),
    (3, {"max_pixels": 1000}, {"large.npy": (npy(values(40, 40, 3)), "huge: 40 x 40 pixels, more than --data.max-p")}),
    (3, RANGE, {"deep.png": (DEEP_PNG, "16-bit colour PNG")}),
    (4, {}, {"photo.png": (picture("RGBA", "PNG"), "3 channels: expected 4")}),
    (1, {}, {
        "colour.jpg": (picture("RGB", "JPEG"), "3 channels: expected 1"),
        "sixteen.tif": (tiff(values(20, 30, dtype="uint16")), "uint16 pixels: expected uint8, or --data.value-range"),
        "real.npy": (npy(values(20, 30, dtype="float32")), "float32 pixels: expected uint8, or --data.value-range"),
        "volume.npy": (npy(values(5, 20, 30, 2)), "(5, 20, 30, 2): expected (height, width)"),
        "pages.tif": (tiff(values(4, 20, 30), photometric="minisblack"), "4 pages of one size"),
        "object.npy": (npy(np.array([[{}]]), allow_pickle=True), "type object")}),
    (1, RANGE, {"complex.npy": (npy(values(20, 30, dtype="complex64")), "type complex64 are not supported")}),
]  # fmt: skip
if not (find_spec("imagecodecs") or find_spec("compression")):
    REFUSED[0][2]["lzw.tif"] = image_file("TIFF", values(20, 30, 3), compression="tiff_lzw"), "LZW compression needs"
    REFUSED[0][2]["zstd.tif"] = ZSTD_TIFF, "ZSTD compression needs a package"


@pytest.mark.parametrize(("channels", "options", "files"), REFUSED)
def test_refusals_name_the_reason(tmp_path, channels, options, files):
    contents = {name: content for name, (content, _) in files.items()}
    contents["good.npy"] = npy(values(20, 30, channels))
    root = write(tmp_path / "images", contents)
    options = {"channels": channels, "max_bad_fraction": 1, "cache_dir": tmp_path / "cache", **options}
    found = {os.path.relpath(bad.path, root): bad.reason for bad in open_dataset(root, **options).bad}
    assert sorted(found) == sorted(files)
    assert not {name: reason for name, reason in found.items() if files[name][1] not in reason}


def test_arrays_beside_images_that_are_not_meant_are_left_aside(tmp_path):
    files = {"a.jpg": picture("RGB", "JPEG"), "raw.cr2": PLAIN_TIFF, "x.bin": npy(values(3, 3))}
    dataset = open_dataset(write(tmp_path / "images", files), cache_dir=tmp_path / "cache", max_bad_fraction=0)
    assert len(dataset) == 1


@pytest.mark.skipif(not has_dali(), reason="needs NVIDIA DALI")
def test_dali_is_for_photographs(tmp_path):
    root, options = write(tmp_path / "images", {"a.jpg": picture("RGB", "JPEG")}), {"cache_dir": tmp_path / "cache"}
    assert choose_loader(open_dataset(root, **options)) == "dali"
    assert choose_loader(open_dataset(root, **RANGE, **options)) == "torch"
    write(root, {"b.tif": PLAIN_TIFF})
    dataset = open_dataset(root, **options)
    assert choose_loader(dataset) == "torch"
    with pytest.raises(DataError, match="has TIFF files: use torch"):
        choose_loader(dataset, "dali")
