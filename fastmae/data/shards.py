"""Pack a data set into verified WebDataset tar shards, by several processes and on several machines.

What a shard holds depends on the source's index and the options alone. So its bytes are the same whoever packs it and
however often packing was interrupted: complete shards stay, and running again packs the others.

Images have the order of a seeded permutation, so that a sequential reader does not see classes one after the other.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import tarfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import PIL
import torchvision
from PIL import Image, features

from fastmae.data.dataset import Dataset, printable, upright_shapes
from fastmae.data.decode import UndecodableImage, decode
from fastmae.data.errors import DataError
from fastmae.data.formats import MODES, BadImage, Format, parse_header
from fastmae.data.open import open_dataset
from fastmae.data.processes import Workers, available_cores
from fastmae.data.sampler import permuted_ids
from fastmae.data.storage import RecordStorage
from fastmae.data.table import Part
from fastmae.data.tar import BLOCK, INDEX_SUFFIX, parse_shard, write_shard_index
from fastmae.data.threads import in_order

MANIFEST, BAD_FILES, CLASSES = "shards.json", "bad_files.jsonl", "classes.txt"
_PROGRESS = ".progress"
_FORMAT = 1
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)  # as some cluster file systems answer
_SUFFIXES = {Format.JPEG: ".jpg", Format.PNG: ".png", Format.WEBP: ".webp", Format.TIFF: ".tif", Format.NPY: ".npy"}
_PHOTOGRAPHS = (Format.JPEG, Format.PNG, Format.WEBP)
_SIXTEEN_BITS = ("I", "I;16")
_LONGEST_JPEG = 65500  # libjpeg's limit
_NAME_CHARACTERS = 64
_REDUCING_GAP = 3.0  # averages whole blocks of a very large image first; Pillow calls the result indistinguishable
_HEADERS = 1024  # bytes of a tar header and of half a block of padding, rounded up; a class takes as much again
_JPEG_BYTES_PER_PIXEL = 0.4  # at quality 90
_SCANNED = 65536
_IMAGES_PER_PROCESS = 2000  # a process takes seconds to start
Progress = Callable[[int, int], None]
"""Called with how many more images and bytes are done."""


@dataclass(frozen=True)
class ShardOptions:
    """What the content of the shards depends on, apart from the source.

    Attributes:
        short_side: shrink 8-bit photographs to this short side, in pixels, and store them as JPEG; None: do not.
        quality: of JPEG, 1 to 100.
        reencode: also encode photographs as JPEG that keep their size.
        shard_bytes: target size of a shard; sizes of re-encoded images are estimates.
        images_per_shard: most images in a shard; replaces ``shard_bytes``.
        shuffle_seed: of the order; None for the order of the source.
    """

    short_side: int | None = None
    quality: int = 90
    reencode: bool = False
    shard_bytes: int = 256 << 20
    images_per_shard: int | None = None
    shuffle_seed: int | None = 0

    def __post_init__(self):
        for name, low, high in (("short_side", 1, None), ("shard_bytes", 1, None), ("images_per_shard", 1, None),
                                ("quality", 1, 100), ("shuffle_seed", 0, 2**63 - 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                expected = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{name}: expected {expected}, got {value}")


# ---------------------------------------------------------------------------------------------------------------------
# An image


class StoredImage(NamedTuple):
    """A member's name and data, its class (-1: none), the upright image's sides, and whether it was encoded anew."""

    name: str
    data: bytes
    label: int
    height: int
    width: int
    encoded: bool = False


def stored_shapes(rows: np.ndarray, options: ShardOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How images are stored, by what the index says of them.

    Args:
        rows: ``table.ENTRY`` (n,).

    Returns:
        Upright heights and widths in the shard, int64 (n,), and which images are encoded anew, bool (n,).
    """
    heights, widths = upright_shapes(rows)
    eight_bits = ~np.isin(rows["mode"], [MODES.index(mode) for mode in _SIXTEEN_BITS])
    photographs = np.isin(rows["format"], _PHOTOGRAPHS) & eight_bits & (np.maximum(heights, widths) <= _LONGEST_JPEG)
    shorts = np.minimum(heights, widths)
    larger = photographs & (shorts > (options.short_side or np.iinfo(np.int64).max))
    if options.short_side is not None:
        scale = options.short_side / np.maximum(shorts, 1)
        heights = np.where(larger, np.maximum(np.rint(heights * scale), 1), heights).astype(np.int64)
        widths = np.where(larger, np.maximum(np.rint(widths * scale), 1), widths).astype(np.int64)
    return heights, widths, larger | (photographs & options.reencode)


