"""The rows of an index: fixed-size records and names, looked up by number without being held in memory.

A run reads a few hundred rows a batch out of as many as the data set has. They are read by position from the file
(``pread``) rather than mapped: a mapping would count every page that it touches as the process's own, and the kernel
would read ahead around each of them, 128 KB for a row of 50 bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmae.data.errors import with_retries
from fastmae.data.formats import MODES, Format, Header
from fastmae.data.sources import ListedFile

_BAD_HEADER = Header(Format.JPEG, 0, 0, 1, 0, "")
ENTRY = np.dtype(
    [
        ("name", "<u8"),  # where its name begins among the names
        ("offset", "<u8"),  # where its bytes begin in the shard; 0 for a file of its own
        ("size", "<u8"),  # bytes
        ("height", "<u4"),  # as stored, before the orientation turns the image upright
        ("width", "<u4"),
        ("shard", "<u4"),  # which shard; 0 for a file of its own
        ("label", "<i4"),  # class, -1 for none
        ("name_size", "<u2"),
        ("channels", "<u2"),
        ("format", "u1"),
        ("orientation", "u1"),  # EXIF, 1 to 8
        ("mode", "u1"),  # number in header.MODES
        ("bad", "u1"),  # not 0: cannot be trained on
    ]
)
"""One image."""
_PLAIN = struct.Struct("<QQQIIIiHHBBBB")
_NAME, _NAME_SIZE = (ENTRY.names.index(field) for field in ("name", "name_size"))
_SCANNED = 1 << 16


class PartBuilder:
    """Collects rows."""

    def __init__(self):
        self._rows: list[tuple] = []
        self._names: list[bytes] = []
        self._end = 0
        self._bad: dict[int, str] = {}
        self._times: list[int] = []
        self._fresh: list[bool] = []

    def add_file(self, file: ListedFile, header: Header | str, *, fresh: bool) -> None:
        """A row of an image that is a file of its own."""
        self.add(os.fsencode(file.path), header, size=max(file.size, 0), label=file.label)
        self._times.append(file.mtime)
        self._fresh.append(fresh)

    def add(self, name: bytes, header: Header | str, *, size: int, offset: int = 0, label: int = -1) -> None:
        """A row from a header, or from the reason why there is none."""
        if isinstance(header, str):
            self._bad[len(self._rows)] = header
        found = _BAD_HEADER if isinstance(header, str) else header
        mode = MODES.index(found.mode) if found.mode in MODES else 0
        place = self._end, offset, size, found.height, found.width, 0, label, len(name)
        kind = found.format if found is not _BAD_HEADER else 0
        self._rows.append((*place, min(found.channels, 65535), kind, found.orientation, mode, found is _BAD_HEADER))
        self._names.append(name)
        self._end += len(name)

    def build(self) -> Part:
        rows, times = np.array(self._rows, ENTRY), np.array(self._times, np.int64)
        return Part(rows, b"".join(self._names), self._bad, times, np.array(self._fresh, bool) if self._times else True)


class Part(NamedTuple):
    """Some rows, their names, and the reasons of those that are bad.

    Attributes:
        rows: ``ENTRY`` (n,); ``name`` counts from the beginning of ``names``.
        names: the names, one after the other.
        bad: reason by number of the row.
        times: times of change of the files, int64 (n,); of members of a shard, empty.
        fresh: whether a row's header was read just now and not taken from an earlier index: bool (n,), or True for all.
    """

    rows: np.ndarray
    names: bytes
    bad: dict[int, str]
    times: np.ndarray = np.empty(0, np.int64)
    fresh: np.ndarray | bool = True


class Bytes:
    """Bytes in memory or in a file, read by position, from any thread."""

    def __init__(self, where: Path | bytes):
        self._memory = where if isinstance(where, bytes) else None
        if self._memory is None:
            self._path = where
            self._file = open(where, "rb", buffering=0)  # noqa: PTH123, SIM115 - as long as this object lives
            self._descriptor = self._file.fileno()
            self.size = os.fstat(self._descriptor).st_size
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        else:
            self.size = len(self._memory)

    def read(self, start: int, size: int) -> bytes:
        """``size`` bytes from ``start`` on."""
        if self._memory is not None:
            return self._memory[start : start + size]
        data = os.pread(self._descriptor, size, start)
        return data if len(data) == size else with_retries(lambda: self._read_all(start, size), str(self._path))

    def read_many(self, starts: list[int], size: int) -> tuple[bytearray, bool]:
        """``size`` bytes from each of many places, and whether a disk had to be asked.

        What the operating system does not hold is asked for all together, so that a disk serves it so, and read then.
        """
        if self._memory is not None or not hasattr(os, "RWF_NOWAIT"):
            return bytearray().join([self.read(start, size) for start in starts]), False
        data, missing, descriptor = bytearray(len(starts) * size), [], self._descriptor
        places = [memoryview(data)[at : at + size] for at in range(0, len(data), size)]
        for start, place in zip(starts, places, strict=True):
            try:
                if os.preadv(descriptor, (place,), start, os.RWF_NOWAIT) != size:
                    missing.append((start, place))
            except OSError:  # not held; or a file system that cannot tell
                missing.append((start, place))
        self.expect((start, size) for start, _ in missing)
        for start, place in missing:
            place[:] = self.read(start, size)
        return data, bool(missing)

    def expect(self, places: Iterable[tuple[int, int]]) -> None:
        """Begin to read many places, (start, size)."""
        if self._memory is None and hasattr(os, "posix_fadvise"):
            for start, size in places:
                os.posix_fadvise(self._descriptor, start, size, os.POSIX_FADV_WILLNEED)

    def _read_all(self, start: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, start)
        if len(data) != size:
            raise OSError(f"ends {size - len(data)} bytes too early")
        return data


class Table:
    """The rows of an index and their names."""

    def __init__(self, rows: Bytes, names: Bytes):
        self._rows, self._names = rows, names

    def __len__(self) -> int:
        return self._rows.size // ENTRY.itemsize

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows by number: ``ENTRY`` (n,), a copy."""
        data, from_disk = self._rows.read_many((ids * ENTRY.itemsize).tolist(), ENTRY.itemsize)
        rows = np.frombuffer(data, ENTRY)
        if from_disk:
            # Whoever asks for rows of a batch reads the images next, by their names.
            self._names.expect(zip(rows["name"].tolist(), rows["name_size"].tolist(), strict=True))
        return rows

    def row(self, number: int) -> tuple[int, ...]:
        """One row as the plain integers of ``ENTRY``'s fields: an array of one would cost five times as much."""
        return _PLAIN.unpack(self._rows.read(number * ENTRY.itemsize, ENTRY.itemsize))

    def name(self, row: tuple[int, ...]) -> bytes:
        """The name of a row."""
        return self._names.read(row[_NAME], row[_NAME_SIZE])

    def scan(self) -> Iterator[np.ndarray]:
        """All rows in order, some ten thousand at a time."""
        for start in range(0, len(self), _SCANNED):
            count = min(_SCANNED, len(self) - start)
            data = self._rows.read(start * ENTRY.itemsize, count * ENTRY.itemsize)
            yield np.frombuffer(bytearray(data), ENTRY)
