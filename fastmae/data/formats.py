"""Reads the header of an image file: format, size, mode and orientation, and whether the file is whole.

Nothing is decoded, and memory and time are bounded whatever the bytes claim. A file is whole if an end-of-image marker
follows the start of the scan (JPEG), if it has an IEND chunk (PNG), if it is as long as its RIFF header says (WebP), or
if its pixels end inside it (TIFF and NumPy). That is checked here, because a decoder that reads only the crop notices a
missing end for some crops and not for others.

Index workers import this module, so it imports neither PyTorch nor Pillow nor tifffile before a file needs one.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from importlib.util import find_spec
from io import BytesIO, FileIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np


class Format(IntEnum):
    """Supported formats. The first three are photographs, which both loaders decode to the same pixels."""

    JPEG = 1
    PNG = 2
    WEBP = 3
    TIFF = 4
    NPY = 5


_SUFFIXES = "jpg jpeg jpe jfif png webp gif avif heic heif bmp tif tiff npy jp2 jxl ppm pgm"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""A file with one of these suffixes is meant to be an image: if it is not one, it is reported as bad."""
EXPECTED = "JPEG, PNG, WebP, TIFF or NumPy (.npy)"
_VALUES = ("bool", "uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64")
MODES = ("", "1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "RGB;16", "RGBA;16", *_VALUES)
"""Modes by the number that the index stores."""
READY_MODES = ("bool", "uint8")
"""Types of TIFF and NumPy files that become uint8 without a value range."""
COLOR_16 = ("RGB;16", "RGBA;16")
"""16-bit colour, of which only the upper 8 bits are used: no decoder here returns all of them."""
_GREY = ("1", "L", "LA", "I;16")

_STARTS = {Format.JPEG: (b"\xff\xd8\xff",), Format.PNG: (b"\x89PNG\r\n\x1a\n",), Format.NPY: (b"\x93NUMPY",),
           Format.TIFF: (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")}  # fmt: skip
_UNSUPPORTED = {b"GIF8": "GIF", b"BM": "BMP", b"\0\0\0\x0cjP": "JPEG 2000", b"\xff\x0a": "JPEG XL"}

_FIRST_READ = 4096
"""Holds the whole header of nine of ten JPEGs of ImageNet; the others have previews and profiles, which are skipped."""
_MAX_SEGMENTS = 10_000
"""Segments or chunks before the image data; a file of 10 MB of metadata has a few hundred."""
_MAX_TAGS = 256
_MAX_SCAN = 256 << 20
"""How far an end-of-image marker is searched for, if the last bytes have none."""
_CHUNK = 1 << 20
_MAX_TIFF_HEADER = 16 << 20
_MAX_PAGES = 64
NPY_HEADER = 65536
"""More than NumPy accepts, whatever length a damaged file claims."""
_MAX_SIDE = 1 << 32
"""What a row of the index holds."""
_ORIENTATION_TAG = 0x0112
DEFLATE, PACKBITS = (8, 32946), 32773
"""Numbers of TIFF's compressions."""


class Header(NamedTuple):
    """The header of an image file.

    Attributes:
        format: by content, whatever the file is called.
        height, width: as stored, before ``orientation`` turns the image upright.
        orientation: EXIF orientation, 1 to 8.
        channels: of the decoded image, without alpha, palettes looked up: 1 or 3 for a photograph, any number else.
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


Read = Callable[[int, int], bytes]


class Reader(NamedTuple):
    """A file that is read by position.

    Attributes:
        name: what messages call it.
        size: its bytes.
        read: called with an offset and a number of bytes; returns fewer only at the end of the file.
    """

    name: str
    size: int
    read: Read


def reader_of(file: FileIO) -> Reader:
    """An open file of this machine."""
    descriptor = file.fileno()
    return Reader(file.name, os.fstat(descriptor).st_size, lambda at, count: os.pread(descriptor, count, at))


def reader_over(data: np.ndarray | bytes, name: str = "") -> Reader:
    """A file in memory."""
    data = memoryview(data)
    return Reader(name, len(data), lambda at, count: bytes(data[at : at + count]))


def detect_format(start: bytes) -> Format | None:
    """The format by the first 12 bytes of a file; None if it is not supported."""
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return Format.WEBP
    return next((format_ for format_, starts in _STARTS.items() if start.startswith(starts)), None)


def read_header(path: Path | str) -> Header | None:
    """The header of an image file; see :func:`parse_header`."""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        return parse_header(reader_of(file))


def parse_header(file: Reader) -> Header | None:
    """The header of an image.

    Returns:
        The header, or None for a file that neither is an image nor is named like one.

    Raises:
        BadImage: the file is empty, truncated, unreadable or of an unsupported format. Damaged bytes raise
            nothing else.
        OSError: the file system failed.
    """
    size, start = file.size, file.read(0, _FIRST_READ)
    format_ = detect_format(start)
    if format_ in (None, Format.TIFF, Format.NPY) and PurePosixPath(file.name).suffix.lower() not in IMAGE_SUFFIXES:
        return None  # raw files of cameras begin like a TIFF, and an array is an image only if its name says so
    if format_ is None:
        raise BadImage(_refusal(start))

    def read(at: int, count: int) -> bytes:
        return start[at : at + count] if at + count <= len(start) else file.read(at, count)

    try:
        if format_ in _PARSERS:
            header, data_start = _PARSERS[format_](read)
        else:
            header = _parse_npy(read(0, NPY_HEADER), size) if format_ is Format.NPY else _parse_tiff(file)
    except Exception as error:  # tifffile and NumPy raise anything at damaged bytes
        if isinstance(error, BadImage) or getattr(error, "errno", None) is not None:  # the file system's own
            raise
        raise BadImage(f"unreadable header: {str(error) or type(error).__name__}") from error
    sides = header.height, header.width, header.channels
    if not all(isinstance(side, int) and 0 < side < _MAX_SIDE for side in sides):  # a damaged TIFF may have tuples
        raise BadImage("a size of {!s:.20} x {!s:.20} x {!s:.20}: expected whole numbers above 0".format(*sides))
    if format_ is Format.WEBP and size < (expected := int.from_bytes(start[4:8], "little") + 8):
        raise BadImage(f"truncated: {size} bytes of {expected}")
    if format_ in _END_OF_IMAGE:
        _check_end(read, _END_OF_IMAGE[format_], data_start, size)
    return header


def stored_size(encoded: np.ndarray) -> tuple[int, int] | None:
    """Height and width by the header of a JPEG, PNG or WebP file, uint8 (bytes,), before any EXIF orientation; None if
    there is no valid header."""
    format_ = detect_format(encoded[:12].tobytes())
    try:
        header, _ = _PARSERS[format_](lambda at, count: encoded[at : at + count].tobytes())
    except (KeyError, BadImage):
        return None
    return header.height, header.width


def _refusal(start: bytes) -> str:
    if not start:
        return "empty file"
    name = next((name for magic, name in _UNSUPPORTED.items() if start.startswith(magic)), None)
    if name is None and start[4:8] == b"ftyp":
        name = start[8:12].decode("ascii", "replace").upper()
    return f"{name} is not supported ({EXPECTED} are)" if name else f"not a {EXPECTED} file"


def _check_end(read: Read, marker: bytes, data_start: int, size: int) -> None:
    if marker in read(max(data_start, size - 64), 64):
        return
    # Phones append films, and some servers padding: only such files are searched.
    at, end, before = data_start, min(size, data_start + _MAX_SCAN), b""
    while at < end and (chunk := read(at, min(_CHUNK, end - at))):
        if marker in before + chunk:
            return
        at, before = at + len(chunk), chunk[-len(marker) :]
    raise BadImage(f"truncated: no end of image in {end} bytes of {size}")


_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
"""Modes by number of components."""


def _parse_jpeg(read: Read) -> tuple[Header, int]:
    """ITU-T T.81, annex B: segments up to the start of the scan."""
    start, at, orientation, frame = read(0, _FIRST_READ), 2, 1, None
    for _ in range(_MAX_SEGMENTS):
        segment = start[at : at + 10]
        if len(segment) < 10 and len(segment := read(at, 10)) < 4:
            raise BadImage("unreadable header: it ends before the image data")
        marker, length = segment[1], segment[2] << 8 | segment[3]
        if segment[0] != 0xFF or marker in (0x00, 0xFF):  # padding
            at += 1
        elif 0xD0 <= marker <= 0xD8:  # stands alone, without a length
            at += 2
        elif marker < 0xC0 or marker == 0xD9 or length < 2:
            raise BadImage(f"unreadable header: no segment at byte {at}")
        elif marker == 0xDA:
            break
        else:
            if marker == 0xE1 and segment[4:] == b"Exif\0\0":
                orientation = _orientation(read, at + 4)
            elif marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # tables and an extension, not frames
                frame = segment[4:]
            at += 2 + length
    else:
        raise BadImage(f"unreadable header: more than {_MAX_SEGMENTS} segments")
    if frame is None or len(frame) < 6 or frame[0] != 8 or frame[5] not in _JPEG_MODES:
        raise BadImage("unreadable header: expected a frame of 1, 3 or 4 components of 8 bits")
    _, height, width, components = struct.unpack(">BHHB", frame)
    return _photograph(Format.JPEG, height, width, _JPEG_MODES[components], orientation), at + 2 + length


_PNG_MODES = {(1, 0): "1", (2, 0): "L", (4, 0): "L", (8, 0): "L", (16, 0): "I;16", (8, 2): "RGB", (16, 2): "RGB;16",
              (1, 3): "P", (2, 3): "P", (4, 3): "P", (8, 3): "P", (8, 4): "LA", (16, 4): "RGBA;16", (8, 6): "RGBA",
              (16, 6): "RGBA;16"}  # fmt: skip
"""Modes by bit depth and colour type. Pillow reads 16-bit grey with alpha as RGBA."""


def _parse_png(read: Read) -> tuple[Header, int]:
    """Portable Network Graphics, section 11: IHDR, then chunks up to the first IDAT."""
    start = read(8, 25)
    if len(start) < 25 or start[:8] != b"\0\0\0\rIHDR" or zlib.crc32(start[4:21]) != int.from_bytes(start[21:], "big"):
        raise BadImage("unreadable header: no valid IHDR chunk")
    width, height, bits, colour, compression, filter_ = struct.unpack(">IIBBBB", start[8:20])
    if (bits, colour) not in _PNG_MODES or compression or filter_:
        raise BadImage(f"unreadable header: {bits} bits of colour type {colour}")
    at, orientation = 33, 1
    for _ in range(_MAX_SEGMENTS):
        chunk = read(at, 8)
        length, kind = int.from_bytes(chunk[:4], "big"), chunk[4:]
        if kind == b"IDAT":
            return _photograph(Format.PNG, height, width, _PNG_MODES[bits, colour], orientation), at
        if len(kind) < 4 or not kind.isalpha() or kind == b"IEND":
            raise BadImage("unreadable header: no image data")
        if kind == b"eXIf":
            orientation = _orientation(read, at + 8)
        at += 12 + length
    raise BadImage(f"unreadable header: more than {_MAX_SEGMENTS} chunks")


def _parse_webp(read: Read) -> tuple[Header, int]:
    """The WebP container specification: lossy, lossless and extended files."""
    start = read(0, 30)
    kind, data, orientation = start[12:16], start[20:], 1
    if kind == b"VP8 " and data[3:6] == b"\x9d\x01\x2a" and len(data) == 10:
        (width, height), alpha = struct.unpack("<HH", data[6:]), False
        width, height = width & 0x3FFF, height & 0x3FFF
    elif kind == b"VP8L" and data[:1] == b"\x2f" and len(data) >= 5:
        bits = int.from_bytes(data[1:5], "little")
        width, height, alpha = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), bits >> 28 & 1
    elif kind == b"VP8X" and len(data) == 10:
        flags, width, height = data[0], *(1 + int.from_bytes(data[i : i + 3], "little") for i in (4, 7))
        alpha, at = flags & 0x10, 12
        if flags & 0x02:
            raise BadImage("an animation, not a photograph")
        for _ in range(_MAX_SEGMENTS if flags & 0x08 else 0):
            chunk = read(at, 8)
            if chunk[:4] == b"EXIF":
                orientation = _orientation(read, at + 8)
            if chunk[:4] == b"EXIF" or len(chunk) < 8:
                break
            length = int.from_bytes(chunk[4:], "little")
            at += 8 + length + length % 2
    else:
        raise BadImage("unreadable header: no WebP image")
    return _photograph(Format.WEBP, height, width, "RGBA" if alpha else "RGB", orientation), 0


_PARSERS = {Format.JPEG: _parse_jpeg, Format.PNG: _parse_png, Format.WEBP: _parse_webp}
_END_OF_IMAGE = {Format.JPEG: b"\xff\xd9", Format.PNG: b"IEND\xaeB`\x82"}


def _photograph(format_: Format, height: int, width: int, mode: str, orientation: int) -> Header:
    return Header(format_, height, width, orientation, 1 if mode in _GREY else 3, mode)


def _orientation(read: Read, at: int) -> int:
    """The orientation in EXIF data; 1 if they are damaged, since the pixels are good."""
    if read(at, 6) == b"Exif\0\0":
        at += 6
    start = read(at, 8)
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(start[:4])
    if order is None:
        return 1
    at, found = at + int.from_bytes(start[4:], order), 1
    tags = read(at + 2, 12 * min(int.from_bytes(read(at, 2), order), _MAX_TAGS))
    for i in range(0, len(tags) - 11, 12):
        tag, kind = (int.from_bytes(tags[j : j + 2], order) for j in (i, i + 2))
        if tag == _ORIENTATION_TAG:  # a short, or wrongly a long
            found = int.from_bytes(tags[i + 8 : i + (12 if kind == 4 else 10)], order) if kind in (3, 4) else 1
    return _valid_orientation(found)


def _valid_orientation(value: object) -> int:
    return int(value) if isinstance(value, int) and 1 <= value <= 8 else 1


def _parse_tiff(file: Reader) -> Header:
    import tifffile

    bounded = _Bounded(file)
    try:
        with tifffile.TiffFile(bounded) as tiff:
            return _tiff_header(tiff, file.size)
    finally:
        if bounded.failure is not None:  # tifffile takes it for damage
            raise bounded.failure


def _tiff_header(tiff, size: int) -> Header:
    page = tiff.pages[0]
    same = 1
    with suppress(IndexError):  # thumbnails may follow
        for number in range(1, _MAX_PAGES):
            same += tiff.pages[number].shape == page.shape
        raise BadImage(f"{_MAX_PAGES} pages or more: expected a single image")
    if same > 1:
        raise BadImage(f"{same} pages of one size: expected a single image; split it")
    if page.photometric is not None and page.photometric.name in ("PALETTE", "CFA"):
        raise BadImage(f"a TIFF of {page.photometric.name} pixels is not supported; convert it to RGB")
    # Decoders of imagecodecs stop at the size that they get; others that tifffile may find do not.
    if page.compression not in (1, *DEFLATE, PACKBITS) and find_spec("imagecodecs") is None:
        name = getattr(page.compression, "name", page.compression)
        raise BadImage(f"{name} compression needs a package: pip install 'fastmae[tiff]'")
    if page.imagedepth != 1:
        raise BadImage(f"a volume of depth {page.imagedepth}: expected an image; split it into slices")
    end = max((o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
    if end > size:
        raise BadImage(f"truncated: {size} bytes of {end}")
    mode = _pixel_type(np.dtype(page.dtype) if page.dtype is not None else np.dtype("V1"))
    orientation = _valid_orientation(page.tags.valueof(_ORIENTATION_TAG, default=1))
    return Header(Format.TIFF, page.imagelength, page.imagewidth, orientation, page.samplesperpixel, mode)


class _Bounded:
    """What tifffile needs of a file, of which only so much can be read: a damaged TIFF claims tags of any length."""

    def __init__(self, file: Reader):
        self._file, self._at, self._left = file, 0, _MAX_TIFF_HEADER
        self.failure: OSError | None = None

    def seek(self, position: int, whence: int = 0) -> int:
        self._at = position + (0, self._at, self._file.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._left or self._at < 0:
            raise BadImage("unreadable header: too long")
        try:
            data = self._file.read(self._at, size)
        except OSError as error:
            self.failure = error
            raise
        self._at, self._left = self._at + len(data), self._left - size
        return data


def _parse_npy(start: bytes, size: int) -> Header:
    shape, _, dtype, data_start = npy_header(start)
    if not 2 <= len(shape) <= 3 or min(shape) < 1:
        raise BadImage(f"an array of shape {shape}: expected (height, width) or (height, width, channels)")
    end = data_start + math.prod(shape) * dtype.itemsize
    if size < end:
        raise BadImage(f"truncated: {size} bytes of {end}")
    return Header(Format.NPY, shape[0], shape[1], 1, shape[2] if len(shape) == 3 else 1, _pixel_type(dtype))


def npy_header(start: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether the order is Fortran's, type and position of the values, from the first bytes of a .npy file.

    Raises:
        ValueError: there is no such header.
    """
    file = BytesIO(start)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return *read(file), file.tell()
    except (MemoryError, RecursionError) as error:  # brackets within brackets
        raise ValueError(f"{type(error).__name__} in the header of an array") from error


def _pixel_type(dtype: np.dtype) -> str:
    name = dtype.newbyteorder("=").name
    if name not in _VALUES:
        raise BadImage(f"pixels of type {name} are not supported ({', '.join(_VALUES)} are)")
    return name
