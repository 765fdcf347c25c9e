"""Where images come from: a folder of them, tar shards, or a list file; each found without opening an image."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from fastmae.data.errors import DataError
from fastmae.data.formats import IMAGE_SUFFIXES
from fastmae.data.threads import batched, in_order

LIST_SUFFIXES = (".txt", ".tsv", ".lst")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
EXPECTED = "a folder of images (JPEG, PNG, WebP, TIFF, .npy), a folder of .tar shards, a .tar, or a list file"
_AT_ONCE = 1024
"""Files of a folder whose sizes and times one thread asks for."""


class ListedFile(NamedTuple):
    """A file: path relative to the root, bytes, time of change in nanoseconds, class (-1: none).

    A file that is not there has size -1.
    """

    path: str
    size: int
    mtime: int
    label: int = -1


class FolderFiles:
    """The files below a folder, sorted by path: listed anew by each iteration, so that they are never held all at once.

    Attributes:
        digest: of names, sizes and times of change, when they were counted.
    """

    def __init__(self, root: Path, count: int, digest: bytes, classes: Sequence[str], num_threads: int | None = None):
        self._root, self._count, self.digest, self._num_threads = root, count, digest, num_threads
        self._numbers = {name: i for i, name in enumerate(classes)}

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ListedFile]:
        return _with_sizes(self._root, self._numbers, self._num_threads)


class Source(NamedTuple):
    """What a data set is made of.

    Attributes:
        kind: ``"images"`` for one image a file, ``"shards"`` for tar files of them.
        root: what the paths are relative to.
        files: in the order of the index, with the classes of images; shards hold them.
        listed: whether the user named each file: then a file that is no image is an error and not left aside.
        classes: the names of the classes, in the order of their numbers; empty if unknown.
    """

    kind: Literal["images", "shards"]
    root: Path
    files: FolderFiles | Sequence[ListedFile]
    listed: bool
    classes: list[str]

    def fingerprint(self, *more: object) -> str:
        """A digest of names, sizes, times of change and labels: with another one the index is built anew."""
        files = self.files.digest if isinstance(self.files, FolderFiles) else _digest(self.files)
        digest = hashlib.blake2b(repr((self.kind, self.listed, self.classes, *more)).encode() + files, digest_size=16)
        return digest.hexdigest()


def _digest(files: Iterable[ListedFile]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(os.fsencode(file.path) + b"\0%d\0%d\0%d\0" % (file.size, file.mtime, file.label))
    return digest.digest()


def find_source(path: Path, num_threads: int | None = None) -> Source:
    """What lies at a path.

    Args:
        path: a folder is listed, the size and time of each of its files asked for.
        num_threads: that ask; None chooses.

    Raises:
        DataError: nothing, nothing that is images, or images and shards side by side.
        OSError: the file system failed.
    """
    if not path.exists():
        raise DataError(f"{path}: no such folder or file; expected {EXPECTED}")
    if path.is_dir():
        return _folder(path, num_threads)
    if path.name.endswith(".tar"):
        status = path.stat()
        files = [ListedFile(path.name, status.st_size, status.st_mtime_ns)]
        return Source("shards", path.parent, files, True, _class_names(path.parent))
    if path.name.endswith(_COMPRESSED):
        raise DataError(f"{path}: is compressed; expected a plain .tar, out of which an image can be read by position")
    if path.suffix in LIST_SUFFIXES:
        return _list_file(path)
    raise DataError(f"{path}: is a file; expected {EXPECTED}")


def _folder(root: Path, num_threads: int | None) -> Source:
    shards: list[ListedFile] = []
    classes: set[str] = set()
    count, images, image, compressed = 0, 0, "", ""

    def counted() -> Iterator[ListedFile]:
        nonlocal count, images, image, compressed
        for file in _with_sizes(root, {}, num_threads):
            count += 1
            folder, slash, _ = file.path.partition("/")
            if slash:
                classes.add(folder)
            if file.path.endswith(".tar"):
                shards.append(file)
            elif _is_image(file.path):
                images, image = images + 1, image or file.path
            elif file.path.endswith(_COMPRESSED):
                compressed = compressed or file.path
            yield file

    digest = _digest(counted())
    if shards and images:
        raise DataError(
            f"{root}: holds {images} images ({image}, ...) and {len(shards)} .tar files ({shards[0].path}, ...); "
            "expected one kind. Move one of them away, or name the files in a list file"
        )
    if shards:
        return Source("shards", root, shards, False, _class_names(root))
    if compressed and not images:
        raise DataError(f"{root / compressed}: is compressed; expected plain .tar shards")
    names = sorted(classes)
    return Source("images", root, FolderFiles(root, count, digest, names, num_threads), False, names)


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - a million times


def _class_names(folder: Path) -> list[str]:
    path = folder / "classes.txt"
    return path.read_text().splitlines() if path.is_file() else []


def _list_file(path: Path) -> Source:
    """A path a line, relative to the list's folder or absolute; after a tab, a label; ``#`` begins a comment line."""
    try:
        lines = path.read_text(errors="surrogateescape").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text, a path a line: {error}") from error
    files, given = [], []
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        name, _, label = line.partition("\t")
        files.append(_listed(path.parent, name.strip()))
        given.append(label.strip())
    if not files:
        raise DataError(f"{path}: expected a path a line, found none")
    if all(file.path.endswith(".tar") for file in files):
        for file in files:
            if file.size < 0:
                raise DataError(f"{path}: names {file.path}, which is not there")
        return Source("shards", path.parent, files, True, _class_names(path.parent))
    labels, classes = _number(given)
    files = [file._replace(label=label) for file, label in zip(files, labels, strict=True)]
    return Source("images", path.parent, files, True, classes)


