"""Packing a data set into WebDataset tar shards: planned whole, written one by one, continued where it was cut off.

Which image goes where depends on the source's index and the options alone. So a run that was killed is continued by
running it again: complete shards stay, the others come out as they would have, byte for byte.

Images keep the order of a seeded permutation, so that a reader that goes from front to back, as most do, meets no
sorted classes. Reading the source in that order is random access, as training is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmae.data.batch import DataError
from fastmae.data.dataset import Dataset
from fastmae.data.decode import UndecodableImage
from fastmae.data.options import available_cores
from fastmae.data.parts import in_order
from fastmae.data.sampler import permuted_ids
from fastmae.data.shard_file import write_shard
from fastmae.data.shard_folder import ShardFolder, write_text
from fastmae.data.shard_image import Encoding, StoredImage, encoder, store_image, stored_shapes

BAD_FILES, CLASSES = "bad_files.jsonl", "classes.txt"
_FORMAT = 1
_SCANNED = 65536
_HEADERS = 1024  # a tar header, and half a block of padding on average; as much again for a class
_JPEG_BYTES_PER_PIXEL = 0.4  # about that at quality 90

Progress = Callable[[int, int], None]
"""Called with how many more images and bytes are done."""


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
