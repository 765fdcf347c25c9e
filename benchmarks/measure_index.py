"""What an index costs: building it, opening it, a batch's look-ups, memory; and the same look-ups in Arrow and Parquet.

    python benchmarks/measure_index.py --folder /scratch/index --out benchmarks/results/<machine>/index-build.json

``--files`` small JPEGs, a thousand per folder, are written and indexed: new, unchanged, and with one in a hundred
changed. Then tables of ``--rows`` rows are looked up, and with pyarrow installed also as Arrow IPC and Parquet files. A
table that does not fit on the disk is a sparse file in which only the pages that are looked up hold data, as the result
says. The files are left for the next time. What is measured again replaces what ``--out`` had.
"""

from __future__ import annotations

import argparse
import binascii
import io
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from fastmae.data.index import BESIDE, Accepts, publish_index
from fastmae.data.sources import find_source
from fastmae.data.table import ENTRY, NAMES, SMALL, Table, npy_header

NAME_BYTES, CHUNK, ARROW_BATCH, ROW_GROUP = 24, 1 << 20, 1 << 24, 1 << 16
BATCHES = (256, 1024)
COLD, WARM = 10, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, nargs="*", default=[10**6, 10**8, 10**9])
    parser.add_argument("--most-compared", type=int, default=10**8, help="rows of the largest Arrow and Parquet files")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    result = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    result |= {"cores": os.cpu_count(), "load": os.getloadavg()[0], "numpy": np.__version__}
    if arguments.files:
        result["build"] = measure_build(arguments.folder / "files", arguments.files, arguments.workers)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for rows in arguments.rows:
        result[f"{rows:.0e} rows"] = measure_table(arguments.folder / "table", rows, rows <= arguments.most_compared)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# Building


def measure_build(folder: Path, count: int, workers: int | None) -> dict[str, object]:
    """CPU seconds of this process and of its workers."""
    if not folder.exists():
        write_files(folder, count)
    shutil.rmtree(folder.parent / BESIDE / folder.name, ignore_errors=True)
    found: dict[str, object] = {"files": count, "workers": workers or os.cpu_count()}
    held, largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [0]
    threading.Thread(target=watch_workers, args=[largest], daemon=True).start()
    for what in ("new", "unchanged", "changed"):
        if what == "changed":
            for number in range(0, count, 100):
                os.utime(file_path(folder, number))
        begun, before = time.perf_counter(), cpu_seconds()
        index = publish_index(find_source(folder, workers), folder, Accepts(), workers=workers)
        wall, (own, theirs) = time.perf_counter() - begun, (b - a for a, b in zip(before, cpu_seconds(), strict=True))
        assert len(index.table) == count
        found[what] = {
            "wall_us_per_file": 1e6 * wall / count,
            "cpu_us_per_file": {"this process": 1e6 * own / count, "workers": 1e6 * theirs / count},
        }
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
    found["memory_mb"] = {"this process grew by": grown / 1e3, "largest worker": largest[0] / 1e3}
    found["bytes_per_file"] = sum(path.stat().st_size for path in index.folder.iterdir()) / count
    return found


def watch_workers(largest: list[int]) -> None:
    """Keep the most kilobytes that a child process has held. Its own resource usage counts those that it was forked
    with."""
    while True:
        for process in Path("/proc/self/task").glob("*/children"):
            for child in process.read_text().split():
                with suppress(OSError, StopIteration):
                    status = Path(f"/proc/{child}/status").read_text().splitlines()
                    largest[0] = max(largest[0], int(next(line for line in status if "VmHWM" in line).split()[1]))
        time.sleep(0.2)


def cpu_seconds() -> list[float]:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return [use.ru_utime + use.ru_stime for use in used]


def file_path(folder: Path, number: int) -> Path:
    return folder / f"{number // 1000:06}" / f"{number:012}.jpg"