def store_image(dataset: Dataset, sample_id: int, options: ShardOptions) -> StoredImage | str:
    """An image as a shard is to hold it, or why it cannot be encoded anew.

    Raises:
        DataError: it cannot be read, or has changed since it was indexed.
    """
    rows = dataset.rows(np.array([sample_id]))
    row = rows[0]
    (height,), (width,), (anew,) = (values.tolist() for values in stored_shapes(rows, options))
    format_, path = Format(int(row["format"])), dataset.path(sample_id)
    try:
        data = dataset.read(sample_id)
        if format_ is Format.NPY:  # whoever reads the shard without channels_first takes the last axis for the channels
            height, width = parse_header(BytesIO(data), "x.npy")[1:3]
    except (UndecodableImage, BadImage) as error:
        raise DataError(f"{printable(path)}: {error}; start again with another folder") from error
    stored = data.tobytes()
    if anew:
        try:
            pixels = decode(data, int(row["orientation"]), channels=dataset.channels)
        except UndecodableImage as error:
            return str(error)
        expected = tuple(int(side[0]) for side in upright_shapes(rows))
        if pixels.shape[:2] != expected:
            return f"decodes to {pixels.shape[:2]}, its header said {expected}"
        grey = row["channels"] == 1
        format_, stored = Format.JPEG, _encode(pixels[..., 0] if grey else pixels, height, width, options.quality)
    name = _member_key(dataset, sample_id, path) + _SUFFIXES[format_]
    return StoredImage(name, stored, int(row["label"]), height, width, anew)


def _encode(pixels: np.ndarray, height: int, width: int, quality: int) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
    buffer = BytesIO()
    # optimize=True would save 3 %, but Pillow then guesses the buffer that it needs, too small for noise.
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _member_key(dataset: Dataset, sample_id: int, path: str) -> str:
    """The name of a sample in a shard, without suffix: its number in the source, and the harmless part of its path.

    It has no dot, where a WebDataset key ends, fits into a plain tar header, and means nothing to a shell. The number
    tells ``a.jpg``, ``a.png`` and ``A/a.jpg`` apart.
    """
    digits = max(9, len(str(len(dataset) - 1)))
    path = path.removeprefix(f"{dataset.root}/").rpartition("::")[2]
    folder, slash, last = path.rpartition("/")
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", folder + slash + (last.rpartition(".")[0] or last))
    return f"{sample_id:0{digits}d}-{stem[-_NAME_CHARACTERS:]}"


# ---------------------------------------------------------------------------------------------------------------------
# A shard


def write_shard(path: Path, images: Iterable[StoredImage]) -> tuple[int, str]:
    """Write a tar of images and their classes, and its index. It gets its name once it has been read back and compared.

    Returns:
        Bytes and SHA-256 of the tar.

    Raises:
        DataError: what was read back is not what was written.
        OSError: the disk is full, or the file system failed.
    """
    # The name is random, so that a process that outlives its parent is not in the way of the next run.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    digest, written = hashlib.sha256(), []
    try:
        with partial.open("wb") as file:
            for image in images:
                piece = _member(image.name, image.data)
                if image.label >= 0:
                    piece += _member(image.name.partition(".")[0] + ".cls", b"%d" % image.label)
                digest.update(piece)
                file.write(piece)
                written.append((image.name, len(image.data), image.label, image.height, image.width))
            end = bytes(2 * BLOCK + -(file.tell() + 2 * BLOCK) % tarfile.RECORDSIZE)
            digest.update(end)
            file.write(end)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # so that the disk is read, not the page cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        part = _read_back(partial, written, digest.hexdigest())
        size = partial.stat().st_size
        partial.replace(path)
        write_shard_index(path, part)
    finally:
        partial.unlink(missing_ok=True)
    return size, digest.hexdigest()


