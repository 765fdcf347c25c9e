"""What the order in windows of shards saves: opened shards per image, and bytes that a disk has to read.

``python benchmarks/measure_order.py OUT.json``

Opens are counted by replaying the order of many shards against as many open files as the loader keeps. Bytes are those
that the kernel reads from the disk (``/proc/self/io``) when each image of a small set of shards is read once, after
their pages have left the page cache; less memory than data is imitated by dropping them again and again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

from fastmae.data import open_dataset
from fastmae.data.sampler import Order, batch_positions
from fastmae.data.shards import ShardOptions, write_shards
from fastmae.data.storage import _OPEN_SHARDS

SHARDS, IMAGES_PER_SHARD, GLOBAL_BATCH = 160_000, 1000, 4096
WINDOWS = (0, 64, 256, 1024)
DISK_SHARDS, DISK_IMAGES, DISK_BYTES = 200, 100, 20_000
DROP_EVERY = 0.05
"""Of the images: the page cache then holds a twentieth of the data."""


def opens_per_image(window: int, world_size: int) -> float:
    """Opened shards per image of one rank, over one window (without windows: 20,000 images)."""
    starts = np.arange(SHARDS) * IMAGES_PER_SHARD
    order = Order(SHARDS * IMAGES_PER_SHARD, 0, starts=starts, window=window)
    images = window * IMAGES_PER_SHARD // world_size if window else 20_000
    open_files: OrderedDict[int, None] = OrderedDict()
    opens = count = batch = 0
    while count < images:
        positions = batch_positions(batch, batch_size=GLOBAL_BATCH // world_size, world_size=world_size)
        for shard in (order.ids(positions)[0] // IMAGES_PER_SHARD).tolist():
            opens += shard not in open_files
            open_files[shard] = None
            open_files.move_to_end(shard)
            if len(open_files) > _OPEN_SHARDS:
                open_files.popitem(last=False)
        count, batch = count + len(positions), batch + 1
    return opens / count


def write_disk_shards(folder: Path) -> Path:
    """Shards of arrays of noise, which no file system makes smaller."""
    rng, images = np.random.default_rng(0), folder / "images"
    images.mkdir()
    for number in range(DISK_SHARDS * DISK_IMAGES):
        np.save(images / f"{number:06}.npy", rng.integers(0, 256, (DISK_BYTES // 100, 100, 1), np.uint8))
    dataset = open_dataset(images, channels=1)
    options = ShardOptions(images_per_shard=DISK_IMAGES)
    return write_shards(dataset, folder / "shards", options).folder


def bytes_from_disk(folder: Path, window: int) -> dict[str, float]:
    """Bytes that the disk reads for each byte of an image, in an epoch with a page cache smaller than the data."""
    dataset = open_dataset(folder, channels=1, window=window)
    ids = dataset.order(0).ids(np.arange(len(dataset)))[0].tolist()
    sizes = int(dataset.rows(np.array(ids))["size"].sum())
    read, every = 0, int(DROP_EVERY * len(ids))
    for first in range(0, len(ids), every):
        drop_pages(folder)
        before = disk_bytes()
        for sample_id in ids[first : first + every]:
            dataset.read(sample_id)
        read += disk_bytes() - before
    return {"read_over_used": round(read / sizes, 2), "used_mb": round(sizes / 1e6, 1)}


def drop_pages(folder: Path) -> None:
    os.sync()
    for path in folder.glob("*.tar"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def main() -> None:
    out = Path(sys.argv[1])
    opens = {
        f"window {window}": {f"{size} ranks": round(opens_per_image(window, size), 4) for size in (1, 8, 64)}
        for window in WINDOWS
    }
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        shards = write_disk_shards(Path(folder))
        disk = {f"window {window}": bytes_from_disk(shards, window) for window in (0, 10)}
    result = {
        "opens_per_image": {"shards": SHARDS, "images_per_shard": IMAGES_PER_SHARD, "global_batch": GLOBAL_BATCH,
                            "open_files": _OPEN_SHARDS, **opens},
        "disk": {"shards": DISK_SHARDS, "images_per_shard": DISK_IMAGES, "page_cache": DROP_EVERY, **disk},
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
