"""What a file's first and last bytes say: its format, size, channels and orientation, and whether it is whole.

Nothing is decoded. A JPEG counts as whole if an end-of-image marker follows the start of the scan, a PNG if its IEND
chunk is there, a WebP if the file is as long as its RIFF header says, a TIFF and an array if their pixels end inside
the file: a decoder that reads only a crop would not notice a missing end, or would notice it for some crops only.
"""

from __future__ import annotations

import math
from enum import IntEnum
from io import BufferedIOBase, BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image


class Format(IntEnum):
    """Formats that are read. The first three are those of photographs, which every decoder here reads alike."""

    JPEG = 1
    PNG = 2
    WEBP = 3
    TIFF = 4
    NPY = 5


_SUFFIXES = "jpg jpeg jpe jfif png webp gif avif heic heif bmp tif tiff npy jp2 jxl ppm pgm"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""A file with one of these suffixes is meant to be an image: if it cannot be read as one, it is reported."""
EXPECTED = "JPEG, PNG, WebP, TIFF or NumPy (.npy)"
_VALUES = ("bool", "uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64")
MODES = ("", "1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "RGB;16", "RGBA;16",
         *_VALUES)  # fmt: skip
"""Modes by the numbers that the index stores."""
READY_MODES = ("bool", "uint8")
"""Of the values of TIFF and NumPy files, those that need no range to become uint8."""
_GREY = {"1", "L", "LA", "I", "I;16"}
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_STARTS = {Format.JPEG: (b"\xff\xd8\xff",), Format.PNG: (b"\x89PNG\r\n\x1a\n",), Format.TIFF: _TIFF_STARTS,
           Format.NPY: (b"\x93NUMPY",)}  # fmt: skip
_OTHER_FORMATS = {b"GIF8": "GIF", b"BM": "BMP", b"\0\0\0\x0cjP": "JPEG 2000", b"\xff\x0a": "JPEG XL"}
_END_OF_IMAGE = {Format.JPEG: b"\xff\xd9", Format.PNG: b"IEND\xaeB`\x82"}
_ORIENTATION_TAG = 0x0112
_MOST_SIDE = 1 << 32  # what a row of the index holds
_NPY_HEADER = 65536  # bytes, more than NumPy accepts, whatever length a damaged file claims
_CHUNK = 1 << 20
_PNG_DEPTH = 24
"""Where a PNG states its bits a sample."""
COLOR_16 = ("RGB;16", "RGBA;16")
"""Photographs that only come with the upper 8 of their bits: no decoder here gives all of them."""
_NO_FRAME = (0xC4, 0xC8, 0xCC)
"""Markers among those of JPEG frames, 0xC0 to 0xCF, that are not frames: tables and extensions."""


class Header(NamedTuple):
    """An image file.

    Attributes:
        format: by its content, whatever its name.
        height, width: as stored, before ``orientation`` turns the image upright.
        orientation: EXIF, 1 to 8.
        channels: of the decoded image, alpha and palettes aside: 1 or 3 for a photograph, any number else.
        mode: Pillow's name of the pixels (``"L"``, ``"RGB"``, ``"CMYK"``, ...), or NumPy's (``"uint16"``, ...).
    """

    format: Format
    height: int
    width: int
    orientation: int
    channels: int
    mode: str


class BadImage(Exception):
    """Why a file cannot be trained on."""


def detect_format(start: bytes) -> Format | None:
    """The format by the file's first 12 bytes, or None if it is not one that is read here."""
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return Format.WEBP
    return next((format_ for format_, starts in _STARTS.items() if start.startswith(starts)), None)


def read_header(path: Path | str) -> Header | None:
    """The header of an image file; see ``parse_header``."""
    with open(path, "rb") as file:  # noqa: PTH123 - a million times over: building a Path costs more than opening
        return parse_header(file, str(path))


