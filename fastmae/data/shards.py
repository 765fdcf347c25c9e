"""Pack a data set into verified WebDataset tar shards, by several processes and on several machines.

What a shard holds depends on the source's index and the options alone. So its bytes are the same whoever packs it and
however often packing was interrupted: complete shards stay, and running again packs the others.

Images have the order of a seeded permutation, so that a sequential reader does not see classes one after the other.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import tarfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torchvision
from PIL import Image, features

from fastmae.data.dataset import Dataset, printable, upright_shapes
from fastmae.data.decode import decode
from fastmae.data.errors import DataError, UndecodableImage
from fastmae.data.formats import MODES, Format
from fastmae.data.open import open_dataset
from fastmae.data.processes import available_cores, in_processes
from fastmae.data.records import RecordSource
from fastmae.data.sampler import permuted_ids
from fastmae.data.storage import write_whole
from fastmae.data.tar import BLOCK, INDEX_SUFFIX, parse_shard, write_shard_index
from fastmae.data.threads import in_order

logger = logging.getLogger(__name__)
MANIFEST, BAD_FILES, CLASSES = "shards.json", "bad_files.jsonl", "classes.txt"
_FORMAT = 1
_SUFFIXES = {Format.JPEG: ".jpg", Format.PNG: ".png", Format.WEBP: ".webp", Format.TIFF: ".tif", Format.NPY: ".npy"}
_SIXTEEN_BITS = [MODES.index(mode) for mode in ("I", "I;16")]
_LONGEST_JPEG = 65500  # libjpeg's limit
_NAME_CHARACTERS = 64
_REDUCING_GAP = 3.0  # averages whole blocks of a very large image first; Pillow calls the result indistinguishable
_HEADERS = 1024  # bytes of a tar header and of half a block of padding, rounded up; a class takes as much again
_JPEG_BYTES_PER_PIXEL = 0.4  # at quality 90
_IMAGES_PER_PROCESS = 2000  # a process takes seconds to start
Progress = Callable[[int], None]


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


class Packed(NamedTuple):
    """What was packed: by this part if shards of others are ``missing``, else by all. ``encoded`` counts the images
    encoded anew, ``source_bytes`` the images' bytes before, ``bad`` the images left out."""

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
    progress: Progress = lambda images: None,
) -> Packed:
    """Pack a data set into ``out/shard-000000.tar`` and so on, each with its index, or resume doing so.

    ``shards.json`` then holds the source's hash, the options, and each shard's size and SHA-256; ``bad_files.jsonl``
    what was left out, ``classes.txt`` the names of the classes.

    Args:
        dataset: what to pack, without the images known to be bad.
        out: a new or empty folder, or that of a run with the same source and options.
        part: (i, n), 1 <= i <= n, packs every n-th shard. Parts may run at the same time, on machines that share the
            folder. The last one to end, or a later run of any, writes the files about all shards.
        num_workers: processes that pack a shard each; threads if there are few images or no index on disk. None: one
            per core.
        progress: called, in this thread, with how many more images are done.

    Raises:
        ValueError: a part out of range.
        DataError: ``out`` holds something else or is in use; the source has changed or cannot be read, or too much of
            it is bad; the disk is full, or returns other bytes than it was given. Complete shards stay.
    """
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part: expected i/n with 1 <= i <= n, got {part[0]}/{part[1]}")
    options, bad = options or ShardOptions(), dict(dataset.index.bad)
    count = _num_shards(dataset, options)
    names = [f"shard-{number:0{max(6, len(str(count - 1)))}d}.tar" for number in range(count)]
    own = {names[number]: number for number in range(part[0] - 1, count, part[1])}
    plan = {"format": _FORMAT, "source": dataset.hash, "source_images": len(dataset), **asdict(options),
            "encoder": _encoder(options), "num_shards": count}  # fmt: skip

    def check(*records: dict[str, Any]) -> None:
        if more := [pair for record in records for pair in record["bad"]]:
            bad.update(more)
            dataset.check_bad_fraction(bad)

    try:
        with _begin(out, plan, part):
            for path in out.glob(".*.partial"):  # a process that was killed has left them
                if f"{path.name.split('.')[1]}.tar" in own:
                    path.unlink(missing_ok=True)
            complete = _complete(out, plan)
            check(*complete.values())
            progress(sum(record["images"] + len(record["bad"]) for name, record in complete.items() if name in own))
            shards = {number: out / name for name, number in own.items() if name not in complete}
            for record in _pack(dataset, shards, count, options, num_workers or available_cores(), progress):
                check(record)
            complete = _complete(out, plan)
            check(*complete.values())
            missing = count - len(complete)
            records = [complete[name] for name in (own if missing else names)]
            totals = {name: sum(r[name] for r in records) for name in ("images", "encoded", "bytes", "source_bytes")}
            if not missing:
                lines = [json.dumps({"path": dataset.path(i), "reason": reason}) for i, reason in sorted(bad.items())]
                write_whole(out / BAD_FILES, "".join(f"{line}\n" for line in lines).encode())
                if dataset.classes:
                    write_whole(out / CLASSES, "".join(f"{name}\n" for name in dataset.classes).encode())
                _write_json(out / MANIFEST, plan | totals | {"bad": len(bad), "shards": records})
                for path in out.glob(".*.json"):
                    path.unlink(missing_ok=True)
            return Packed(out, len(records), missing, bad=len(bad), **totals)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error}. Complete shards stay; the same command resumes") from error


