"""What a file's first and last bytes say: its format, its size, its orientation, and whether it is whole.

Nothing is decoded. A JPEG counts as whole if an end-of-image marker follows the start of the scan, a PNG if its IEND
chunk is there, a WebP if the file is as long as its RIFF header says: a decoder that reads only a crop would not notice
a missing end, and would notice it for some crops only.
"""

from __future__ import annotations

from enum import IntEnum
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from PIL import Image


class Format(IntEnum):
    """Formats that every decoder here reads alike."""

    JPEG = 1
    PNG = 2
    WEBP = 3


class Header(NamedTuple):
    """An image file; ``height`` and ``width`` as stored, before ``orientation`` (EXIF, 1 to 8) turns it upright."""

    format: Format
    height: int
    width: int
    orientation: int


class BadImage(Exception):
    """Why a file cannot be trained on."""


_SUFFIXES = "jpg jpeg jpe jfif png webp gif avif heic heif bmp tif tiff jp2 jxl ppm pgm"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""A file with one of these suffixes is meant to be an image: if it cannot be read as one, it is reported."""

_OTHER_FORMATS = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"\0\0\0\x0cjP": "JPEG 2000"}
_END_OF_IMAGE = {Format.JPEG: b"\xff\xd9", Format.PNG: b"IEND\xaeB`\x82"}
_ORIENTATION_TAG = 0x0112


def detect_format(start: bytes) -> Format | None:
    """The format by the file's first 12 bytes, or None if it is not one that is read here."""
    if start.startswith(b"\xff\xd8\xff"):
        return Format.JPEG
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return Format.PNG
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return Format.WEBP
    return None


def read_header(path: Path | str) -> Header | None:
    """The header of an image file.

    Returns:
        The header, or None for a file that neither is an image nor is named like one.

    Raises:
        BadImage: the file is empty, truncated, unreadable or of a format that is not read here.
        OSError: the file system failed.
    """
    with open(path, "rb") as file:  # noqa: PTH123 - a million times over: building a Path costs more than opening
        start = file.read(16)
        format_ = detect_format(start)
        if format_ is None:
            if Path(path).suffix.lower() not in IMAGE_SUFFIXES:
                return None
            raise BadImage(_refusal(start))
        size = file.seek(0, 2)
        if format_ is Format.WEBP and size < (expected := int.from_bytes(start[4:8], "little") + 8):
            raise BadImage(f"truncated: {size} bytes of {expected}")
        file.seek(0)
        header, data_start = _parse(file, format_)
        if format_ in _END_OF_IMAGE:
            _check_end(file, _END_OF_IMAGE[format_], data_start, size)
        return header


def _refusal(start: bytes) -> str:
    if not start:
        return "empty file"
    name = next((name for magic, name in _OTHER_FORMATS.items() if start.startswith(magic)), None)
    if name is None and start[4:8] == b"ftyp":
        name = start[8:12].decode("ascii", "replace").upper()
    return f"{name} is not supported (JPEG, PNG and WebP are)" if name else "not a JPEG, PNG or WebP file"


def _parse(file: BufferedReader, format_: Format) -> tuple[Header, int]:
    try:
        with Image.open(file, formats=[format_.name]) as image:
            width, height = image.size
            animated = format_ is Format.WEBP and getattr(image, "is_animated", False)
            exif = image.info.get("exif")
            data_start = file.tell() if format_ is Format.JPEG else 8
    except OSError as error:
        if error.errno is not None:  # the file system's, not the parser's
            raise
        raise BadImage(f"unreadable header: {error}") from error
    except (ValueError, SyntaxError, IndexError, KeyError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(f"unreadable header: {error}") from error
    if animated:
        raise BadImage("an animation, not a photograph")
    return Header(format_, height, width, _orientation(exif)), data_start


def _orientation(exif_bytes: bytes | None) -> int:
    if not exif_bytes:
        return 1
    exif = Image.Exif()
    try:
        exif.load(exif_bytes)
        orientation = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # whatever is wrong inside a camera's notes, the pixels are good
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _check_end(file: BufferedReader, marker: bytes, data_start: int, size: int) -> None:
    file.seek(max(data_start, size - 64))
    if marker in file.read():
        return
    # Phones append films, and some servers padding: only such files are read to the end.
    file.seek(data_start)
    if marker not in file.read():
        raise BadImage(f"truncated: no end of image in {size} bytes")
