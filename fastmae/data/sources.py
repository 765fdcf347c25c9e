"""Where images come from: a folder, a list file or tar shards; each is listed without opening an image.

A source is read twice when an index is built: once for its fingerprint, which tells whether an index is still current,
and once for the rows. Both passes stream, so that memory does not grow with the number of images: a folder is held one
directory at a time (about 130 bytes per file of the largest directory), a list file one line at a time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmae.data.errors import DataError, with_retries
from fastmae.data.formats import IMAGE_SUFFIXES, BadImage, Header, parse_header, reader_of
from fastmae.data.processes import available_cores, in_processes
from fastmae.data.storage import Files, as_url, ask, open_file, read_if_there
from fastmae.data.table import ENTRY, Part, PartBuilder
from fastmae.data.tar import read_shard_index, shard_part, write_shard_index
from fastmae.data.threads import batched, in_order

LIST_SUFFIXES = (".txt", ".tsv", ".lst")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
EXPECTED = "a folder of images (JPEG, PNG, WebP, TIFF, .npy), a folder of .tar shards, a .tar, or a list file"
INDEX_MARK = ".fastmae-index"
"""A file in a folder of indexes: one that lies among the images is no part of them."""
IN_MEMORY = "python://"
"""Prefix of the name that stands for the path of a data set in memory. Nothing can be opened by it."""
_LOOSE = (
    "Loose images in an object store are not read, because indexing would take a request for each: pack them with "
    "fastmae data shard"
)
_AT_ONCE = 1024
"""Files per call of a worker."""
_PER_PART = 64
"""The hash of an index depends on how many files make a part."""
_READ_ALONE, _LISTED_ALONE, _SHARDS_ALONE = 4, 64, 8
"""Calls that are made in this process, because starting others takes longer: those for 4,096 headers, for the sizes of
65,536 files, and for 8 shards."""
_MOST_WORKERS = 32
"""More processes read faster than one can list and write; of an object store, as many shards are indexed at a time."""
_KNOWN = ["height", "width", "channels", "format", "orientation", "mode", "bad"]
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}

Progress = Callable[[int], None]
"""Called with a number of files that have been listed or read."""
Known = Callable[[list[bytes], bool], tuple[np.ndarray, np.ndarray]]
"""Rows and modification times from an earlier index, by name, with format 0 for names that it does not have. The flag
says whether names are asked for in their order."""


class Source:
    """What a data set is made of: the base of the kinds, which yield pairs of a count for the progress bar and parts.

    Attributes:
        root: what names are relative to: a folder, or a URL.
        classes: the names of the labels, in the order of their numbers; empty if unknown.
        shards: the names of the files that hold several images each; empty if each image is a file of its own.
    """

    _count = 0
    _digest = b""
    """Of names, sizes, modification times and labels."""

    def __init__(self, root: Path | str, shards: Sequence[str] = (), classes: Sequence[str] = ()):
        self.root, self.shards, self.classes = root, list(shards), list(classes)

    def __len__(self) -> int:
        """How many files; some of a folder's may be no images."""
        return self._count

    def fingerprint(self, *more: object) -> str:
        """A digest of the listing and of ``more``."""
        kind = repr((type(self).__name__, self.classes, *more)).encode()
        return hashlib.blake2b(kind + self._digest, digest_size=16).hexdigest()

    def parts(self, known: Known | None, workers: int | None, progress: Progress | None) -> Iterator[Part]:
        """The rows of the index, in order. They are the same whatever the number of workers.

        Args:
            known: rows that need not be read again while size and time are the same.
            workers: processes; None for one per core.
            progress: of reading.
        """
        for count, parts in self._counted_parts(known, workers):
            yield from parts
            if progress is not None:
                progress(count)

    def _counted_parts(self, known: Known | None, workers: int | None) -> Iterator[tuple[int, list[Part]]]:
        raise NotImplementedError