def _num_shards(dataset: Dataset, options: ShardOptions) -> int:
    if options.images_per_shard is not None:
        return math.ceil(len(dataset) / options.images_per_shard)
    total = 0.0
    for rows in dataset.index.table.scan():
        rows = rows[rows["bad"] == 0]
        heights, widths, anew = _stored_shapes(rows, options)
        estimated = np.minimum(rows["size"], _JPEG_BYTES_PER_PIXEL * heights * widths)
        total += float(np.where(anew, estimated, rows["size"]).sum() + (_HEADERS * (1 + (rows["label"] >= 0))).sum())
    return max(1, min(len(dataset), math.ceil(total / options.shard_bytes)))


def _encoder(options: ShardOptions) -> str | None:
    """The libraries that the bytes of encoded images depend on."""
    if options.short_side is None and not options.reencode:
        return None
    jpeg = features.version_feature("libjpeg_turbo") or features.version_codec("jpg")
    return f"Pillow {PIL.__version__}, libjpeg {jpeg}, torchvision {torchvision.__version__}"


# ---------------------------------------------------------------------------------------------------------------------
# The folder: the plan in shards.json; until all shards are there, hidden files: a lock per part, a record per shard


def _begin(out: Path, plan: dict[str, Any], part: tuple[int, int]) -> TextIOWrapper:
    """Write down the plan in a new folder; hold a part until the returned file is closed."""
    out.mkdir(parents=True, exist_ok=True)
    there = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if not there:
        _write_json(out / MANIFEST, plan)
    elif MANIFEST not in there:
        raise DataError(f"{out}: expected a new or empty folder, or one with {MANIFEST}; found {there[0]!r}")
    _manifest(out, plan)
    lock = (out / ".part-{}-of-{}.json".format(*part)).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.close()
        raise DataError(f"{out}: another process is packing part {part[0]}/{part[1]}") from error
    except OSError as error:  # some cluster file systems have no locks
        logger.warning("%s: start no part twice, because the file system has no locks: %s", out, error)
    return lock


