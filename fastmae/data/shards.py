"""Packing a data set into WebDataset tar shards: planned whole, written one by one, continued where it was cut off.

Which image goes where depends on the source's index and the options alone. So a run that was killed is continued by
running it again: complete shards stay, the others come out as they would have, byte for byte.

Images keep the order of a seeded permutation, so that a reader that goes from front to back, as most do, meets no
sorted classes. Reading the source in that order is random access, as training is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL
import torchvision
from PIL import Image, features

from fastmae.data.dataset import Dataset, printable, upright_shapes
from fastmae.data.decode import UndecodableImage, decode
from fastmae.data.errors import DataError
from fastmae.data.formats import MODES, BadImage, Format, Header, parse_header
from fastmae.data.loader import available_cores
from fastmae.data.sampler import permuted_ids
from fastmae.data.tar import INDEX_SUFFIX, parse_shard, write_shard_index
from fastmae.data.threads import in_order

SUFFIXES = {Format.JPEG: ".jpg", Format.PNG: ".png", Format.WEBP: ".webp", Format.TIFF: ".tif", Format.NPY: ".npy"}
_PHOTOGRAPHS = (Format.JPEG, Format.PNG, Format.WEBP)
_SIXTEEN_BITS = ("I", "I;16")
_LONGEST_JPEG = 65500  # libjpeg's limit
_NAME_CHARACTERS = 64
_REDUCING_GAP = 3.0  # of a very large image, whole blocks are averaged first; Pillow calls the result indistinguishable
MANIFEST = "shards.json"
_PROGRESS = ".progress.jsonl"
BAD_FILES, CLASSES = "bad_files.jsonl", "classes.txt"
_FORMAT = 1
_SCANNED = 65536
_HEADERS = 1024  # a tar header, and half a block of padding on average; as much again for a class
_JPEG_BYTES_PER_PIXEL = 0.4  # about that at quality 90
Progress = Callable[[int, int], None]
"""Called with how many more images and bytes are done."""


class Encoding(NamedTuple):
    """How images are stored.

    Attributes:
        short_side: the longest that an image's short side may be, in pixels; None: as long as it is.
        quality: of JPEG, 1 to 100.
        reencode: whether an image that fits is encoded anew too.
    """

    short_side: int | None = None
    quality: int = 90
    reencode: bool = False


class StoredImage(NamedTuple):
    """An image as a shard holds it.

    Attributes:
        name: of the member.
        data: the encoded image.
        label: its class, -1 for none.
        height, width: of the upright image.
        encoded: whether the bytes are other ones than the source's.
    """

    name: str
    data: bytes
    label: int
    height: int
    width: int
    encoded: bool


def stored_shapes(rows: np.ndarray, encoding: Encoding) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What comes of images by their headers.

    Args:
        rows: ``table.ENTRY`` (n,).

    Returns:
        Heights and widths, int64 (n,), of the upright images as stored, and bool (n,): which are encoded anew.
    """
    heights, widths = upright_shapes(rows)
    eight_bits = ~np.isin(rows["mode"], [MODES.index(mode) for mode in _SIXTEEN_BITS])
    photographs = np.isin(rows["format"], _PHOTOGRAPHS) & eight_bits & (np.maximum(heights, widths) <= _LONGEST_JPEG)
    shorts = np.minimum(heights, widths)
    larger = photographs & (shorts > (encoding.short_side or np.iinfo(np.int64).max))
    if encoding.short_side is not None:
        scale = encoding.short_side / np.maximum(shorts, 1)
        heights = np.where(larger, np.maximum(np.rint(heights * scale), 1), heights).astype(np.int64)
        widths = np.where(larger, np.maximum(np.rint(widths * scale), 1), widths).astype(np.int64)
    return heights, widths, larger | (photographs & encoding.reencode)


