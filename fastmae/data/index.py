"""The index of a data set: built once, cached, hashed, memory-mapped.

A good image is one row of a structured array plus its relative path in one long byte string; opening a cached index
maps both and reads neither, and a row is looked up by its number. So what a run holds itself does not grow with the
number of images; the pages that it touches stand in the operating system's cache. Building does hold the folder's
listing (some 300 bytes a file), and opening does walk the folder again, to notice that it changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmae.data.batch import BadFile, DataError
from fastmae.data.header import BadImage, read_header
from fastmae.data.retry import with_retries

logger = logging.getLogger(__name__)

VERSION = 1
_KEPT_SECONDS = 30 * 86400
"""How long the index of what a folder used to hold stays: another run, on another machine even, may have it mapped."""

ENTRY = np.dtype(
    [("path_end", "<u8"), ("size", "<u8"), ("height", "<u4"), ("width", "<u4"), ("format", "u1"), ("orientation", "u1")]
)
"""One good image: where its path ends in the byte string, bytes, stored height and width, format, EXIF orientation."""


class ListedFile(NamedTuple):
    """A file below the folder: relative path, bytes, and time of change in nanoseconds. A dangling link has size -1."""

    path: str
    size: int
    mtime: int


class Index(NamedTuple):
    """Good images in the order of their paths, and bad files.

    Attributes:
        entries: (N,) of ``ENTRY``.
        paths: uint8, the relative paths of the good images, one after the other.
        bad: files that are images by name or content, but cannot be trained on.
        hash: hex digest of the entries and paths: equal on two machines if and only if the data sets are.
    """

    entries: np.ndarray
    paths: np.ndarray
    bad: list[BadFile]
    hash: str


def list_files(root: Path) -> list[ListedFile]:
    """All files below a folder, sorted by path. Hidden names are skipped, links followed, loops entered once."""
    found: list[ListedFile] = []
    pending, entered = [(os.fspath(root), "")], set()
    while pending:
        folder, prefix = pending.pop()
        status = os.stat(folder)  # noqa: PTH116 - of strings, as scandir gives them
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as members:
            for member in members:
                if member.name.startswith("."):
                    continue
                relative, status = prefix + member.name, _status(member)
                if status is None:
                    found.append(ListedFile(relative, -1, 0))
                elif stat.S_ISDIR(status.st_mode):
                    pending.append((member.path, relative + "/"))
                elif stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                    found.append(ListedFile(relative, status.st_size, status.st_mtime_ns))
    return sorted(found)


def _status(member: os.DirEntry) -> os.stat_result | None:
    """What a name stands for; None for a link that leads nowhere."""
    try:
        return member.stat()
    except OSError:
        if member.is_symlink():
            return None
        raise


def fingerprint(files: Sequence[ListedFile]) -> str:
    """A digest of names, sizes and times of change: another one means that the index has to be built anew."""
    digest = hashlib.blake2b(f"v{VERSION}".encode(), digest_size=16)
    for file in files:
        digest.update(os.fsencode(file.path) + b"\0%d\0%d\0" % (file.size, file.mtime))
    return digest.hexdigest()


def build_index(root: Path, files: Sequence[ListedFile], num_threads: int | None = None) -> Index:
    """Read every file's header, in parallel threads, and sort good from bad."""
    rows, paths, bad, end = [], [], [], 0
    with ThreadPoolExecutor(num_threads or min(32, 4 * (os.cpu_count() or 1))) as pool:
        for file, header in zip(files, _map_in_chunks(pool, root, files), strict=True):
            if isinstance(header, str):
                bad.append(BadFile(os.fspath(root / file.path), header))
            elif header is not None:
                encoded = os.fsencode(file.path)
                end += len(encoded)
                paths.append(encoded)
                rows.append((end, file.size, header.height, header.width, header.format, header.orientation))
    entries = np.array(rows, dtype=ENTRY)
    path_bytes = np.frombuffer(b"".join(paths), np.uint8)
    digest = hashlib.blake2b(f"v{VERSION}".encode(), digest_size=16)
    digest.update(entries.tobytes())
    digest.update(path_bytes.tobytes())
    return Index(entries, path_bytes, bad, digest.hexdigest())