def parse_header(file: BufferedIOBase, name: str) -> Header | None:
    """The header of an image.

    Args:
        file: its bytes, at their beginning; can seek.
        name: what it is called, for its suffix.

    Returns:
        The header, or None for a file that neither is an image nor is named like one.

    Raises:
        BadImage: the file is empty, truncated, unreadable or of a format that is not read here; whatever is wrong with
            its bytes, nothing else is raised.
        OSError: the file system failed.
    """
    start = file.read(16)
    format_ = detect_format(start)
    if format_ is None:
        if PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
            return None
        raise BadImage(_refusal(start))
    if format_ in (Format.TIFF, Format.NPY) and PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
        return None  # raw files of cameras begin like a TIFF; and an array is an image only if it says so
    size = file.seek(0, 2)
    if format_ is Format.WEBP and size < (expected := int.from_bytes(start[4:8], "little") + 8):
        raise BadImage(f"truncated: {size} bytes of {expected}")
    file.seek(0)
    try:
        if format_ is Format.TIFF:
            header, data_start = _parse_tiff(file, size), 0
        elif format_ is Format.NPY:
            header, data_start = _parse_npy(file, size), 0
        else:
            header, data_start = _parse_photograph(file, format_)
    except OSError as error:
        if error.errno is not None:  # the file system's, not the parser's
            raise
        raise BadImage(f"unreadable header: {error}") from error
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"huge: {error}") from error
    except Exception as error:  # parsers raise whatever they like at damaged bytes
        raise BadImage(f"unreadable header: {error}") from error
    sides = header.height, header.width, header.channels
    if not all(isinstance(side, int) and 0 < side < _MOST_SIDE for side in sides):  # a damaged TIFF may have tuples
        raise BadImage("a size of {!s:.20} x {!s:.20} x {!s:.20}: expected whole numbers above 0".format(*sides))
    if format_ in _END_OF_IMAGE:
        _check_end(file, _END_OF_IMAGE[format_], data_start, size)
    return header


def _refusal(start: bytes) -> str:
    if not start:
        return "empty file"
    name = next((name for magic, name in _OTHER_FORMATS.items() if start.startswith(magic)), None)
    if name is None and start[4:8] == b"ftyp":
        name = start[8:12].decode("ascii", "replace").upper()
    return f"{name} is not supported ({EXPECTED} are)" if name else f"not a {EXPECTED} file"


def _parse_photograph(file: BufferedIOBase, format_: Format) -> tuple[Header, int]:
    with Image.open(file, formats=[format_.name]) as image:
        width, height = image.size
        animated = format_ is Format.WEBP and getattr(image, "is_animated", False)
        exif, mode = image.info.get("exif"), image.mode
        data_start = file.tell() if format_ is Format.JPEG else 8
        if format_ is Format.PNG and mode in ("RGB", "RGBA"):
            file.seek(_PNG_DEPTH)
            mode += ";16" if file.read(1) == b"\x10" else ""  # of which Pillow tells nothing
    if animated:
        raise BadImage("an animation, not a photograph")
    return Header(format_, height, width, _orientation(exif), 1 if mode in _GREY else 3, mode), data_start


