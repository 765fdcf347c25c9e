"""Where bytes are read from: files, byte ranges of tar shards, objects of a store.

Object stores are reached through fsspec, which handles credentials and shares connections among threads. This module
adds retries, and checks that a response holds exactly the requested bytes. Index workers import it: no PyTorch.
"""

from __future__ import annotations

import os
import re
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from fastmae.data.errors import DataError, UndecodableImage, with_retries
from fastmae.data.formats import Reader, reader_of

Result = TypeVar("Result")
_OPEN_SHARDS = 256
_READ = os.O_RDONLY | os.O_NONBLOCK
CHANGED = "changed since it was indexed"
_AHEAD = 1 << 18
"""Bytes read ahead while a shard of an object store is indexed: one request for the headers of several small images."""


class Storage(Protocol):
    """Reads encoded images as the index lists them; any thread may call it."""

    def path(self, name: str) -> str:
        """The full path of a name in the index; for messages, too."""

    def read(self, name: str, offset: int, size: int, sample_id: int) -> np.ndarray:
        """The encoded bytes of an image, uint8 (size,): in a file of that name from an offset on; never more.

        Raises:
            UndecodableImage: this image has changed since it was indexed; the others can be used.
            DataError: the file cannot be read, even after retries.
        """


class Files:
    """Images that are files of their own, below ``root`` or with absolute names."""

    def __init__(self, root: Path | str):
        self._prefix = os.path.join(as_url(root) or root, "")  # noqa: PTH118

    def path(self, name: str) -> str:
        # os.path.join takes ten times as long, and this is called for each sample.
        return name if name.startswith("/") or "://" in name else self._prefix + name

    def read(self, name: str, offset: int, size: int, sample_id: int) -> np.ndarray:
        path = self.path(name)
        return with_retries(lambda: _read_file(path, size), path)


class Shards(Files):
    """Images inside tar shards; local shards stay open for a while."""

    def __init__(self, root: Path | str):
        super().__init__(root)
        self._open = lru_cache(_OPEN_SHARDS)(open_file)  # what it drops is closed once no other thread reads it

    def read(self, name: str, offset: int, size: int, sample_id: int) -> np.ndarray:
        path = self.path(name)
        if "://" in path:
            return np.frombuffer(fetch(path, offset, offset + size), np.uint8)
        return with_retries(lambda: self._read_local(path, offset, size), path)

    def _read_local(self, path: str, offset: int, size: int) -> np.ndarray:
        file = self._open(path)
        try:
            return _read_range(file.fileno(), offset, size)
        except OSError:
            self._open.cache_clear()  # the next try opens it anew
            raise


def open_file(path: str) -> FileIO:
    """Open a file to read; opening a FIFO that has replaced it does not wait for a writer."""
    return open(path, "rb", buffering=0, opener=lambda path, _: os.open(path, _READ))


def _read_file(path: str, size: int) -> np.ndarray:
    descriptor = os.open(path, _READ)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UndecodableImage(f"{CHANGED}: not a regular file")
        if status.st_size != size:
            raise UndecodableImage(f"{CHANGED}: expected {size} bytes, got {status.st_size}")
        return _read_range(descriptor, 0, size)
    finally:
        os.close(descriptor)


def _read_range(descriptor: int, offset: int, size: int) -> np.ndarray:
    data, done = np.empty(size, np.uint8), 0
    while done < size:
        count = os.preadv(descriptor, [data[done:]], offset + done)
        if not count:
            raise OSError(f"{CHANGED}: it ends {size - done} bytes before the image does")
        done += count
    return data


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it has its name once all of it is on the disk."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def open_reader(place: str) -> Iterator[Reader]:
    """A file, or an object of a store, that one thread reads by position.

    Raises:
        OSError: the file cannot be opened.
        DataError: there is no such object, its size is unknown, or the server does not serve ranges.
    """
    if "://" in place:
        yield _remote_reader(place)
    else:
        with open_file(place) as file:
            yield reader_of(file)