def _member(name: str, data: bytes) -> bytes:
    header = tarfile.TarInfo(name)  # time and owner are zero: the same images make the same bytes
    header.size, header.mode = len(data), 0o644
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def _read_back(path: Path, written: list[tuple], digest: str) -> Part:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise DataError(f"{path}: reads back otherwise than it was written (SHA-256 {found}, expected {digest})")
    part = parse_shard(path)
    names = [part.names[row["name"] : row["name"] + row["name_size"]].decode() for row in part.rows]
    columns = part.rows["size"], part.rows["label"], *upright_shapes(part.rows)
    read = list(zip(names, *(column.tolist() for column in columns), strict=True))
    if part.bad or read != written:
        image = next((a for a, b in zip(written, read, strict=False) if a != b), None)
        raise DataError(f"{path}: wrote {len(written)} images, read back {len(read)}; the first to differ: {image}")
    return part


# ---------------------------------------------------------------------------------------------------------------------
# A folder of shards


class ShardFolder:
    """Shards of one source, packed in one or several parts, each by one process at a time. Use as a context manager.

    ``shards.json`` holds the plan, which is the same for all parts, and in the end what was packed. Until then each
    part lists its complete shards in a hidden file, which it holds locked.

    Raises:
        DataError: the part is being packed, or the folder holds something else, or was begun with another plan.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, plan: dict[str, Any], names: Iterable[str] = (), part: tuple[int, int] = (1, 1)):
        self.path, self._names, self._part = path, set(names), "{}-of-{}".format(*part)
        path.mkdir(parents=True, exist_ok=True)
        self._begin(plan)
        self._progress = (path / f"{_PROGRESS}-{self._part}.jsonl").open("a")
        try:
            fcntl.flock(self._progress, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self._progress.close()
                raise DataError(f"{path}: another process is packing part {part[0]}/{part[1]}: {error}") from error

    def __enter__(self) -> Self:
        self._remove_leftovers()
        return self

    def __exit__(self, *exception: object) -> None:
        self._remove_leftovers()
        self._progress.close()

    def add(self, record: dict[str, Any]) -> None:
        """Remember that a shard is complete."""
        self._progress.write("\n" + json.dumps(record))  # the newline first, since a kill may have left half a line
        self._progress.flush()
        os.fsync(self._progress.fileno())

    def complete(self) -> dict[str, dict[str, Any]]:
        """The records of the complete shards of all parts, by name."""
        records = []
        for path in self.path.glob(f"{_PROGRESS}*.jsonl"):
            with suppress(FileNotFoundError):
                for line in path.read_text().splitlines():
                    with suppress(ValueError):
                        records.append(json.loads(line))
        # Read last: a part that finishes removes those files once this one is written.
        records = self._manifest().get("shards", []) + records
        there = {path.name: path.stat().st_size for path in self.path.glob("shard-*.tar*")}
        return {record["name"]: record for record in records
                if there.get(record["name"]) == record["bytes"] and record["name"] + INDEX_SUFFIX in there}  # fmt: skip

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write down that all parts are complete."""
        self.write(MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for path in self.path.glob(f"{_PROGRESS}*.jsonl"):
            path.unlink(missing_ok=True)

    def write(self, name: str, text: str, *, once: bool = False) -> None:
        """Write a file, whole or not at all; ``once``: if another part has not written it."""
        path, partial = self.path / name, self.path / f".{name}.{self._part}.partial"
        try:
            with partial.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if once:
                with suppress(OSError):  # it exists; or the file system has no links
                    path.hardlink_to(partial)
            if not once or not path.exists():
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _begin(self, plan: dict[str, Any]) -> None:
        there = sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))
        if not there:
            self.write(MANIFEST, json.dumps(plan, indent=1) + "\n", once=True)
        elif not (self.path / MANIFEST).exists():
            raise DataError(f"{self.path}: expected a new or empty folder, or one with {MANIFEST}; found {there[0]!r}")
        begun = self._manifest()
        differences = [f"{name} {begun.get(name)} there, {here} here" for name, here in plan.items()
                       if begun.get(name) != here]  # fmt: skip
        if differences:
            raise DataError(
                f"{self.path}: was begun with another source or other options: {'; '.join(differences)}. "
                "Give the same ones to resume it, or choose another folder"
            )

    def _manifest(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / MANIFEST).read_text()))
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.path / MANIFEST}: is damaged: {error}; delete the folder to start again") from error

    def _remove_leftovers(self) -> None:
        for path in self.path.glob(".*.tar.*"):  # .shard-000000.tar.<random>.partial or .index.npz
            if f"{path.name.split('.')[1]}.tar" in self._names:
                path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# All shards


