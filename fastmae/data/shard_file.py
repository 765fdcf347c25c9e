"""One tar shard: written under a temporary name, read back, and only then given its own."""

from __future__ import annotations

import errno
import hashlib
import os
import tarfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastmae.data.batch import DataError
from fastmae.data.dataset import upright_shapes
from fastmae.data.shard_image import StoredImage
from fastmae.data.tar_shards import parse_shard, write_shard_index


class Written(NamedTuple):
    """An image in a shard, without its bytes."""

    name: str
    size: int
    label: int
    height: int
    width: int


class _Hashed:
    """A file to write to, with the digest of what was to be written."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size


def write_shard(path: Path, images: Iterable[StoredImage]) -> tuple[int, str]:
    """Write a tar of images and their classes, the same bytes for the same images, with an index beside it.

    Until the whole was written, synchronised and read back, it stands under a hidden name.

    Returns:
        Bytes and SHA-256 of the tar.

    Raises:
        DataError: what was read back is not what was written.
        OSError: the disk is full, or the file system failed.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        written: list[Written] = []
        with partial.open("wb") as file:
            hashed = _Hashed(file)
            with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for image in images:
                    _add(tar, image.name, image.data)
                    if image.label >= 0:
                        _add(tar, image.name.partition(".")[0] + ".cls", b"%d" % image.label)
                    written.append(Written(image.name, len(image.data), image.label, image.height, image.width))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # so that the disk is read, and not what is still in memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        _read_back(partial, written, hashed.digest.hexdigest())
        partial.replace(path)
        write_shard_index(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    return hashed.size, hashed.digest.hexdigest()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)  # its time and owner are zero: the same images make the same file
    header.size, header.mode = len(data), 0o644
    tar.addfile(header, BytesIO(data))
    tar.members = []  # else they are kept


def _read_back(path: Path, written: list[Written], digest: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise DataError(f"{path}: reads back otherwise than it was written (SHA-256 {found}, expected {digest})")
    part = parse_shard(path)
    names = [part.names[row["name"] : row["name"] + row["name_size"]].decode() for row in part.rows]
    heights, widths = upright_shapes(part.rows)
    columns = (part.rows["size"], part.rows["label"], heights, widths)
    read = [Written(*row) for row in zip(names, *(column.tolist() for column in columns), strict=True)]
    if part.bad or read != written:
        image = next((a for a, b in zip(written, read, strict=False) if a != b), None)
        raise DataError(f"{path}: {len(written)} images were written, {len(read)} read back; first other one: {image}")


def sync_folder(folder: Path) -> None:
    """Make what was renamed in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems know no such thing
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