# ---------------------------------------------------------------------------------------------------------------------
# Object stores


def as_url(path: Path | str) -> str | None:
    """A URL, also one that ``Path`` has made ``s3:/bucket/train`` of; None for a path."""
    match = re.match(r"(?!file:)([a-z][a-z0-9+.-]+):/+(?=[^/])", str(path))
    return f"{match[1]}://{str(path)[match.end() :]}" if match else None


def ask(url: str, action: Callable[[Any, str], Result]) -> Result:
    """Call ``action(file system, path)`` for a URL; retry transient errors.

    Raises:
        DataError: there is no such object, the store refuses, or still fails after retries.
    """
    try:
        fs = _file_system(re.match(r"[^:]+://[^/]*", url)[0])
    except (ImportError, ValueError) as error:  # a package that is not installed; an unknown protocol
        raise DataError(f"{url}: {error}. For s3://, gs://, https://: pip install 'fastmae[s3,gcs,http]'") from error

    def attempt() -> Result:
        try:
            return action(fs, fs._strip_protocol(url))
        except DataError:
            raise
        except Exception as error:
            # fsspec's HTTP client raises FileNotFoundError for any failure of a HEAD request.
            cause = (isinstance(error, FileNotFoundError) and error.__cause__) or error
            message = "no such object" if isinstance(cause, FileNotFoundError) else f"{type(cause).__name__}: {cause}"
            if _is_transient(cause):
                raise OSError(message) from error
            raise DataError(f"{url}: {message}") from error

    return with_retries(attempt, url)


def fetch(url: str, start: int, stop: int) -> bytes:
    """The bytes of a URL from ``start`` to ``stop``, in one request; raises as :func:`ask` does."""

    def cat(fs: Any, path: str) -> bytes:
        data = fs.cat_file(path, start=start, end=stop)
        if len(data) > stop - start:
            raise DataError(f"{url}: requested {stop - start} bytes, got {len(data)}: the server ignores ranges")
        if len(data) < stop - start:
            raise OSError(f"{CHANGED}: it ends {stop - start - len(data)} bytes before the image does")
        return data

    return ask(url, cat) if stop > start else b""


def read_if_there(place: str) -> bytes | None:
    """A whole file or object; None if there is none."""
    try:
        return ask(place, lambda fs, path: fs.cat_file(path)) if "://" in place else Path(place).read_bytes()
    except FileNotFoundError:
        return None
    except DataError as error:  # without permission to list, stores answer 403 instead of 404
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError | PermissionError) or _status(cause) in (401, 403, 404, 410):
            return None
        raise


def _remote_reader(url: str) -> Reader:
    file = ask(url, lambda fs, path: fs.open(path, block_size=_AHEAD, cache_type="readahead"))
    if file.size is None:
        raise DataError(f"{url}: expected a server that reports sizes (Content-Length)")

    def read(offset: int, size: int) -> bytes:
        expected = max(0, min(size, file.size - offset))

        def read(fs: Any, path: str) -> bytes:
            file.seek(offset)
            data = file.read(expected)
            if len(data) < expected:
                raise OSError(f"requested {expected} bytes, got {len(data)}")
            return data

        return ask(url, read) if expected else b""

    read(1, 1)  # fsspec refuses a server that ignores ranges here, before it has sent the body
    return Reader(url, file.size, read)


@lru_cache(maxsize=64)
def _file_system(origin: str) -> Any:
    from fsspec.core import url_to_fs

    return url_to_fs(origin)[0]


def _is_transient(error: BaseException) -> bool:
    """Whether a request may succeed later. aiohttp, botocore and gcsfs raise errors of their own."""
    if (status := _status(error)) is not None:
        return status >= 500 or status in (408, 425, 429)
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ClientError", "HTTPClientError", "ConnectionError", "HttpError", "TransportError"})


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error, if it has one."""
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    found = getattr(error, "status", None), getattr(error, "code", None), metadata.get("HTTPStatusCode")
    return next((status for status in found if isinstance(status, int)), None)