class FileSource(Source):
    """Images that are files of their own.

    Args:
        root: what the names are relative to.
        files: names and labels, iterated several times; the empty string is no label. Distinct labels are held.
        listed: whether the user named each file: then one that is no image is bad, not skipped, and labels may be
            numbers.

    Attributes:
        tars: the names of tar files.
        images, image: how many names are those of images, and the first.
        compressed: the last name of a compressed tar file.
    """

    def __init__(
        self,
        root: Path,
        files: Iterable[tuple[str, str]],
        *,
        listed: bool,
        workers: int | None = None,
        progress: Progress | None = None,
    ):
        super().__init__(root)
        self._files, self._listed = files, listed
        self.tars, self.images, self.image, self.compressed = [], 0, "", ""
        labels, digest = set(), hashlib.blake2b(repr(listed).encode(), digest_size=16)

        def listing() -> Iterator[tuple[str, str]]:
            for name, label in files:
                self._count += 1
                labels.add(label)
                if name.endswith(".tar"):
                    self.tars.append(name)
                elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122
                    self.images, self.image = self.images + 1, self.image or name
                elif name.endswith(_COMPRESSED):
                    self.compressed = name
                yield name, label

        calls = ((os.fsencode(root), some) for some in batched(listing(), _AT_ONCE))
        for count, some in in_processes(digest_some, calls, workers or _workers(), alone=_LISTED_ALONE):
            digest.update(some)
            if progress is not None:
                progress(count)
        self._digest = digest.digest()
        labels.discard("")
        if not (listed and all(label.isdecimal() and len(label) < 10 for label in labels)):  # a row holds 32 bits
            self.classes = sorted(labels)

    def _counted_parts(self, known: Known | None, workers: int | None) -> Iterator[tuple[int, list[Part]]]:
        numbers = {name: i for i, name in enumerate(self.classes)}

        def number(label: str) -> int:
            return numbers.get(label, -1) if numbers or not label.isdecimal() else int(label)

        def calls() -> Iterator[tuple]:
            for some in batched(self._files, _AT_ONCE):
                names = [os.fsencode(name) for name, _ in some]
                labels, ordered = [number(label) for _, label in some], not self._listed
                before = known(names, ordered) if known else _unknown(names)
                yield os.fsencode(self.root), names, labels, before, self._listed

        yield from in_processes(read_files, calls(), workers or _workers(), alone=_READ_ALONE)


