"""What an index costs a step at any number of images: time of a batch's lookups, and growth of the process.

Writes an index of ``--images`` rows (72 bytes each with their names) into ``--folder`` and reads it as a loader does:
sizes of a batch's samples, then each sample's name. The folder is left for the next time.

    python benchmarks/measure_index.py --folder /scratch/index --out benchmarks/results/<cpu>/index.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np

from fastmae.data.dataset import Dataset
from fastmae.data.index import Index
from fastmae.data.sampler import permuted_ids
from fastmae.data.table import ENTRY, Bytes, Table

NAME_BYTES = 24
CHUNK = 1 << 20


def write(folder: Path, count: int) -> None:
    """The rows and names of ``count`` images of ImageNet's usual size."""
    with (folder / "rows.bin").open("wb") as rows_file, (folder / "names.bin").open("wb") as names_file:
        for start in range(0, count, CHUNK):
            numbers = np.arange(start, min(start + CHUNK, count))
            rows = np.zeros(len(numbers), ENTRY)
            rows["name"], rows["name_size"] = numbers * NAME_BYTES, NAME_BYTES
            rows["size"], rows["height"], rows["width"] = 110_000, 375, 500
            rows["format"] = rows["orientation"] = 1
            rows_file.write(rows.tobytes())
            names_file.write(np.char.mod("%020d.jpg", numbers).astype(f"S{NAME_BYTES}").tobytes())


def forget(folder: Path) -> None:
    """Have the operating system drop what it holds of the files, so that the disk is read."""
    for name in ("rows.bin", "names.bin"):
        with (folder / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, batch_size: int, steps: int, first: int) -> dict[str, float]:
    """Medians of a batch's lookups in milliseconds, and megabytes by which the process grew."""
    table = Table(Bytes(folder / "rows.bin"), Bytes(folder / "names.bin"))
    dataset = Dataset(Index(table, {}, "00", [], [], frozenset()), folder, name="index")
    sizes, names, resident = [], [], []
    for step in range(first, first + steps):
        ids, _ = permuted_ids(np.arange(step * batch_size, (step + 1) * batch_size), len(dataset), seed=0)
        begun = time.perf_counter()
        dataset.shapes(ids)
        between = time.perf_counter()
        for sample_id in ids.tolist():
            dataset.path(sample_id)
        sizes.append(between - begun)
        names.append(time.perf_counter() - between)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    return {
        "sizes_ms": 1e3 * statistics.median(sizes),
        "names_ms": 1e3 * statistics.median(names),
        "grown_mb": (resident[-1] - resident[0]) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = arguments.folder / "rows.bin"
    if not rows.exists() or rows.stat().st_size != arguments.images * ENTRY.itemsize:
        write(arguments.folder, arguments.images)
    forget(arguments.folder)
    result = {
        "images": arguments.images,
        "batch_size": arguments.batch_size,
        "steps": arguments.steps,
        "from_disk": measure(arguments.folder, arguments.batch_size, arguments.steps, 0),
        "from_cache": measure(arguments.folder, arguments.batch_size, arguments.steps, 0),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
