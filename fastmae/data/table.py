"""The table of an index: one row of fixed size per image, and the names. Other tools open it with NumPy.

``rows.npy``, ``names.npy`` and ``times.npy`` are plain ``.npy`` files: ``np.load(path, mmap_mode="r")`` reads them. A
process maps them instead of loading them: ranks on one machine share the page cache, and opening takes the same time at
any size. See docs/data.md for what this costs and for the comparison with Arrow and Parquet.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from io import BytesIO
from itertools import pairwise
from typing import BinaryIO, NamedTuple

import numpy as np

from fastmae.data.formats import MODES, Header

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
        ("mode", "u1"),  # position in formats.MODES
        ("bad", "u1"),  # not 0: cannot be trained on
    ]
)
"""One image."""
NAMES, TIMES = np.dtype(np.uint8), np.dtype("<i8")
SMALL = 256 << 20
"""Bytes up to which a file is read and checked when an index is opened (0.1 s), and so is in memory."""
_SCANNED = 1 << 16
_AHEAD = 128 << 10
"""Bytes that the kernel reads for one request, however much is asked for."""
_LONGEST_NAME, MOST_CHANNELS = 65535, 65535


class Part(NamedTuple):
    """Consecutive rows, as a source yields them.

    Attributes:
        rows: ``ENTRY`` (n,); ``name`` counts from the beginning of ``names``.
        names: the names, concatenated.
        bad: reason by row, of those that cannot be used.
        times: modification times of the files in nanoseconds, int64 (n,); empty for members of a shard.
        fresh: which rows were read now rather than taken from an earlier index: bool (n,), or True for all.
    """

    rows: np.ndarray
    names: bytes
    bad: dict[int, str]
    times: np.ndarray = np.empty(0, np.int64)
    fresh: np.ndarray | bool = True


class PartBuilder:
    """Collects rows."""

    def __init__(self):
        self._rows: list[tuple] = []
        self._names: list[bytes] = []
        self._end = 0
        self._bad: dict[int, str] = {}

    def add(self, name: bytes, header: Header | str, *, size: int, offset: int = 0, label: int = -1) -> None:
        """Add a row from a header, or from the reason why there is none."""
        if isinstance(header, str):
            self._bad[len(self._rows)] = header
            values = (0, 0, 0, 0, 1, 0, 1)
        else:
            mode = MODES.index(header.mode) if header.mode in MODES else 0
            channels = min(header.channels, MOST_CHANNELS)
            values = (header.height, header.width, channels, header.format, header.orientation, mode, 0)
        self.add_values(name, values, size=size, offset=offset, label=label)

    def add_values(self, name: bytes, values: tuple, *, size: int, offset: int = 0, label: int = -1) -> None:
        """Add a row from height, width, channels, format, orientation, mode and bad as integers."""
        name = name[:_LONGEST_NAME]
        self._rows.append((self._end, offset, size, *values[:2], 0, label, len(name), *values[2:]))
        self._names.append(name)
        self._end += len(name)

    def build(self, times: list[int] | None = None, fresh: list[bool] | None = None) -> Part:
        """The rows; the arguments are those of :class:`Part`."""
        rows = np.array(self._rows, ENTRY)
        fresh_rows = True if fresh is None else np.array(fresh, bool)
        return Part(rows, b"".join(self._names), self._bad, np.array(times or [], np.int64), fresh_rows)


def npy_header(dtype: np.dtype, count: int) -> bytes:
    """What stands before the values in a ``.npy`` file; as long for any count."""
    header = BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


class Column:
    """A one-dimensional array in a ``.npy`` file, mapped.

    ``values`` are all that are in the file, whatever its header says: a build that was killed did not write the right
    number there.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not hold values of ``dtype``.
    """

    def __init__(self, file: BinaryIO, dtype: np.dtype):
        self._file, header = file, npy_header(dtype, 0)  # the file is open as long as this object lives
        self.start, size = len(header), os.fstat(file.fileno()).st_size
        found = os.pread(file.fileno(), self.start, 0)
        if found.partition(b"'shape'")[0] != header.partition(b"'shape'")[0]:
            raise ValueError(f"expected values of {dtype}, found {found[:80]}")
        self.map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        self.map.madvise(mmap.MADV_RANDOM)  # else a fault reads 128 KB for a row of 48 bytes
        self.values = np.frombuffer(self.map, dtype, (size - self.start) // dtype.itemsize, self.start)
        self._asks = size > SMALL and hasattr(os, "posix_fadvise")
        self._read_ahead = self._asks and size <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4

    def read(self, start: int, stop: int) -> np.ndarray:
        """Consecutive values. They are read, not mapped, so that a scan does not leave its pages in the process."""
        size = self.values.itemsize
        data = bytearray(max(0, min(stop, len(self.values)) - start) * size)
        if os.preadv(self._file.fileno(), [data], self.start + start * size) != len(data):
            raise OSError(f"{self._file.name}: ends too early")
        return np.frombuffer(data, self.values.dtype)

    def expect(self, starts: np.ndarray, count: int | np.ndarray = 1) -> None:
        """Ask the system to read values that are taken next: all at once, where faults would wait for each in turn.

        A file that is small against memory is read in the background, once and for all.
        """
        if self._read_ahead:
            self._read_ahead = False
            threading.Thread(target=self._ask_for_all, daemon=True).start()
        if self._asks:
            size = self.values.itemsize
            places = (starts.astype(np.int64) * size + self.start).tolist()
            for place, length in zip(places, np.broadcast_to(count * size, len(places)).tolist(), strict=True):
                os.posix_fadvise(self._file.fileno(), place, length, os.POSIX_FADV_WILLNEED)

    def _ask_for_all(self) -> None:
        for place in range(0, len(self.map), _AHEAD):
            os.posix_fadvise(self._file.fileno(), place, _AHEAD, os.POSIX_FADV_WILLNEED)
        self._asks = False


class Table:
    """Rows and names, by number. All methods may be called from several threads."""

    def __init__(self, rows: BinaryIO, names: BinaryIO):
        self._rows, self._names = Column(rows, ENTRY), Column(names, NAMES)

    def __len__(self) -> int:
        return len(self._rows.values)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows by number: ``ENTRY`` (n,), a copy. One gather from the memory map, without the interpreter lock.

        256 random rows of 10^8 take 11 us of CPU time once their pages are mapped, and 400 us before; a ``pread`` per
        row always takes 340 us, most of it with the interpreter lock.
        """
        self._rows.expect(ids)
        return self._rows.values.take(ids)

    def names(self, rows: np.ndarray) -> list[bytes]:
        """The names of rows: 30 us for 256."""
        starts, sizes = rows["name"].astype(np.int64), rows["name_size"].astype(np.int64)
        self._names.expect(starts, sizes)
        self._names.values.take(starts)  # whoever has to wait for a disk does so here, without the interpreter lock
        data, places = self._names.map, zip((starts + self._names.start).tolist(), sizes.tolist(), strict=True)
        return [data[start : start + size] for start, size in places]

    def shard_starts(self, count: int) -> np.ndarray:
        """The first row of each of ``count`` shards: int64 (count,)."""
        return np.searchsorted(self._rows.values["shard"], np.arange(count, dtype=ENTRY["shard"]))

    def scan(self) -> Iterator[np.ndarray]:
        """All rows in order, some ten thousand at a time."""
        for start in range(0, len(self), _SCANNED):
            yield self._rows.read(start, start + _SCANNED)

    def scan_names(self) -> Iterator[tuple[np.ndarray, list[bytes]]]:
        """All rows and their names in order, up to where a build was killed before it wrote the names."""
        end = 0
        for rows in self.scan():
            sizes = rows["name_size"].astype(np.int64)
            ends = end + np.cumsum(sizes)
            whole = (rows["name"].astype(np.int64) == ends - sizes) & (ends <= len(self._names.values))
            count = len(rows) if whole.all() else int(whole.argmin())
            ends = [end, *ends[:count].tolist()]
            data = self._names.read(end, ends[-1]).tobytes()
            yield rows[:count], [data[start - end : stop - end] for start, stop in pairwise(ends)]
            if count < len(rows):
                return
            end = ends[-1]
