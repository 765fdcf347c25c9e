"""Where images come from: a folder of them, tar shards, or a list file; each found without opening an image."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from fastmae.data.batch import DataError

LIST_SUFFIXES = (".txt", ".tsv", ".lst")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
EXPECTED = "a folder of images (JPEG, PNG, WebP, TIFF, .npy), a folder of .tar shards, a .tar, or a list file"


class ListedFile(NamedTuple):
    """A file: path relative to the root, bytes, time of change in nanoseconds. A file that is not there has size -1."""

    path: str
    size: int
    mtime: int


class Source(NamedTuple):
    """What a data set is made of.

    Attributes:
        kind: ``"images"`` for one image a file, ``"shards"`` for tar files of them.
        root: what the paths are relative to.
        files: in the order of the index.
        listed: whether the user named each file: then a file that is no image is an error and not left aside.
        labels: the class of each file, -1 for none; of shards, empty, since they hold them.
        classes: the names of the classes, in the order of their numbers; empty if unknown.
    """

    kind: Literal["images", "shards"]
    root: Path
    files: Sequence[ListedFile]
    listed: bool
    labels: Sequence[int]
    classes: list[str]

    def fingerprint(self, *more: object) -> str:
        """A digest of names, sizes, times of change and labels: with another one the index is built anew."""
        digest = hashlib.blake2b(repr((self.kind, self.listed, self.classes, *more)).encode(), digest_size=16)
        for file in self.files:
            digest.update(os.fsencode(file.path) + b"\0%d\0%d\0" % (file.size, file.mtime))
        digest.update(repr(self.labels).encode() if self.listed else b"")
        return digest.hexdigest()


def find_source(path: Path) -> Source:
    """What lies at a path.

    Raises:
        DataError: nothing, nothing that is images, or images and shards side by side.
        OSError: the file system failed.
    """
    if not path.exists():
        raise DataError(f"{path}: no such folder or file; expected {EXPECTED}")
    if path.is_dir():
        return _folder(path)
    if path.name.endswith(".tar"):
        status = path.stat()
        files = [ListedFile(path.name, status.st_size, status.st_mtime_ns)]
        return Source("shards", path.parent, files, True, [], _class_names(path.parent))
    if path.name.endswith(_COMPRESSED):
        raise DataError(f"{path}: is compressed; expected a plain .tar, out of which an image can be read by position")
    if path.suffix in LIST_SUFFIXES:
        return _list_file(path)
    raise DataError(f"{path}: is a file; expected {EXPECTED}")


def _folder(root: Path) -> Source:
    files = list_files(root)
    shards = [file for file in files if file.path.endswith(".tar")]
    if not shards:
        compressed = next((file.path for file in files if file.path.endswith(_COMPRESSED)), None)
        if compressed and not any(_is_image(file.path) for file in files):
            raise DataError(f"{root / compressed}: is compressed; expected plain .tar shards")
        folders = [file.path.partition("/")[0] if "/" in file.path else None for file in files]
        classes = sorted({folder for folder in folders if folder})
        numbers = {folder: i for i, folder in enumerate(classes)}
        return Source("images", root, files, False, [numbers.get(folder, -1) for folder in folders], classes)
    images = [file.path for file in files if _is_image(file.path)]
    if images:
        raise DataError(
            f"{root}: holds {len(images)} images ({images[0]}, ...) and {len(shards)} .tar files ({shards[0].path}, "
            "...); expected one kind. Move one of them away, or name the files in a list file"
        )
    return Source("shards", root, shards, False, [], _class_names(root))


def _is_image(path: str) -> bool:
    from fastmae.data.header import IMAGE_SUFFIXES

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
        return Source("shards", path.parent, files, True, [], _class_names(path.parent))
    labels, classes = _number(given)
    return Source("images", path.parent, files, True, labels, classes)


def _listed(root: Path, name: str) -> ListedFile:
    try:
        status = os.stat(os.path.join(root, name))  # noqa: PTH116, PTH118 - of each line
    except FileNotFoundError:
        return ListedFile(name, -1, 0)
    return ListedFile(name, status.st_size if stat.S_ISREG(status.st_mode) else -1, status.st_mtime_ns)


def _number(given: list[str]) -> tuple[list[int], list[str]]:
    """Labels as numbers, and their names if they are not numbers already; no label is -1."""
    if all(label.isdecimal() for label in given if label):
        return [int(label) if label else -1 for label in given], []
    classes = sorted({label for label in given if label})
    numbers = {label: i for i, label in enumerate(classes)}
    return [numbers.get(label, -1) for label in given], classes


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