def _parse_tiff(file: BufferedIOBase, size: int) -> Header:
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        same = [other for other in tiff.pages[1:] if other.shape == page.shape]
        if same:
            raise BadImage(f"{1 + len(same)} pages of one size: expected a single image; split it")
        if page.photometric is not None and page.photometric.name in ("PALETTE", "CFA"):
            raise BadImage(f"a TIFF of {page.photometric.name} pixels is not supported; convert it to RGB")
        if not _can_decompress(page.compression):
            name = getattr(page.compression, "name", page.compression)
            raise BadImage(f"{name} compression needs a package: pip install 'fastmae[tiff]'")
        if page.imagedepth != 1:
            raise BadImage(f"a volume of depth {page.imagedepth}: expected an image; split it into slices")
        end = max((o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
        if end > size:
            raise BadImage(f"truncated: {size} bytes of {end}")
        dtype = _pixel_type(np.dtype(page.dtype) if page.dtype is not None else np.dtype("V1"))
        orientation = page.tags.valueof(_ORIENTATION_TAG, default=1)
        return Header(
            Format.TIFF, page.imagelength, page.imagewidth, _in_range(orientation), page.samplesperpixel, dtype
        )


def _can_decompress(compression: int) -> bool:
    """Whether tifffile has what it takes; some of its decoders find out only when they are called."""
    import tifffile

    try:
        tifffile.TIFF.DECOMPRESSORS[compression](b"")
    except (KeyError, ImportError):
        return False
    except Exception:  # nothing is no compressed data
        return True
    return True


def _parse_npy(file: BufferedIOBase, size: int) -> Header:
    start = BytesIO(file.read(_NPY_HEADER))
    version = np.lib.format.read_magic(start)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(start)
    if not 2 <= len(shape) <= 3 or min(shape) < 1:
        raise BadImage(f"an array of shape {shape}: expected (height, width) or (height, width, channels)")
    end = start.tell() + math.prod(shape) * dtype.itemsize
    if size < end:
        raise BadImage(f"truncated: {size} bytes of {end}")
    return Header(Format.NPY, shape[0], shape[1], 1, shape[2] if len(shape) == 3 else 1, _pixel_type(dtype))


def _pixel_type(dtype: np.dtype) -> str:
    name = dtype.newbyteorder("=").name
    if name not in _VALUES:
        raise BadImage(f"pixels of type {name} are not supported ({', '.join(_VALUES)} are)")
    return name


def _orientation(exif_bytes: bytes | None) -> int:
    if not exif_bytes:
        return 1
    exif = Image.Exif()
    try:
        exif.load(exif_bytes)
        return _in_range(exif.get(_ORIENTATION_TAG, 1))
    except Exception:  # whatever is wrong inside a camera's notes, the pixels are good
        return 1


def _in_range(orientation: object) -> int:
    return int(orientation) if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _check_end(file: BufferedIOBase, marker: bytes, data_start: int, size: int) -> None:
    file.seek(max(data_start, size - 64))
    if marker in file.read():
        return
    # Phones append films, and some servers padding: only such files are read to the end.
    file.seek(data_start)
    before = b""
    while chunk := file.read(_CHUNK):
        if marker in before + chunk:
            return
        before = chunk[-len(marker) :]
    raise BadImage(f"truncated: no end of image in {size} bytes")


def stored_size(encoded: np.ndarray) -> tuple[int, int] | None:
    """Height and width that the header of a JPEG, PNG or WebP file names, before any EXIF orientation.

    Args:
        encoded: uint8 (bytes,), the file.

    Returns:
        None if there is no such header.
    """
    start = encoded[:32].tobytes()
    if start.startswith(b"\xff\xd8"):
        return _jpeg(memoryview(encoded))
    if start.startswith(b"\x89PNG\r\n\x1a\n") and start[12:16] == b"IHDR":
        return int.from_bytes(start[20:24], "big"), int.from_bytes(start[16:20], "big")
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return _webp(start)
    return None


def _jpeg(data: memoryview) -> tuple[int, int] | None:
    """ITU-T T.81, annex B: segments one after the other, each with its length, up to the frame's header."""
    at, end = 2, len(data) - 9
    while at <= end:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            return data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
        length = data[at + 2] << 8 | data[at + 3]
        if marker in (0x00, 0xD9, 0xDA) or length < 2:
            return None
        at += 2 + length
    return None


def _webp(start: bytes) -> tuple[int, int] | None:
    """The WebP container specification: extended, lossless and lossy files."""
    kind, data = start[12:16], start[20:]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[7:10], "little"), 1 + int.from_bytes(data[4:7], "little")
    if kind == b"VP8L" and data[0] == 0x2F:
        bits = int.from_bytes(data[1:5], "little")
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    if kind == b"VP8 " and data[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(data[8:10], "little") & 0x3FFF, int.from_bytes(data[6:8], "little") & 0x3FFF
    return None
