"""What an index costs: to build it, to open it, and a step's lookups in it.

Writes an index of ``--images`` rows (72 bytes each with their names) into ``--folder`` and reads it as a loader does:
sizes of a batch's samples, then each sample's name. With ``--files`` it writes as many small JPEG files there instead,
a thousand to a folder, and indexes them: from nothing, unchanged, and with one file in a hundred changed. The folder is
left for the next time.

    python benchmarks/measure_index.py --folder /scratch/index --out benchmarks/results/<cpu>/index.json
    python benchmarks/measure_index.py --folder /scratch/files --files 1000000 --out benchmarks/results/<cpu>/...
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fastmae.data import open_dataset
from fastmae.data.dataset import Dataset
from fastmae.data.index import BESIDE, VERSION, Accepts, Index, trusted_index
from fastmae.data.sampler import permuted_ids
from fastmae.data.table import ENTRY

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
    empty = {"classes": [], "shards": [], "formats": [1], "modes": ["RGB"]}
    sizes = {"version": VERSION, "count": count, "name_bytes": count * NAME_BYTES, "hash": "00"}
    described = {"accepts": Accepts().describe(), "source": str(folder.resolve())}
    (folder / "manifest.json").write_text(json.dumps(empty | sizes | described))


def open_(folder: Path) -> Index:
    """The index of a folder, as every rank but the first opens it."""
    index = trusted_index(folder, folder, Accepts())
    assert index is not None
    return index


def forget(folder: Path) -> None:
    """Have the operating system drop what it holds of the files, so that the disk is read."""
    for name in ("rows.bin", "names.bin"):
        with (folder / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, batch_size: int, steps: int, first: int) -> dict[str, float]:
    """Medians of a batch's lookups in milliseconds, and megabytes by which the process grew."""
    begun = time.perf_counter()
    dataset = Dataset(open_(folder), folder, name="index")
    opened = time.perf_counter() - begun
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
        "open_ms": 1e3 * opened,
        "sizes_ms": 1e3 * statistics.median(sizes),
        "names_ms": 1e3 * statistics.median(names),
        "grown_mb": (resident[-1] - resident[0]) / 1e6,
    }


def write_files(folder: Path, count: int) -> None:
    """Small JPEG files, a thousand to a folder."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(file, "JPEG")
    for number in range(count):
        path = folder / f"{number // 1000:06}" / f"{number:012}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file.getvalue())


def measure_build(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """CPU and wall microseconds per file of an index that is new, unchanged, and has one file in a hundred changed."""
    shutil.rmtree(folder / BESIDE, ignore_errors=True)
    before, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
    for what in ("new", "unchanged", "changed"):
        if what == "changed":
            for number in range(0, count, 100):
                os.utime(folder / f"{number // 1000:06}" / f"{number:012}.jpg")
        begun, cpu = time.perf_counter(), time.process_time()
        dataset = open_dataset(folder)
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        assert len(dataset) == count
        found[what] = {"cpu_us_per_file": 1e6 * cpu / count, "wall_us_per_file": 1e6 * wall / count}
        found[what]["peak_grown_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    assert dataset.index.folder is not None
    kept = sum((dataset.index.folder / name).stat().st_size for name in ("rows.bin", "names.bin", "times.bin"))
    return found | {"kept": {"bytes_per_file": kept / count}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--files", type=int)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    result = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    if arguments.files:
        if not any(arguments.folder.glob("0*")):
            write_files(arguments.folder, arguments.files)
        result |= {"files": arguments.files, **measure_build(arguments.folder, arguments.files)}
    else:
        rows = arguments.folder / "rows.bin"
        if not rows.exists() or rows.stat().st_size != arguments.images * ENTRY.itemsize:
            write(arguments.folder, arguments.images)
        forget(arguments.folder)
        result |= {
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