def _manifest(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    try:
        begun = dict(json.loads((out / MANIFEST).read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{out / MANIFEST}: is damaged: {error}; delete the folder to start again") from error
    if differ := [f"{name} {begun.get(name)} there, {here} here" for name, here in plan.items()
                  if begun.get(name) != here]:  # fmt: skip
        raise DataError(
            f"{out}: was begun with another source or other options: {'; '.join(differ)}. "
            "Give the same ones to resume it, or choose another folder"
        )
    return begun


def _complete(out: Path, plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The records of the complete shards of all parts, by name."""
    records = []
    for path in out.glob(".shard-*.json"):
        with suppress(FileNotFoundError, ValueError):
            records.append(json.loads(path.read_text()))
    # The manifest is read last, because a part that finishes removes the records once it has them.
    records = _manifest(out, plan).get("shards", []) + records
    there = {path.name: path.stat().st_size for path in out.glob("shard-*.tar*")}
    return {record["name"]: record for record in records
            if there.get(record["name"]) == record["bytes"] and record["name"] + INDEX_SUFFIX in there}  # fmt: skip


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def _pack(
    dataset: Dataset, shards: dict[int, Path], count: int, options: ShardOptions, workers: int, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Pack some of ``count`` shards; yield their records."""

    def ids(number: int) -> np.ndarray:
        total = len(dataset)
        ids = np.arange(number * total // count, (number + 1) * total // count)
        if options.shuffle_seed is not None:
            ids, _ = permuted_ids(ids, total, options.shuffle_seed)
        return ids[~dataset.is_bad(ids)]

    processes = min(workers, len(shards), len(shards) * len(dataset) // count // _IMAGES_PER_PROCESS)
    can_be_opened_again = dataset.index.folder is not None and not isinstance(dataset.storage, RecordSource)
    if processes < 2 or not can_be_opened_again:
        for number, path in shards.items():
            yield _pack_shard(dataset, ids(number), path, options, workers, progress)
        return
    opening = dataset.root, dataset.index.folder, dataset.accepts
    threads = max(2, math.ceil(workers / processes))  # two, since one waits for the disk or the network
    tasks = ((*opening, ids(number), path, options, threads) for number, path in shards.items())
    try:
        for record in in_processes(pack_in_worker, tasks, processes):
            progress(record["images"] + len(record["bad"]))
            yield record
    except RuntimeError as error:  # for example, the kernel killed a worker because memory ran out
        raise DataError(f"{error}. Complete shards stay; the same command resumes") from error


def pack_in_worker(task: tuple) -> dict[str, Any]:
    path, index, accepts, *arguments = task
    logging.disable(logging.WARNING)  # logged when the data set was opened first
    dataset = open_dataset(path, index=index, max_bad_fraction=1.0, **asdict(accepts))
    return _pack_shard(dataset, *arguments, lambda images: None)


def _pack_shard(
    dataset: Dataset, ids: np.ndarray, path: Path, options: ShardOptions, threads: int, progress: Progress
) -> dict[str, Any]:
    """Write a tar of images and their classes, and its index. It gets its name once it has been read back and compared.
    Return what ``shards.json`` says of it."""
    # The name is random, so that a process that outlives its parent is not in the way of the next run.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    digest, written, bad, encoded, source_bytes = hashlib.sha256(), [], [], 0, 0
    stored = in_order(lambda sample_id: store_image(dataset, sample_id, options), ids.tolist(), threads)
    try:
        with partial.open("wb") as file:
            for sample_id, size, image in zip(ids.tolist(), dataset.rows(ids)["size"].tolist(), stored, strict=True):
                progress(1)
                if isinstance(image, str):
                    bad.append((sample_id, image))
                    continue
                data = _member(image.name, image.data)
                if image.label >= 0:
                    data += _member(image.name.partition(".")[0] + ".cls", b"%d" % image.label)
                digest.update(data)
                file.write(data)
                written.append((image.name, len(image.data), image.label))
                encoded, source_bytes = encoded + image.encoded, source_bytes + size
            end = bytes(2 * BLOCK + -(file.tell() + 2 * BLOCK) % tarfile.RECORDSIZE)
            digest.update(end)
            file.write(end)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # so that the disk is read, not the page cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with partial.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest.hexdigest():
            raise DataError(f"{path}: reads back otherwise than it was written: SHA-256 {found}")
        part = parse_shard(partial)
        names = [part.names[row["name"] : row["name"] + row["name_size"]].decode() for row in part.rows]
        read = list(zip(names, part.rows["size"].tolist(), part.rows["label"].tolist(), strict=True))
        if part.bad or read != written:
            first = next((a for a, b in zip(written, read, strict=False) if a != b), part.bad)
            raise DataError(f"{path}: wrote {len(written)} images, read back {len(read)}; the first to differ: {first}")
        record = {"name": path.name, "images": len(written), "encoded": encoded, "source_bytes": source_bytes,
                  "bytes": partial.stat().st_size, "sha256": found, "bad": bad}  # fmt: skip
        partial.replace(path)
        write_shard_index(path, part)
    finally:
        partial.unlink(missing_ok=True)
    _write_json(path.with_name(f".{path.name}.json"), record)
    return record


def _member(name: str, data: bytes) -> bytes:
    header = tarfile.TarInfo(name)  # time and owner are zero: the same images make the same bytes
    header.size, header.mode = len(data), 0o644
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


# ---------------------------------------------------------------------------------------------------------------------
# Images


class StoredImage(NamedTuple):
    """A member's name and data, its class (-1: none), and whether it was encoded anew."""

    name: str
    data: bytes
    label: int
    encoded: bool


def _stored_shapes(rows: np.ndarray, options: ShardOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Heights and widths of images in a shard, int64 (n,), by rows of the index (n,); which are encoded anew, bool."""
    heights, widths = upright_shapes(rows)
    photographs = np.isin(rows["format"], [Format.JPEG, Format.PNG, Format.WEBP])
    photographs &= ~np.isin(rows["mode"], _SIXTEEN_BITS) & (np.maximum(heights, widths) <= _LONGEST_JPEG)
    shorts = np.maximum(np.minimum(heights, widths), 1)
    larger = photographs & (shorts > (options.short_side or np.iinfo(np.int64).max))
    scale = np.where(larger, (options.short_side or 1) / shorts, 1.0)
    heights, widths = (np.maximum(np.rint(sides * scale), 1).astype(np.int64) for sides in (heights, widths))
    return heights, widths, larger | (photographs & options.reencode)


def store_image(dataset: Dataset, sample_id: int, options: ShardOptions) -> StoredImage | str:
    """An image as a shard is to hold it, or why it cannot be encoded anew; DataError if it has changed."""
    rows, path = dataset.rows(np.array([sample_id])), dataset.path(sample_id)
    row, format_ = rows[0], Format(int(rows[0]["format"]))
    try:
        data = dataset.read(sample_id)
    except UndecodableImage as error:
        raise DataError(f"{printable(path)}: {error}; start again with another folder") from error
    (height,), (width,), (anew,) = (values.tolist() for values in _stored_shapes(rows, options))
    if anew:
        try:
            pixels = decode(data, int(row["orientation"]), channels=dataset.channels)
        except UndecodableImage as error:
            return str(error)
        if pixels.shape[:2] != dataset.shape(sample_id):
            return f"decodes to {pixels.shape[:2]}, its header said {dataset.shape(sample_id)}"
        image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if row["channels"] == 1 else pixels))
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
        format_, buffer = Format.JPEG, BytesIO()
        # optimize=True would save 3 %, but Pillow then guesses the buffer that it needs, too small for noise.
        image.save(buffer, "JPEG", quality=options.quality, subsampling="4:2:0")
        data = np.frombuffer(buffer.getbuffer(), np.uint8)
    # The name is the image's number, which tells a.jpg, a.png and A/a.jpg apart, and the harmless part of its path. It
    # has no dot, where a WebDataset key ends, fits into a plain tar header, and means nothing to a shell.
    folder, slash, last = path.removeprefix(f"{dataset.root}/").rpartition("::")[2].rpartition("/")
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", folder + slash + (last.rpartition(".")[0] or last))[-_NAME_CHARACTERS:]
    number = f"{sample_id:0{max(9, len(str(len(dataset) - 1)))}d}"
    return StoredImage(f"{number}-{stem}{_SUFFIXES[format_]}", data.tobytes(), int(row["label"]), anew)