def store_image(dataset: Dataset, sample_id: int, encoding: Encoding) -> StoredImage:
    """An image as a shard is to hold it.

    Raises:
        UndecodableImage: it was to be encoded anew, and does not decode.
        DataError: it cannot be read, or is not what the index says any more.
    """
    rows = dataset.rows(np.array([sample_id]))
    (height,), (width,), (anew,) = (values.tolist() for values in stored_shapes(rows, encoding))
    row, data = rows[0], dataset.read(sample_id)
    format_ = Format(int(row["format"]))
    header = _check_unchanged(dataset, sample_id, row, data)
    if anew:
        pixels = decode(data, int(row["orientation"]), channels=dataset.channels)  # of 8 bits, which need no range
        expected = tuple(int(size[0]) for size in upright_shapes(rows))
        if pixels.shape[:2] != expected:
            raise UndecodableImage(f"decodes to {pixels.shape[:2]}, its header said {expected}")
        if row["channels"] == 1:
            pixels = pixels[..., 0]
        stored, format_ = _encode(pixels, height, width, encoding.quality), Format.JPEG
    else:
        stored = data.tobytes()
        if format_ is Format.NPY:  # as it will be read back, whichever axis has the channels
            height, width = header.height, header.width
    name = member_key(dataset, sample_id) + SUFFIXES[format_]
    return StoredImage(name, stored, int(row["label"]), height, width, anew)


def _check_unchanged(dataset: Dataset, sample_id: int, row: np.void, data: np.ndarray) -> Header:
    path = dataset.path(sample_id)
    try:
        header = parse_header(BytesIO(data), path)
    except BadImage:
        header = None
    found = header and (len(data), header.format, header.height, header.width, header.orientation)
    if found and found[1] == Format.NPY and dataset.accepts.channels_first and header.channels != 1:
        found = (*found[:2], header.width, header.channels, header.orientation)
    if found != tuple(int(row[name]) for name in ("size", "format", "height", "width", "orientation")):
        raise DataError(f"{printable(path)}: changed while it was being packed; begin anew")
    return header


def _encode(pixels: np.ndarray, height: int, width: int, quality: int) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
    buffer = BytesIO()
    # Not optimize=True: 3 % smaller, but Pillow then needs room for the whole file and guesses it too small for noise.
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def encoder() -> str:
    """The libraries that the bytes of encoded images depend on."""
    jpeg = features.version_feature("libjpeg_turbo") or features.version_codec("jpg")
    return f"Pillow {PIL.__version__}, libjpeg {jpeg}, torchvision {torchvision.__version__}"


def member_key(dataset: Dataset, sample_id: int) -> str:
    """The name of a sample in a shard, without suffix: its number in the source, and of its path what is harmless.

    A WebDataset reader ends the key at the first dot, a shell sees no option and no space, and the number keeps
    ``a.jpg``, ``a.png`` and ``A/a.jpg`` apart where their letters do not. So the key fits into a plain tar header.
    """
    digits = max(9, len(str(len(dataset) - 1)))
    path = dataset.path(sample_id).removeprefix(f"{dataset.root}/").rpartition("::")[2]
    folder, slash, last = path.rpartition("/")
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", folder + slash + (last.rpartition(".")[0] or last))
    return f"{sample_id:0{digits}d}-{stem[-_NAME_CHARACTERS:]}"


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