def _listed(root: Path, name: str, label: int = -1) -> ListedFile:
    path = os.path.join(root, name)  # noqa: PTH118 - a million times
    try:
        status = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return ListedFile(name, -1, 0, label)
    except OSError:
        if os.path.islink(path):  # noqa: PTH114 - to itself
            return ListedFile(name, -1, 0, label)
        raise
    size = status.st_size if stat.S_ISREG(status.st_mode) else -1
    return ListedFile(name, size, status.st_mtime_ns, label)


def _number(given: list[str]) -> tuple[list[int], list[str]]:
    """Labels as numbers, and their names if they are not numbers already; no label is -1."""
    if all(label.isdecimal() for label in given if label):
        return [int(label) if label else -1 for label in given], []
    classes = sorted({label for label in given if label})
    numbers = {label: i for i, label in enumerate(classes)}
    return [numbers.get(label, -1) for label in given], classes


def list_files(root: Path) -> Iterator[str]:
    """The paths of all files below a folder, sorted, relative to it.

    Hidden names are skipped, links followed, loops entered once. The names of one folder at a time are held.
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
        with os.scandir(folder) as members:
            found = [name for member in members if (name := _file_or_folder(member))]
        # A folder counts with its slash, so that the paths below it come where they would in a list of all.
        pending.extend(path + name for name in sorted(found, reverse=True))


def _file_or_folder(member: os.DirEntry) -> str | None:
    """A name, of a folder with a slash; None for what is hidden, and for pipes, which would be waited for for ever."""
    if member.name.startswith("."):
        return None
    try:
        if member.is_dir():
            return member.name + "/"
        return member.name if member.is_file() or (member.is_symlink() and not os.path.exists(member)) else None  # noqa: PTH110
    except OSError:
        if member.is_symlink():  # to itself
            return member.name
        raise


def _with_sizes(root: Path, numbers: Mapping[str, int], num_threads: int | None) -> Iterator[ListedFile]:
    def ask(paths: list[str]) -> list[ListedFile]:
        return [_listed(root, path, numbers.get(path.partition("/")[0], -1)) for path in paths]

    for files in in_order(ask, batched(list_files(root), _AT_ONCE), num_threads):
        yield from files
