"""Where encoded images are read from: files, or byte ranges of tar shards."""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import Protocol

import numpy as np

from fastmae.data.decode import UndecodableImage
from fastmae.data.errors import with_retries

_OPEN_SHARDS = 256


class Storage(Protocol):
    """Reads encoded images as the index lists them; any thread may call it."""

    def path(self, name: str) -> str:
        """The full path of a name in the index; for messages, too."""

    def read(self, name: str, offset: int, size: int, sample_id: int) -> np.ndarray:
        """The encoded bytes of one image: uint8 (size,).

        Args:
            name: of the file that holds the image, as in the index.
            offset: where the image begins in the file.
            size: bytes, as in the index. No more than that is ever read.
            sample_id: the image's number.

        Raises:
            UndecodableImage: this image has changed since it was indexed; the others can be used.
            DataError: the file cannot be read, even after retries.
        """


class Files:
    """Images that are files of their own, below ``root`` or with absolute names."""

    def __init__(self, root: Path | str):
        self._prefix = os.path.join(root, "")  # noqa: PTH118

    def path(self, name: str) -> str:
        # os.path.join takes ten times as long, and this is called for each sample.
        return name if name.startswith("/") else self._prefix + name

    def read(self, name: str, offset: int, size: int, sample_id: int) -> np.ndarray:
        path = self.path(name)
        return with_retries(lambda: _read_file(path, size), path)


def _read_file(path: str, size: int) -> np.ndarray:
    descriptor = os.open(path, _READ)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UndecodableImage("changed since it was indexed: it is not a regular file")
        if status.st_size != size:
            raise UndecodableImage(f"changed since it was indexed: {status.st_size} bytes, {size} expected")
        return _read_range(descriptor, 0, size)
    finally:
        os.close(descriptor)


_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""Opening a FIFO that has taken a file's place must not wait for a writer."""


def _read_range(descriptor: int, offset: int, size: int) -> np.ndarray:
    data, done = np.empty(size, np.uint8), 0
    while done < size:
        count = os.preadv(descriptor, [data[done:]], offset + done)
        if not count:
            raise OSError(f"changed since it was indexed: it ends {size - done} bytes before the image does")
        done += count
    return data


class Shards:
    """Images inside tar shards, below ``root`` or with absolute names; the shards used last stay open."""

    def __init__(self, root: Path | str):
        self._prefix = os.path.join(root, "")  # noqa: PTH118
        self._open: OrderedDict[str, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, name: str) -> str:
        return name if name.startswith("/") else self._prefix + name

    def read(self, name: str, offset: int, size: int, sample_id: int) -> np.ndarray:
        path = self.path(name)
        return with_retries(lambda: self._read_local(path, offset, size), path)

    def _read_local(self, path: str, offset: int, size: int) -> np.ndarray:
        file = self._file(path)
        try:
            return _read_range(file.fileno(), offset, size)
        except OSError:
            with self._lock:  # the next try opens it anew
                self._open.pop(path, None)
            raise

    def _file(self, path: str) -> FileIO:
        with self._lock:
            file = self._open.get(path)
            if file is not None:
                self._open.move_to_end(path)
                return file
        file = open(path, "rb", buffering=0, opener=lambda path, flags: os.open(path, _READ))  # noqa: SIM115
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("changed since it was indexed: it is not a regular file")
        with self._lock:
            self._open[path] = file
            # Dropped, not closed: another thread may be reading it. The last reference closes it.
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return file
