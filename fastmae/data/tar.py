"""Tar shards in the WebDataset convention, read by position: no member is ever extracted to a file.

Members whose names share everything up to the first dot of the last component are one sample: ``a/0001.jpg`` is the
image and ``a/0001.cls`` its class, a number. A name is a label here and never becomes a path, so it may be anything.

Finding the images takes a walk over the members' headers and the images' headers. ``write_shard_index`` stores what
was found beside the shard, and a data set of indexed shards opens without reading a shard at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import threading
from collections import OrderedDict
from io import BufferedReader, RawIOBase
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np

from fastmae.data.errors import DataError, with_retries
from fastmae.data.formats import IMAGE_SUFFIXES, BadImage, Header, parse_header
from fastmae.data.table import ENTRY, Part, PartBuilder

VERSION = 1
INDEX_SUFFIX = ".index.npz"
_OPEN_SHARDS = 256
_MAX_LABEL_BYTES = 32
_IDENTITY = 65536


class Section(RawIOBase):
    """A stretch of a file, read by position: the file's own position is neither used nor moved."""

    def __init__(self, descriptor: int, offset: int, size: int):
        self._descriptor, self._offset, self._size, self._at = descriptor, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = os.pread(self._descriptor, min(len(buffer), max(self._size - self._at, 0)), self._offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, position: int, whence: int = 0) -> int:
        self._at = max(0, position + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at


def shard_part(path: Path) -> Part:
    """The images in a shard, from the index beside it if that is of this very shard, else from the shard itself.

    Raises:
        DataError: it is not a tar file, is truncated, or cannot be read.
    """
    return read_shard_index(path) or with_retries(lambda: parse_shard(path), str(path), give_up_on=(PermissionError,))


def parse_shard(path: Path) -> Part:
    """The images in a shard, in the order of its members.

    Raises:
        DataError: it is not a tar file, or is truncated.
        OSError: the file system failed.
    """
    members: list[tuple[str, int, int]] = []
    labels: dict[str, int] = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:  # noqa: PTH123
            while (member := tar.next()) is not None:
                tar.members = []  # else they are kept
                if not member.isreg() or member.issparse():
                    continue
                key, suffix = split_key(member.name)
                if suffix in IMAGE_SUFFIXES:
                    members.append((member.name, member.offset_data, member.size))
                elif suffix == ".cls" and member.size <= _MAX_LABEL_BYTES:
                    labels[key] = _label(os.pread(file.fileno(), member.size, member.offset_data))
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                # tarfile takes a cut between two members, or inside a header, for the end.
                raise DataError(f"{path}: expected a whole, plain tar file: no end of archive at byte {tar.offset}")
            builder = PartBuilder()
            for name, offset, size in members:
                header = _inspect(file.fileno(), name, offset, size)
                label = labels.get(split_key(name)[0], -1)
                builder.add(os.fsencode(name)[:65535], header, size=size, offset=offset, label=label)
            return builder.build()
    except tarfile.TarError as error:
        raise DataError(f"{path}: expected a whole, plain tar file: {error}") from error


def split_key(name: str) -> tuple[str, str]:
    """What the members of a sample share, and the suffix by which they differ, lower case with its dot."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _label(text: bytes) -> int:
    text = text.strip()
    return int(text) if text.isdigit() and int(text) < 2**31 else -1


def _inspect(descriptor: int, name: str, offset: int, size: int) -> Header | str:
    try:
        header = parse_header(BufferedReader(Section(descriptor, offset, size), 4096), name)
        return header or "not an image"
    except BadImage as error:
        return str(error)


def write_shard_index(path: Path) -> Path:
    """Store what a shard holds beside it, whole or not at all.

    Returns:
        The index, ``<shard>.index.npz``.

    Raises:
        DataError: the shard is not a tar file, is truncated, or cannot be read.
        OSError: the index cannot be written.
    """
    path = Path(path)
    part = with_retries(lambda: parse_shard(path), str(path), give_up_on=(PermissionError,))
    target = path.with_name(path.name + INDEX_SUFFIX)
    bad = json.dumps(sorted(part.bad.items())).encode()
    with NamedTemporaryFile(dir=path.parent, prefix=".writing-", suffix=INDEX_SUFFIX, delete=False) as file:
        try:
            np.savez(
                file,
                version=np.int64(VERSION),
                shard=np.frombuffer(_identity(path), np.uint8),
                rows=part.rows.view(np.uint8),
                names=np.frombuffer(part.names, np.uint8),
                bad=np.frombuffer(bad, np.uint8),
            )
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), path.stat().st_mode & 0o666)
            Path(file.name).replace(target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return target


def read_shard_index(path: Path) -> Part | None:
    """What the index beside a shard says; None if there is none, or one of another version or another shard."""
    index = path.with_name(path.name + INDEX_SUFFIX)
    try:
        with np.load(index, allow_pickle=False) as arrays:
            if int(arrays["version"]) != VERSION or arrays["shard"].tobytes() != _identity(path):
                return None
            rows = arrays["rows"].reshape(-1).view(ENTRY)
            names, bad = arrays["names"].tobytes(), json.loads(arrays["bad"].tobytes())
            return Part(rows, names, {int(i): str(reason) for i, reason in bad})
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    except Exception as error:  # a damaged zip archive has errors of its own
        if type(error).__module__ in ("zipfile", "zlib"):
            return None
        raise


def _identity(path: Path) -> bytes:
    """What tells a shard from another without reading it: size, beginning and end. Times do not survive a copy."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        digest = hashlib.blake2b(b"%d" % size + file.read(_IDENTITY), digest_size=16)
        file.seek(max(0, size - _IDENTITY))
        digest.update(file.read())
    return digest.digest()


class OpenShards:
    """Shards' bytes by position, from any thread; the most recently used stay open."""

    def __init__(self):
        self._open: OrderedDict[str, BufferedReader] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, offset: int, size: int) -> np.ndarray:
        """Bytes of a shard: uint8 (size,).

        Raises:
            OSError: the shard cannot be opened or read, or ends before.
        """
        file = self._file(path)
        data = np.empty(size, np.uint8)
        done = 0
        while done < size:
            read = os.preadv(file.fileno(), [data[done:]], offset + done)
            if not read:
                self._forget(path)
                raise OSError(f"the shard ends {size - done} bytes before the image does")
            done += read
        return data

    def _file(self, path: str) -> BufferedReader:
        with self._lock:
            file = self._open.get(path)
            if file is not None:
                self._open.move_to_end(path)
                return file
        file = open(path, "rb", buffering=0)  # noqa: PTH123, SIM115 - closed when nobody reads it any more
        with self._lock:
            self._open[path] = file
            # Not closed here: another thread may be reading it, and holds it.
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return file

    def _forget(self, path: str) -> None:
        with self._lock:
            self._open.pop(path, None)