class ShardFolder:
    """Held by one process at a time; use as a context manager.

    Attributes:
        path: the folder.
        done: what there is to say about each complete shard, by its name.

    Raises:
        DataError: it is in use, holds something else, or was begun with another plan.
        OSError: it cannot be made or written.
    """

    def __init__(self, path: Path, plan: dict[str, Any]):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"{path}: another process is packing shards into it") from error
            except OSError as error:  # some cluster file systems know no locks
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
            self._begin(plan)
            self.done = self._finished()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> ShardFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._lock)

    def add(self, record: dict[str, Any]) -> None:
        """Remember that a shard is complete."""
        with (self.path / _PROGRESS).open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[record["name"]] = record

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write down the whole: from now on the folder says that it is complete."""
        write_text(self.path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        (self.path / _PROGRESS).unlink(missing_ok=True)
        sync_folder(self.path)

    def _begin(self, plan: dict[str, Any]) -> None:
        """Write down what is going to be done, or see that it is what was begun."""
        path = self.path / MANIFEST
        if not path.exists():
            there = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
            if there:
                raise DataError(
                    f"{self.path}: expected a new or empty folder, or one with {MANIFEST}; found {there[0]!r}"
                )
            write_text(path, json.dumps(plan, indent=1) + "\n")
            return
        begun = self._manifest()
        differences = [f"{name} {begun.get(name)} there, {value} here" for name, value in plan.items()
                       if begun.get(name) != value]  # fmt: skip
        if differences:
            raise DataError(
                f"{self.path}: was begun with another source or other options: {'; '.join(differences)}. "
                "Give the same ones to continue it, or choose another folder"
            )
        for leftover in (*self.path.glob(".*.partial"), *self.path.glob(f".writing-*{INDEX_SUFFIX}")):
            leftover.unlink()  # of a process that was killed, since this one holds the lock

    def _manifest(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / MANIFEST).read_text()))
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.path / MANIFEST}: is damaged: {error}; remove the folder to begin anew") from error

    def _finished(self) -> dict[str, dict[str, Any]]:
        records = list(self._manifest().get("shards", []))
        if (self.path / _PROGRESS).is_file():
            for line in (self.path / _PROGRESS).read_text().splitlines():
                with suppress(ValueError):  # a kill can leave half a line
                    records.append(json.loads(line))
        complete = {record["name"]: record for record in records if self._is_complete(record)}
        # Written anew, so that nothing is appended to half a line.
        write_text(self.path / _PROGRESS, "".join(json.dumps(record) + "\n" for record in complete.values()))
        return complete

    def _is_complete(self, record: dict[str, Any]) -> bool:
        path = self.path / record["name"]
        index = path.with_name(path.name + INDEX_SUFFIX)
        return path.is_file() and path.stat().st_size == record["bytes"] and index.is_file()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class ShardOptions:
    """What decides over the content of the shards.

    Attributes:
        short_side: shrink 8-bit photographs to this short side, in pixels, and store them as JPEG; None: do not.
        quality: of JPEG, 1 to 100.
        reencode: encode photographs anew as JPEG also where they keep their size.
        shard_bytes: size of a shard to aim at; of images that are encoded anew it is estimated.
        images_per_shard: at most so many in a shard; in place of ``shard_bytes``.
        shuffle_seed: of the order; None: the order of the source.
    """

    short_side: int | None = None
    quality: int = 90
    reencode: bool = False
    shard_bytes: int = 256 << 20
    images_per_shard: int | None = None
    shuffle_seed: int | None = 0

    def __post_init__(self):
        for name in ("short_side", "shard_bytes", "images_per_shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: expected 1 to 100, got {self.quality}")
        if self.shuffle_seed is not None and not 0 <= self.shuffle_seed < 1 << 63:
            raise ValueError(f"shuffle_seed: expected an integer in [0, 2**63), got {self.shuffle_seed}")

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.short_side, self.quality, self.reencode)


class Shards(NamedTuple):
    """What was packed.

    Attributes:
        folder: where.
        shards: number of tar files.
        images: in all of them.
        encoded: how many of the images were encoded anew.
        bytes: of all tar files.
        source_bytes: of the images that went in.
        bad: how many of the source's images were left out.
    """

    folder: Path
    shards: int
    images: int
    encoded: int
    bytes: int
    source_bytes: int
    bad: int


def write_shards(
    dataset: Dataset,
    out: Path,
    options: ShardOptions | None = None,
    *,
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> Shards:
    """Pack a data set into ``out/shard-000000.tar`` and so on, or go on doing so.

    Beside each shard stands its index; ``shards.json`` says where the images came from, the options, and each shard's
    size and SHA-256; ``bad_files.jsonl`` lists what was left out, ``classes.txt`` the names of the classes.

    Args:
        dataset: what to pack; images known to be bad are left out.
        out: a new or empty folder, or that of a run with the same source and options.
        options: None for the defaults.
        num_threads: that read and encode; None for one a core.
        progress: called from this thread.

    Raises:
        DataError: ``out`` holds something else or is in use; the source changed or cannot be read; more of it is bad
            than ``dataset.max_bad_fraction`` allows; the disk is full, or does not give back what it was given. What is
            complete stays, and running again continues.
    """
    options = options or ShardOptions()
    count = _num_shards(dataset, options)
    names = [f"shard-{number:0{max(6, len(str(count - 1)))}d}.tar" for number in range(count)]
    plan = _plan(dataset, options, count)
    try:
        with ShardFolder(out, plan) as folder:
            late: dict[int, str] = {}
            for number, name in enumerate(names):
                record = folder.done.get(name)
                if record is None:
                    ids = _sample_ids(dataset, options, number, count)
                    record = _write(dataset, ids, out / name, options, num_threads, progress)
                    folder.add(record)
                elif progress is not None:
                    progress(record["images"] + len(record["bad"]), record["bytes"])
                if record["bad"]:
                    late |= {int(sample_id): reason for sample_id, reason in record["bad"]}
                    dataset.check_bad_fraction(late)
            return _finish(dataset, folder, [folder.done[name] for name in names], late, plan)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written: {error}. Complete shards stay; the same command goes on from there"
        ) from error


def _num_shards(dataset: Dataset, options: ShardOptions) -> int:
    if options.images_per_shard is not None:
        return math.ceil(len(dataset) / options.images_per_shard)
    total = 0.0
    for start in range(0, len(dataset), _SCANNED):
        rows = dataset.rows(np.arange(start, min(start + _SCANNED, len(dataset))))
        rows = rows[rows["bad"] == 0]
        heights, widths, anew = stored_shapes(rows, options.encoding)
        estimated = np.minimum(rows["size"], _JPEG_BYTES_PER_PIXEL * heights * widths)
        total += float(np.where(anew, estimated, rows["size"]).sum() + (_HEADERS * (1 + (rows["label"] >= 0))).sum())
    return max(1, min(len(dataset), math.ceil(total / options.shard_bytes)))


def _sample_ids(dataset: Dataset, options: ShardOptions, number: int, count: int) -> list[int]:
    """The samples of a shard, those that are not known to be bad."""
    total = len(dataset)
    ids = np.arange(number * total // count, (number + 1) * total // count)
    if options.shuffle_seed is not None:
        ids, _ = permuted_ids(ids, total, options.shuffle_seed)
    return ids[~dataset.is_bad(ids)].tolist()


def _write(
    dataset: Dataset,
    ids: list[int],
    path: Path,
    options: ShardOptions,
    num_threads: int | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write a shard; return what there is to say about it."""
    bad: list[tuple[int, str]] = []
    counts = {"images": 0, "encoded": 0, "source_bytes": 0}
    sizes = dict(zip(ids, dataset.rows(np.array(ids, np.int64))["size"].tolist(), strict=True))

    def store(sample_id: int) -> tuple[int, StoredImage | str]:
        try:
            return sample_id, store_image(dataset, sample_id, options.encoding)
        except UndecodableImage as error:
            return sample_id, str(error)

    def images() -> Iterator[StoredImage]:
        for sample_id, image in in_order(store, ids, num_threads or available_cores()):
            if isinstance(image, str):
                bad.append((sample_id, image))
            else:
                counts["images"] += 1
                counts["encoded"] += image.encoded
                counts["source_bytes"] += sizes[sample_id]
                yield image
            if progress is not None:
                progress(1, 0 if isinstance(image, str) else len(image.data))

    size, digest = write_shard(path, images())
    return {"name": path.name, **counts, "bytes": size, "sha256": digest, "bad": bad}


def _plan(dataset: Dataset, options: ShardOptions, count: int) -> dict[str, Any]:
    """What has to be the same for a run to be continued."""
    encoded = options.short_side is not None or options.reencode
    return {
        "format": _FORMAT,
        "source": dataset.hash,
        "source_images": len(dataset),
        **asdict(options),
        "encoder": encoder() if encoded else None,
        "num_shards": count,
    }


def _finish(
    dataset: Dataset, folder: ShardFolder, records: list[dict[str, Any]], late: dict[int, str], plan: dict[str, Any]
) -> Shards:
    totals = {name: sum(r[name] for r in records) for name in ("images", "encoded", "bytes", "source_bytes")}
    bad = sorted((dataset.index.bad | late).items())
    lines = [json.dumps({"path": dataset.path(i), "reason": reason}) + "\n" for i, reason in bad]
    write_text(folder.path / BAD_FILES, "".join(lines))
    if dataset.classes:
        write_text(folder.path / CLASSES, "".join(f"{name}\n" for name in dataset.classes))
    folder.finish(plan | totals | {"bad": len(bad), "shards": records})
    return Shards(folder.path, len(records), bad=len(bad), **totals)