def write_files(folder: Path, count: int) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(file, "JPEG")
    for number in range(count):
        if number % 1000 == 0:
            file_path(folder, number).parent.mkdir(parents=True)
        file_path(folder, number).write_bytes(file.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Looking up


def some_rows(numbers: np.ndarray) -> np.ndarray:
    """Rows of ImageNet's usual sizes, a function of their numbers."""
    random = numbers * 2654435761 % 2**32
    rows = np.zeros(len(numbers), ENTRY)
    rows["name"], rows["name_size"] = numbers * NAME_BYTES, NAME_BYTES
    rows["size"], rows["height"], rows["width"] = 20_000 + random % 180_000, 300 + random % 301, 400 + random % 199
    rows["label"], rows["channels"], rows["format"], rows["orientation"] = numbers // 1300 % 1000, 3, 1, 1
    return rows


def some_names(numbers: np.ndarray) -> np.ndarray:
    digits = np.frombuffer(binascii.hexlify(numbers.astype(">u8")), "S16")
    return np.char.add(np.char.add(b"n/00", digits), b".jpg")


def batches(count: int, size: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed + size)
    return [random.integers(0, count, size) for _ in range(WARM if seed else COLD)]


def measure_table(folder: Path, count: int, compared: bool) -> dict[str, object]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    needed = count * (ENTRY.itemsize + NAME_BYTES)
    sparse = needed > shutil.disk_usage(folder).free / 2
    (write_sparse if sparse else write_table)(folder, count)
    formats: dict[str, tuple[Callable, list[Path]]] = {
        "table": (open_table, [folder / "rows.npy", folder / "names.npy"])
    }
    if compared and find_spec("pyarrow"):
        write_arrow(folder, count)
        formats["Arrow IPC, mapped"] = open_arrow, [folder / "rows.arrow"]
        formats["Parquet"] = open_parquet, [folder / "rows.parquet"]
    found: dict[str, object] = {"sparse": sparse}
    for name, (open_, files) in formats.items():
        found[name] = measure_lookups(open_, files, count, sparse)
    found["table"] |= measure_memory(files=formats["table"][1], count=count)
    shutil.rmtree(folder)
    return found


def write_table(folder: Path, count: int) -> None:
    with (folder / "rows.npy").open("wb") as rows, (folder / "names.npy").open("wb") as names:
        rows.write(npy_header(ENTRY, count))
        names.write(npy_header(NAMES, count * NAME_BYTES))
        for start in range(0, count, CHUNK):
            numbers = np.arange(start, min(start + CHUNK, count))
            rows.write(some_rows(numbers))
            names.write(some_names(numbers))


def write_sparse(folder: Path, count: int) -> None:
    """Only the rows that are looked up, and their names."""
    numbers = np.unique(
        np.concatenate([ids for size in BATCHES for seed in (0, 1) for ids in batches(count, size, seed)])
    )
    for name, dtype, size, values in (
        ("rows.npy", ENTRY, ENTRY.itemsize, some_rows(numbers)),
        ("names.npy", NAMES, NAME_BYTES, some_names(numbers)),
    ):
        with (folder / name).open("wb") as file:
            header = npy_header(dtype, count * size // dtype.itemsize)
            file.write(header)
            file.truncate(len(header) + count * size)
            for number, value in zip(numbers.tolist(), values, strict=True):
                os.pwrite(file.fileno(), value.tobytes(), len(header) + number * size)


def open_table(files: list[Path]) -> Callable[[np.ndarray], object]:
    for file in files:
        if file.stat().st_size <= SMALL:  # compared with its checksums
            read_all(file)
    table = Table(*(file.open("rb") for file in files))

    def look_up(ids: np.ndarray) -> object:
        rows = table.rows(ids)
        return rows, table.names(rows)

    return look_up


def write_arrow(folder: Path, count: int) -> None:
    """The same columns. Arrow: record batches as large as its strings allow. Parquet: row groups of 65,536 rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def columns(start: int) -> pa.RecordBatch:
        numbers = np.arange(start, min(start + ARROW_BATCH, count))
        rows = some_rows(numbers)
        ends = np.arange(len(numbers) + 1, dtype=np.int32) * NAME_BYTES
        names = pa.StringArray.from_buffers(len(numbers), pa.py_buffer(ends), pa.py_buffer(some_names(numbers)))
        fields = [field for field in ENTRY.names if not field.startswith("name")]
        arrays = [pa.array(np.ascontiguousarray(rows[field])) for field in fields]
        return pa.RecordBatch.from_arrays([names, *arrays], ["name", *fields])

    batch = columns(0)
    with (
        pa.OSFile(str(folder / "rows.arrow"), "wb") as file,
        pa.ipc.new_file(file, batch.schema) as arrow,
        pq.ParquetWriter(folder / "rows.parquet", batch.schema) as parquet,
    ):
        for start in range(0, count, ARROW_BATCH):
            batch = columns(start) if start else batch
            arrow.write_batch(batch)
            parquet.write_batch(batch, row_group_size=ROW_GROUP)


def open_arrow(files: list[Path]) -> Callable[[np.ndarray], object]:
    import pyarrow as pa

    found = pa.ipc.open_file(pa.memory_map(str(files[0]))).read_all().to_batches()
    # table.take would concatenate the batches first.
    return lambda ids: take(lambda number, places: found[number].take(places), ids, ARROW_BATCH)


def open_parquet(files: list[Path]) -> Callable[[np.ndarray], object]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(files[0], memory_map=True)
    return lambda ids: take(
        lambda number, places: file.read_row_group(number, use_threads=False).take(places), ids, ROW_GROUP
    )


def take(part: Callable[[int, object], object], ids: np.ndarray, size: int) -> list[object]:
    """Rows of several parts of a file, part by part."""
    import pyarrow as pa

    numbers = ids // size
    return [part(number, pa.array(ids[numbers == number] % size)) for number in np.unique(numbers).tolist()]


def read_all(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def forget(files: list[Path]) -> None:
    """Drop what the page cache holds of the files."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_lookups(open_: Callable, files: list[Path], count: int, sparse: bool) -> dict[str, object]:
    """A batch's rows and names, in milliseconds: the first ones together from a cold disk, by the clock; and later ones
    by CPU time each, when the files are in the page cache and most of their pages have been touched."""
    found: dict[str, object] = {"bytes_per_row": sum(path.stat().st_size for path in files) / count}
    for size in BATCHES:
        cold, warm = batches(count, size, 0), batches(count, size, 1)
        look_up, timed = None, {}  # what is mapped cannot be dropped
        forget(files)
        begun = time.perf_counter()
        look_up = open_(files)
        found["open_ms"] = 1e3 * (time.perf_counter() - begun)
        if files[0].stat().st_size > SMALL:
            begun = time.perf_counter()
            for ids in cold:
                look_up(ids)
            timed[f"first_{COLD}_from_disk_ms"] = 1e3 * (time.perf_counter() - begun)
        for path in () if sparse else files:
            read_all(path)
        repeat(look_up, warm if sparse else 10 * batches(count, 4 * BATCHES[-1], 2), time.process_time)
        found[f"{size} rows"] = timed | {"from_memory_cpu_ms": repeat(look_up, warm, time.process_time)}
    return found


def repeat(look_up: Callable[[np.ndarray], object], many: list[np.ndarray], clock: Callable[[], float]) -> float:
    """The median of up to ten seconds."""
    times, end = [], time.monotonic() + 10
    for ids in many:
        begun = clock()
        look_up(ids)
        times.append(clock() - begun)
        if time.monotonic() > end and len(times) > 2:
            break
    return 1e3 * statistics.median(times)


def measure_memory(files: list[Path], count: int) -> dict[str, object]:
    """What a mapping does to two processes that look up the same batches: megabytes grown."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.SimpleQueue()

    def rank() -> None:
        before, look_up = memory(), open_table(files)
        for ids in batches(count, BATCHES[1], 1):
            look_up(ids)
        barrier.wait()
        results.put({name: value - before[name] for name, value in memory().items()})
        barrier.wait()

    processes = [context.Process(target=rank) for _ in range(2)]
    for process in processes:
        process.start()
    grown = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {"grown_mb": grown[0]}


def memory() -> dict[str, float]:
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines}
    return {name: kilobytes[name] / 1e3 for name in ("Rss", "Pss", "Anonymous")}


if __name__ == "__main__":
    main()
