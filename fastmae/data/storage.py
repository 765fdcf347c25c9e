"""Where encoded images are read from: files, byte ranges of tar shards (local or in an object store), or records.

Object stores are reached through fsspec, which handles credentials and shares connections among threads. This module
adds retries, and checks that a response holds exactly the requested bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from fastmae.data.decode import UndecodableImage
from fastmae.data.errors import DataError, with_retries
from fastmae.data.table import Part
from fastmae.data.tar import INDEX_SUFFIX, parse_shard, read_shard_index
from fastmae.data.threads import in_order

Result = TypeVar("Result")
_OPEN_SHARDS = 256
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""Opening a FIFO that has replaced a file must not wait for a writer."""
_CHANGED = "changed since it was indexed"
_REQUESTS = 32
"""Shards of an object store that are indexed at a time."""
_AHEAD = 1 << 18
"""Bytes read ahead while a shard of an object store is indexed: one request for the headers of several small images."""
_LIST_SUFFIXES = (".txt", ".tsv", ".lst")
IN_MEMORY = "python://"
"""Prefix of the name that stands for the path of a data set in memory. Nothing can be opened by it."""


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
        self._prefix = os.path.join(as_url(root) or root, "")  # noqa: PTH118

    def path(self, name: str) -> str:
        # os.path.join takes ten times as long, and this is called for each sample.
        return name if name.startswith("/") or "://" in name else self._prefix + name

    def read(self, name: str, offset: int, size: int, sample_id: int) -> np.ndarray:
        path = self.path(name)
        return with_retries(lambda: _read_file(path, size), path)


def _read_file(path: str, size: int) -> np.ndarray:
    descriptor = os.open(path, _READ)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UndecodableImage(f"{_CHANGED}: not a regular file")
        if status.st_size != size:
            raise UndecodableImage(f"{_CHANGED}: expected {size} bytes, got {status.st_size}")
        return _read_range(descriptor, 0, size)
    finally:
        os.close(descriptor)


def _read_range(descriptor: int, offset: int, size: int) -> np.ndarray:
    data, done = np.empty(size, np.uint8), 0
    while done < size:
        count = os.preadv(descriptor, [data[done:]], offset + done)
        if not count:
            raise OSError(f"{_CHANGED}: it ends {size - done} bytes before the image does")
        done += count
    return data


class Shards(Files):
    """Images inside tar shards, below ``root`` or with absolute names; local shards stay open for a while."""

    def __init__(self, root: Path | str):
        super().__init__(root)
        self._open: OrderedDict[str, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, offset: int, size: int, sample_id: int) -> np.ndarray:
        path = self.path(name)
        if "://" in path:
            return np.frombuffer(fetch(path, offset, offset + size), np.uint8)
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
            raise OSError(f"{_CHANGED}: not a regular file")
        with self._lock:
            self._open[path] = file
            # Dropped, not closed: another thread may be reading it. Its last reference closes it.
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return file


# ---------------------------------------------------------------------------------------------------------------------
# Map-style data sets