def _map_in_chunks(pool: ThreadPoolExecutor, root: Path, files: Sequence[ListedFile]) -> Iterator:
    chunks = [files[i : i + 64] for i in range(0, len(files), 64)]
    for results in pool.map(lambda chunk: [_inspect(root, file) for file in chunk], chunks):
        yield from results


def _inspect(root: Path, file: ListedFile):
    """A header, None for a file of another kind, or the reason why the file is bad."""
    path = f"{root}/{file.path}"
    if file.size < 0:
        return "dangling link"
    try:
        return with_retries(lambda: read_header(path), path, give_up_on=(BadImage, PermissionError))
    except BadImage as error:
        return str(error)
    except PermissionError:
        return "no permission to read it"


def cached_index(root: Path, cache_dir: Path | None) -> Index:
    """The index of a folder, from the cache if the folder's listing has not changed since.

    Args:
        root: the folder.
        cache_dir: where indices are kept; None for ``~/.cache/fastmae``. If it cannot be written to, the index is built
            in memory, and a log line says so.
    """
    files = list_files(root)
    name = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=8).hexdigest()
    try:
        cache_dir = cache_dir or Path.home() / ".cache" / "fastmae"
    except RuntimeError as error:
        logger.warning("The index of %s is not cached: %s", root, error)
        return build_index(root, files)
    folder = cache_dir / f"index-{name}-{fingerprint(files)}"
    index = _load(folder)
    if index is not None:
        return index
    logger.info("Reading the headers of %d files in %s", len(files), root)
    index = build_index(root, files)
    try:
        _save(index, folder, siblings=f"index-{name}-*")
    except OSError as error:
        logger.warning("The index of %s is not cached: %s", root, error)
        return index
    return _load(folder) or index


def _load(folder: Path) -> Index | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        count, num_bytes = manifest["count"], manifest["path_bytes"]
        entries = np.load(folder / "entries.npy", mmap_mode="r") if count else np.empty(0, ENTRY)
        paths = np.load(folder / "paths.npy", mmap_mode="r") if count else np.empty(0, np.uint8)
        if entries.dtype != ENTRY or entries.shape != (count,) or paths.shape != (num_bytes,):
            return None
        return Index(entries, paths, [BadFile(*bad) for bad in manifest["bad"]], manifest["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, of another version or damaged: all the same, it is built again


def _save(index: Index, folder: Path, siblings: str) -> None:
    """Write beside, then rename: a reader sees the whole index or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="writing-", dir=folder.parent))
    try:
        np.save(temporary / "entries.npy", index.entries)
        np.save(temporary / "paths.npy", index.paths)
        manifest = {
            "count": len(index.entries),
            "path_bytes": len(index.paths),
            "hash": index.hash,
            "bad": [list(bad) for bad in index.bad],
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest))
        if _load(folder) is None:  # not there or damaged; else another process was faster
            shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        for sibling in folder.parent.glob(siblings):
            if sibling != folder and sibling.stat().st_mtime < time.time() - _KEPT_SECONDS:
                shutil.rmtree(sibling, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_folder(root: Path, cache_dir: Path | None) -> Index:
    """The index of a folder of images.

    Raises:
        DataError: the path is missing, is not a folder, or holds no image that can be trained on.
    """
    if not root.exists():
        raise DataError(f"{root}: no such folder; expected a folder of JPEG, PNG or WebP images")
    if not root.is_dir():
        raise DataError(f"{root}: is a file; expected a folder of JPEG, PNG or WebP images")
    try:
        index = cached_index(root, cache_dir)
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot be read: {error.strerror or error}") from error
    if not len(index.entries):
        reasons = "".join(f"\n  {bad.path}: {bad.reason}" for bad in index.bad[:5])
        found = f"only {len(index.bad)} unusable files, among them:{reasons}" if index.bad else "no image at all"
        raise DataError(f"{root}: expected a folder of JPEG, PNG or WebP images, found {found}")
    return index
