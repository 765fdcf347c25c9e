"""Height and width from a file's first bytes, in a few microseconds: what a decoder would find that trusts them."""

from __future__ import annotations

import numpy as np

_NO_FRAME = (0xC4, 0xC8, 0xCC)
"""Markers among those of JPEG frames, 0xC0 to 0xCF, that are not frames: tables and extensions."""


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