class Records(Protocol):
    """A map-style data set of encoded images; any thread may call it.

    Optional: ``label(i) -> int``, -1 for none, and ``classes``, the names of the labels.

    Attributes:
        fingerprint: changes when the images do.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """The bytes of an image file: JPEG, PNG, WebP, TIFF or ``.npy``."""


def read_record(records: Records, i: int, name: str) -> np.ndarray:
    """The bytes of a record: uint8 (n,).

    Raises:
        UndecodableImage: ``records`` raised an error of its own.
        DataError: it raised ``OSError``, even after retries.
    """

    def read() -> np.ndarray:
        try:
            return np.frombuffer(records.read(i), np.uint8)
        except (OSError, DataError):
            raise
        except Exception as error:
            raise UndecodableImage(f"cannot be read: {error!r}") from error

    return with_retries(read, name)


class RecordStorage:
    """Images of a map-style data set."""

    def __init__(self, records: Records, root: Path | str):
        self._records, self._root, self._count = records, as_url(root) or root, len(records)

    def path(self, name: str) -> str:
        return f"{self._root}[{name}]"

    def read(self, name: str, offset: int, size: int, sample_id: int) -> np.ndarray:
        if len(self._records) != self._count:
            raise DataError(f"{self._root}: had {self._count} images and now has {len(self._records)}")
        data = read_record(self._records, sample_id, f"{self._root}[{sample_id}]")
        if len(data) != size:
            raise UndecodableImage(f"{_CHANGED}: expected {size} bytes, got {len(data)}")
        return data


# ---------------------------------------------------------------------------------------------------------------------
# Object stores


def as_url(path: Path | str) -> str | None:
    """A URL, also one that ``Path`` has made ``s3:/bucket/train`` of; None for a path."""
    match = re.match(r"(?!file:)([a-z][a-z0-9+.-]+):/+(?=[^/])", str(path))
    return f"{match[1]}://{str(path)[match.end() :]}" if match else None


def fetch(url: str, start: int, stop: int) -> bytes:
    """The bytes of a URL from ``start`` to ``stop``, in one request.

    Raises:
        DataError: the store refuses, still fails after retries, or returns another number of bytes.
    """

    def cat(fs: Any, path: str) -> bytes:
        data = fs.cat_file(path, start=start, end=stop)
        if len(data) > stop - start:
            raise DataError(f"{url}: requested {stop - start} bytes, got {len(data)}: the server ignores ranges")
        if len(data) < stop - start:
            raise OSError(f"{_CHANGED}: it ends {stop - start - len(data)} bytes before the image does")
        return data

    return ask(url, cat) if stop > start else b""


def ask(url: str, action: Callable[[Any, str], Result]) -> Result:
    """Call ``action(file system, path)`` for a URL; retry transient errors.

    Raises:
        DataError: there is no such object, the store refuses, or still fails after retries.
    """
    try:
        origin = re.match(r"[^:]+://[^/]*", url)[0]
        fs = _file_system(origin)
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


def _fetch_if_there(url: str) -> bytes | None:
    """A whole object; None if there is none. Without permission to list, stores answer 403 instead of 404."""
    try:
        return ask(url, lambda fs, path: fs.cat_file(path))
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError | PermissionError) or _status(cause) in (401, 403, 404, 410):
            return None
        raise


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


class RemoteShard:
    """A shard in an object store, read by position; see :class:`fastmae.data.tar.Reader`. For one thread.

    Raises:
        DataError: there is no such object, its size is unknown, or the server does not serve ranges.
    """

    def __init__(self, url: str):
        self.name = url
        self._file = ask(url, lambda fs, path: fs.open(path, block_size=_AHEAD, cache_type="readahead"))
        self.size = self._file.size
        if self.size is None:
            raise DataError(f"{url}: expected a server that reports sizes (Content-Length)")
        self.read(1, 1)  # fsspec refuses a server that ignores ranges here, before it has sent the body

    def read(self, offset: int, size: int) -> bytes:
        expected = max(0, min(size, self.size - offset))

        def read(fs: Any, path: str) -> bytes:
            self._file.seek(offset)
            data = self._file.read(expected)
            if len(data) < expected:
                raise OSError(f"requested {expected} bytes, got {len(data)}")
            return data

        return ask(self.name, read) if expected else b""


class StoreSource:
    """Shards in an object store as a source of an index: see :class:`fastmae.data.sources.Source`.

    Rows come from the index beside a shard if there is one, else from the headers in the shard, by range requests.

    Args:
        root: URL of the folder, without a slash at its end; or the folder of a list of URLs. ``classes.txt`` there
            names the classes.
        names: below the root, or URLs of their own.
        versions: of shards by name, from :func:`_version`; missing ones are requested.
    """

    def __init__(self, root: str, names: list[str], versions: Mapping[str, str]):
        self.root, self.shards, self._storage = root, names, Shards(root)
        path = f"{root}/classes.txt"
        text = _fetch_if_there(path) if as_url(root) else Path(path).is_file() and Path(path).read_bytes()
        self.classes = (text or b"").decode().splitlines()
        self._versions = [versions.get(name, "") for name in names]
        if not all(self._versions):
            self._versions = list(in_order(self._ask_version, names, _REQUESTS))

    def __len__(self) -> int:
        return len(self.shards)

    def fingerprint(self, *more: object) -> str:
        found = repr((self.root, self.classes, more, self.shards, self._versions))
        return hashlib.blake2b(found.encode(), digest_size=16).hexdigest()

    def parts(self, known: object, workers: int | None, progress: Callable[[int], None] | None) -> Iterator[Part]:
        for part in in_order(self._part, self.shards, workers or _REQUESTS):  # threads: they wait for the store
            yield part
            if progress is not None:
                progress(1)

    def _ask_version(self, name: str) -> str:
        return ask(self._storage.path(name), lambda fs, path: _version(fs.info(path)))

    def _part(self, name: str) -> Part:
        shard = RemoteShard(self._storage.path(name))
        index = _fetch_if_there(shard.name + INDEX_SUFFIX)
        return (index and read_shard_index(shard, BytesIO(index))) or parse_shard(shard)


def find_store(path: Path | str) -> StoreSource | None:
    """The shards at a URL, or in a local list of URLs; None for other paths.

    Raises:
        DataError: there are none, or something else is there.
    """
    url = as_url(path)
    if url is None:
        is_list = Path(path).suffix in _LIST_SUFFIXES and Path(path).is_file()
        return (
            StoreSource(str(Path(path).parent), _listed(Path(path).read_text()), {})
            if is_list and _has_urls(path)
            else None
        )
    root, _, name = url.rpartition("/")
    if url.startswith(IN_MEMORY):
        raise DataError(f"{url}: was a data set in Python; resume with fastmae.pretrain(data=..., resume=True)")
    if url.endswith(".tar"):
        return StoreSource(root, [name], {})
    if url.endswith(_LIST_SUFFIXES):
        return StoreSource(root, _listed(ask(url, lambda fs, path: fs.cat_file(path)).decode()), {})

    def find(fs: Any, path: str) -> dict[str, str]:
        start = len(path.rstrip("/")) + 1
        found = fs.find(path, detail=True).items()
        return {name[start:]: _version(info) for name, info in sorted(found)}

    found = ask(url, find)
    shards = {name: version for name, version in found.items() if name.endswith(".tar")}
    if not shards:
        some = f"{len(found)} other objects, such as {next(iter(found))}" if found else "nothing"
        raise DataError(
            f"{url}: expected .tar shards, found {some}. Loose images in an object store are not read, because "
            "indexing would take a request for each: pack them with fastmae data shard"
        )
    return StoreSource(url.rstrip("/"), list(shards), shards)


def _has_urls(path: Path | str) -> bool:
    """Whether a local list file, which may be huge, begins with a URL."""
    with Path(path).open(errors="surrogateescape") as file:
        first = next((line for line in file if line.strip() and not line.startswith("#")), "")
    return as_url(first) is not None


def _listed(text: str) -> list[str]:
    """The shards in a list file: one per line, ``#`` begins a comment."""
    names = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if wrong := [name for name in names if not name.endswith(".tar")] or (not names and ["nothing"]):
        raise DataError(f"expected a list of .tar shards, found {wrong[0]} in it")
    return names


def _version(info: dict[str, Any]) -> str:
    """The size of an object and what its store changes when it is replaced. Empty if there is no size."""
    names = ("ETag", "etag", "md5Hash", "generation", "Last-Modified", "LastModified", "mtime", "created")
    known = next((info[name] for name in names if info.get(name)), "")
    return f"{info['size']} {known}" if info.get("size") is not None else ""