def _unknown(names: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(len(names), ENTRY), np.zeros(len(names), np.int64)


class ShardSource(Source):
    """Tar shards, of this machine or of object stores.

    Args:
        root: a folder or a URL. ``classes.txt`` there names the classes.
        names: of shards, relative to the root, absolute, or URLs.
        versions: what changes when a shard does, by name, as far as it is known.

    Attributes:
        places: paths or URLs of the shards.
        is_local: whether all are files of this machine.

    Raises:
        DataError: a shard is not there.
    """

    def __init__(self, root: Path | str, names: Sequence[str], versions: Mapping[str, str] | None = None):
        classes, versions = read_if_there(f"{root}/classes.txt") or b"", versions or {}
        super().__init__(root, names, classes.decode().splitlines())
        self._count, self.places = len(names), list(map(Files(root).path, names))
        self.is_local = not any("://" in place for place in self.places)
        found = in_order(lambda i: versions.get(names[i]) or _version(self.places[i]), range(len(names)), _MOST_WORKERS)
        self._digest = repr((self.shards, list(found))).encode()

    def _counted_parts(self, known: Known | None, workers: int | None) -> Iterator[tuple[int, list[Part]]]:
        if self.is_local:
            parts = in_processes(shard_part, self.places, workers, alone=_SHARDS_ALONE)
        else:
            parts = in_order(shard_part, self.places, workers or _MOST_WORKERS)  # threads: they wait for the store
        return ((1, [part]) for part in parts)


def _version(place: str) -> str:
    if "://" in place:
        return ask(place, lambda fs, path: _object_version(fs.info(path)))
    size, time = _size_and_time(place)
    if size < 0:
        raise DataError(f"{place}: no such shard")
    return f"{size} {time}"


def _object_version(info: dict[str, Any]) -> str:
    """The size of an object and what its store changes when it is replaced. Empty if there is no size."""
    names = ("ETag", "etag", "md5Hash", "generation", "Last-Modified", "LastModified", "mtime", "created")
    known = next((info[name] for name in names if info.get(name)), "")
    return f"{info['size']} {known}" if info.get("size") is not None else ""


def index_shard(place: str) -> bool:
    """Write the index beside a local shard unless it is there; whether it was written."""
    return read_shard_index(place) is None and bool(write_shard_index(Path(place)))


def find_source(path: Path, workers: int | None = None, progress: Progress | None = None) -> FileSource | ShardSource:
    """List what lies at a path or URL, with the size and time of each file.

    Args:
        path: a folder, a list file, a ``.tar``.
        workers: processes, for more than some ten thousand files; None for one per core.
        progress: of listing.

    Raises:
        DataError: nothing, nothing that is images, or images and shards side by side.
        OSError: the file system failed.
    """
    if url := as_url(path):
        return _find_store(url)
    if not path.exists():
        raise DataError(f"{path}: no such folder or file; expected {EXPECTED}")
    if path.name.endswith(".tar") and path.is_file():
        return ShardSource(path.parent, [path.name])
    if path.name.endswith(_COMPRESSED):
        raise DataError(f"{path}: is compressed; expected a plain .tar, out of which an image can be read by position")
    if not path.is_dir() and path.suffix not in LIST_SUFFIXES:
        raise DataError(f"{path}: is a file; expected {EXPECTED}")
    is_list = not path.is_dir()
    files, root = (_ListFile(path), path.parent) if is_list else (_Folder(path), path)
    source = FileSource(root, files, listed=is_list, workers=workers, progress=progress)
    if is_list and not len(source):
        raise DataError(f"{path}: expected one path per line, found none")
    if source.tars and source.image:
        raise DataError(
            f"{path}: holds {source.images} images ({source.image}, ...) and {len(source.tars)} .tar files "
            f"({source.tars[0]}, ...); expected one kind. Move the others away, or name one kind in a list file"
        )
    if source.compressed and not source.image and not source.tars:
        raise DataError(f"{path / source.compressed}: is compressed; expected plain .tar shards")
    if as_url(source.image):
        raise DataError(f"{path}: expected .tar shards, found {source.image}. {_LOOSE}")
    if not source.tars or (is_list and len(source.tars) < len(source)):
        return source
    return ShardSource(root, source.tars)


def _find_store(url: str) -> ShardSource:
    """The shards at a URL: a folder, one ``.tar``, or a list file."""
    root, _, name = url.rpartition("/")
    if url.startswith(IN_MEMORY):
        raise DataError(f"{url}: was a data set in Python; resume with fastmae.pretrain(data=..., resume=True)")
    if url.endswith(".tar"):
        return ShardSource(root, [name])
    if url.endswith(LIST_SUFFIXES):
        names = [name for name, _ in _listed(ask(url, lambda fs, path: fs.cat_file(path)).decode().splitlines())]
        if wrong := [name for name in names if not name.endswith(".tar")] or (not names and ["nothing"]):
            raise DataError(f"{url}: expected a list of .tar shards, found {wrong[0]} in it")
        return ShardSource(root, names)

    def find(fs: Any, path: str) -> dict[str, str]:
        start = len(path.rstrip("/")) + 1
        found = fs.find(path, detail=True).items()
        return {name[start:]: _object_version(info) for name, info in sorted(found)}

    found = ask(url, find)
    shards = {name: version for name, version in found.items() if name.endswith(".tar")}
    if not shards:
        some = f"{len(found)} other objects, such as {next(iter(found))}" if found else "nothing"
        raise DataError(f"{url}: expected .tar shards, found {some}. {_LOOSE}")
    return ShardSource(url.rstrip("/"), list(shards), shards)


class _Folder(NamedTuple):
    """The files below a folder, sorted by path; the folder at the top is the label."""

    path: Path

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for name in list_files(self.path):
            folder, slash, _ = name.partition("/")
            yield name, folder if slash else ""


class _ListFile(NamedTuple):
    path: Path

    def __iter__(self) -> Iterator[tuple[str, str]]:
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            yield from _listed(file)


def _listed(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """One path per line, relative to the list's folder or absolute; after a tab, a label; ``#`` begins a comment."""
    for line in lines:
        if line.strip() and not line.startswith("#"):
            name, _, label = line.partition("\t")
            yield name.strip(), label.strip()


def list_files(root: Path) -> Iterator[str]:
    """The paths of all files below a folder, sorted, relative to it.

    Hidden names and indexes are skipped, links followed, loops entered once. One directory's names at a time are held.
    """
    pending, entered = [""], set()
    while pending:
        path = pending.pop()
        if path and not path.endswith("/"):
            yield path
            continue
        folder = os.path.join(root, path)  # noqa: PTH118 - of strings, as scandir gives them
        status = os.stat(folder)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        names = with_retries(partial(_members, folder), folder, give_up_on=(PermissionError,))
        if not path or INDEX_MARK not in names:
            # A folder counts with its slash, so that the paths below it come where they would in a list of all.
            pending.extend(path + name for name in names if not name.startswith("."))


def _members(folder: str) -> list[str]:
    """The names in a folder, in reverse order."""
    with os.scandir(folder) as members:
        return sorted((name for member in members if (name := _file_or_folder(member))), reverse=True)


def _file_or_folder(member: os.DirEntry) -> str | None:
    """A name, of a folder with a slash; None for what is hidden, and for pipes and sockets."""
    if member.name.startswith("."):
        return INDEX_MARK if member.name == INDEX_MARK else None
    try:
        if member.is_dir():
            return member.name + "/"
        return member.name if member.is_file() or (member.is_symlink() and not os.path.exists(member)) else None  # noqa: PTH110
    except OSError:
        if member.is_symlink():  # to itself
            return member.name
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Work for processes


def _workers() -> int:
    return min(available_cores(), _MOST_WORKERS)


def digest_some(call: tuple[bytes, list[tuple[str, str]]]) -> tuple[int, bytes]:
    """How many files, and a digest of their names, labels, sizes and modification times."""
    root, files = call

    def digest() -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for name, label in files:
            identity = _size_and_time(os.path.join(root, os.fsencode(name)))  # noqa: PTH118
            digest.update(os.fsencode(f"{name}\0{label}\0") + b"%d\0%d\0" % identity)
        return digest.digest()

    return len(files), with_retries(digest, os.fsdecode(root), give_up_on=(PermissionError,))


def _size_and_time(path: bytes | str) -> tuple[int, int]:
    """(-1, 0) for what is not there."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError) as error:
        if getattr(error, "errno", errno.ENOENT) in _NOT_THERE:  # ValueError: a zero byte in its name
            return -1, 0
        raise
    return status.st_size, status.st_mtime_ns


def read_files(call: tuple) -> tuple[int, list[Part]]:
    """How many files, and their rows."""
    root, names, labels, (rows, times), listed = call
    known = zip(rows[_KNOWN].tolist(), rows["format"].tolist(), rows["size"].tolist(), times.tolist(), strict=True)
    parts = []
    for some in batched(zip(names, labels, known, strict=True), _PER_PART):
        builder, modified, fresh = PartBuilder(), [], []
        for name, label, (values, is_known, *before) in some:
            path = os.path.join(root, name)  # noqa: PTH118
            same = is_known and _size_and_time(path) == tuple(before)
            if same:
                size, time = before
                builder.add_values(name, values, size=size, label=label)
            else:
                size, time, header = _read_file(path)
                if header is None and not listed:
                    continue
                builder.add(name, header or "not an image", size=size, label=label)
            modified.append(time)
            fresh.append(not same)
        parts.append(builder.build(modified, fresh))
    return len(names), parts


def _read_file(path: bytes) -> tuple[int, int, Header | str | None]:
    """Size, modification time and header of a file: of what was opened, whatever has taken its place since it was
    listed. Instead of a header: None for a file of another kind, or the reason why it is bad."""
    name = os.fsdecode(path)
    try:
        return with_retries(lambda: _open_and_parse(name), name, give_up_on=(PermissionError,))
    except PermissionError:
        return *_size_and_time(path), "no permission to read it"


def _open_and_parse(path: str) -> tuple[int, int, Header | str | None]:
    try:
        file = open_file(path)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", errno.ENOENT)  # ValueError: a zero byte in its name
        if number in (errno.EISDIR, errno.ENXIO):
            return 0, 0, "not a file"
        if number in _NOT_THERE:
            return 0, 0, "dangling link" if os.path.islink(path) else "no such file"  # noqa: PTH114
        raise
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):  # a FIFO, which opens at once and is not waited for
            return 0, 0, "not a file"
        try:
            header = parse_header(reader_of(file))
        except BadImage as error:
            header = str(error)
    return status.st_size, status.st_mtime_ns, header