class Packed(NamedTuple):
    """What was packed: by this part if shards of others are ``missing``, else by all.

    ``encoded`` counts the images encoded anew, ``source_bytes`` the images' bytes before, ``bad`` the images left out.
    """

    folder: Path
    shards: int
    missing: int
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
    part: tuple[int, int] = (1, 1),
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Pack a data set into ``out/shard-000000.tar`` and so on, each with its index, or resume doing so.

    ``shards.json`` then holds the source's hash, the options, and each shard's size and SHA-256; ``bad_files.jsonl``
    what was left out, ``classes.txt`` the names of the classes.

    Args:
        dataset: what to pack, without the images known to be bad.
        out: a new or empty folder, or that of a run with the same source and options.
        options: None for the defaults.
        part: (i, n), 1 <= i <= n, packs every n-th shard. Parts may run at the same time, on machines that share the
            folder. The last one to end, or a later run of any, writes the files about all shards.
        num_workers: processes that pack a shard each; threads if there are few images or no index on disk. None: one
            per core.
        progress: called, in this thread, with how many more images and bytes are done.

    Raises:
        ValueError: a part out of range.
        DataError: ``out`` holds something else or is in use; the source has changed or cannot be read, or too much of
            it is bad; the disk is full, or returns other bytes than it was given. Complete shards stay.
    """
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part: expected i/n with 1 <= i <= n, got {part[0]}/{part[1]}")
    options, progress = options or ShardOptions(), progress or _no_progress
    count = _num_shards(dataset, options)
    names = [f"shard-{number:0{max(6, len(str(count - 1)))}d}.tar" for number in range(count)]
    own = dict(list(enumerate(names))[part[0] - 1 :: part[1]])
    plan = {"format": _FORMAT, "source": dataset.hash, "source_images": len(dataset), **asdict(options),
            "encoder": _encoder(options), "num_shards": count}  # fmt: skip
    bad = dict(dataset.index.bad)

    def check(*records: dict[str, Any]) -> None:
        more = {int(sample_id): reason for record in records for sample_id, reason in record["bad"]}
        bad.update(more)
        if more:
            dataset.check_bad_fraction(bad)

    try:
        with ShardFolder(out, plan, own.values(), part) as folder:
            complete = folder.complete()
            check(*complete.values())
            for record in (complete[name] for name in own.values() if name in complete):
                progress(record["images"] + len(record["bad"]), record["bytes"])
            shards = {number: out / name for number, name in own.items() if name not in complete}
            for record in _pack(dataset, shards, count, options, num_workers or available_cores(), progress):
                folder.add(record)
                check(record)
            complete = folder.complete()
            check(*complete.values())
            missing = count - len(complete)
            records = [complete[name] for name in (own.values() if missing else names)]
            totals = {name: sum(r[name] for r in records) for name in ("images", "encoded", "bytes", "source_bytes")}
            if not missing:
                lines = [json.dumps({"path": dataset.path(i), "reason": reason}) for i, reason in sorted(bad.items())]
                folder.write(BAD_FILES, "".join(f"{line}\n" for line in lines))
                if dataset.classes:
                    folder.write(CLASSES, "".join(f"{name}\n" for name in dataset.classes))
                folder.finish(plan | totals | {"bad": len(bad), "shards": records})
            return Packed(out, len(records), missing, bad=len(bad), **totals)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error}. Complete shards stay; the same command resumes") from error


def _no_progress(images: int, size: int) -> None:
    pass


def _num_shards(dataset: Dataset, options: ShardOptions) -> int:
    if options.images_per_shard is not None:
        return math.ceil(len(dataset) / options.images_per_shard)
    total = 0.0
    for start in range(0, len(dataset), _SCANNED):
        rows = dataset.rows(np.arange(start, min(start + _SCANNED, len(dataset))))
        rows = rows[rows["bad"] == 0]
        heights, widths, anew = stored_shapes(rows, options)
        estimated = np.minimum(rows["size"], _JPEG_BYTES_PER_PIXEL * heights * widths)
        total += float(np.where(anew, estimated, rows["size"]).sum() + (_HEADERS * (1 + (rows["label"] >= 0))).sum())
    return max(1, min(len(dataset), math.ceil(total / options.shard_bytes)))


def _encoder(options: ShardOptions) -> str | None:
    """The libraries that the bytes of encoded images depend on."""
    if options.short_side is None and not options.reencode:
        return None
    jpeg = features.version_feature("libjpeg_turbo") or features.version_codec("jpg")
    return f"Pillow {PIL.__version__}, libjpeg {jpeg}, torchvision {torchvision.__version__}"


def _sample_ids(dataset: Dataset, options: ShardOptions, number: int, count: int) -> np.ndarray:
    """The samples of a shard, but those known to be bad."""
    total = len(dataset)
    ids = np.arange(number * total // count, (number + 1) * total // count)
    if options.shuffle_seed is not None:
        ids, _ = permuted_ids(ids, total, options.shuffle_seed)
    return ids[~dataset.is_bad(ids)]


def _pack(
    dataset: Dataset, shards: dict[int, Path], count: int, options: ShardOptions, workers: int, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Pack some of ``count`` shards; yield a record of each that is complete."""
    processes = min(workers, len(shards), len(shards) * len(dataset) // count // _IMAGES_PER_PROCESS)
    can_be_opened_again = dataset.index.folder is not None and not isinstance(dataset.storage, RecordStorage)
    if processes < 2 or not can_be_opened_again:
        for number, path in shards.items():
            ids = _sample_ids(dataset, options, number, count)
            yield _pack_shard(dataset, ids, path, options, workers, progress)
        return
    opening = {"path": dataset.root, "index": dataset.index.folder, "max_bad_fraction": 1.0, **asdict(dataset.accepts)}
    threads = max(2, math.ceil(workers / processes))  # two, since one waits for the disk or the network
    pool = Workers(processes)

    def pack(number: int) -> dict[str, Any]:
        ids = _sample_ids(dataset, options, number, count)
        return pool.call(_pack_in_worker, (tuple(opening.items()), ids, shards[number], options, threads))

    with ThreadPoolExecutor(processes) as callers:
        try:
            for future in as_completed([callers.submit(pack, number) for number in shards]):
                record = future.result()
                progress(record["images"] + len(record["bad"]), record["bytes"])
                yield record
        except RuntimeError as error:  # for example, the kernel killed a worker because memory ran out
            raise DataError(f"{error}. Complete shards stay; the same command resumes") from error
        finally:
            callers.shutdown(wait=False, cancel_futures=True)
            pool.stop()


def _pack_in_worker(task: tuple) -> dict[str, Any]:
    opening, *arguments = task
    return _pack_shard(_open_again(opening), *arguments, _no_progress)


@cache
def _open_again(opening: tuple[tuple[str, Any], ...]) -> Dataset:
    logging.disable(logging.WARNING)  # logged when the data set was opened first
    dataset = open_dataset(**dict(opening))
    logging.disable(logging.NOTSET)
    return dataset


def _pack_shard(
    dataset: Dataset, ids: np.ndarray, path: Path, options: ShardOptions, threads: int, progress: Progress
) -> dict[str, Any]:
    counts, bad = {"images": 0, "encoded": 0, "source_bytes": 0}, []

    def images() -> Iterator[StoredImage]:
        stored = in_order(lambda sample_id: store_image(dataset, sample_id, options), ids.tolist(), threads)
        for sample_id, size, image in zip(ids.tolist(), dataset.rows(ids)["size"].tolist(), stored, strict=True):
            if isinstance(image, str):
                bad.append((sample_id, image))
            else:
                counts["images"] += 1
                counts["encoded"] += image.encoded
                counts["source_bytes"] += size
                yield image
            progress(1, 0 if isinstance(image, str) else len(image.data))

    size, digest = write_shard(path, images())
    return {"name": path.name, **counts, "bytes": size, "sha256": digest, "bad": bad}
