"""Pieces of an index: what some files of a folder, or the members of one shard, have come to."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from fastmae.data.header import MODES, BadImage, Format, Header, read_header
from fastmae.data.retry import with_retries
from fastmae.data.table import ENTRY

_FILES = 64
_BAD = Header(Format.JPEG, 0, 0, 1, 0, "")
Item, Result = TypeVar("Item"), TypeVar("Result")


class ListedFile(NamedTuple):
    """A file: path relative to the root, bytes, time of change in nanoseconds, class (-1: none).

    A file that is not there has size -1.
    """

    path: str
    size: int
    mtime: int
    label: int = -1


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
        found = _BAD if isinstance(header, str) else header
        mode = MODES.index(found.mode) if found.mode in MODES else 0
        place = self._end, offset, size, found.height, found.width, 0, label, len(name)
        kind = found.format if found is not _BAD else 0
        self._rows.append((*place, min(found.channels, 65535), kind, found.orientation, mode, found is _BAD))
        self._names.append(name)
        self._end += len(name)

    def build(self) -> Part:
        rows, times = np.array(self._rows, ENTRY), np.array(self._times, np.int64)
        return Part(rows, b"".join(self._names), self._bad, times, np.array(self._fresh, bool) if self._times else True)


def image_parts(
    root: Path,
    files: Iterable[ListedFile],
    *,
    listed: bool,
    known: Callable[[ListedFile], Header | None] = lambda file: None,
    num_threads: int | None = None,
) -> Iterator[Part]:
    """Reads the header of each file that is not known, in parallel threads.

    Files that are no images are left aside, unless ``listed``.
    """

    def inspect(some: list[tuple[ListedFile, Header | None]]) -> Part:
        builder = PartBuilder()
        for file, header in some:
            fresh = header is None
            if fresh:
                header = _inspect(os.path.join(root, file.path), file)  # noqa: PTH118 - a million times
            if header is None and listed:
                header = "not an image"
            if header is not None:
                builder.add_file(file, header, fresh=fresh)
        return builder.build()

    # The hash of an index depends on how many files make a part.
    yield from in_order(inspect, batched(((file, known(file)) for file in files), _FILES), num_threads)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items, the last of fewer."""
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


def in_order(
    action: Callable[[Item], Result], items: Iterable[Item], num_threads: int | None = None
) -> Iterator[Result]:
    """Results in the order of the items, computed in threads that run ahead by a bounded number of items."""
    num_threads = num_threads or min(32, 4 * (os.cpu_count() or 1))
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(action, item))
                if len(pending) > 2 * num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _inspect(path: str, file: ListedFile) -> Header | str | None:
    """A header, None for a file of another kind, or the reason why the file is bad."""
    if file.size < 0:
        return "dangling link" if os.path.islink(path) else "no such file"  # noqa: PTH114
    try:
        return with_retries(lambda: read_header(path), path, give_up_on=(BadImage, PermissionError))
    except BadImage as error:
        return str(error)
    except PermissionError:
        return "no permission to read it"
