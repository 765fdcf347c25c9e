"""Loaders: ours on torch and on DALI, against facebookresearch/mae's torchvision + Pillow loader, WebDataset's, and one
on nvImageCodec; images per second, and CPU seconds per image.

``--images PATH`` is a folder of JPEGs; without it JPEGs of ImageNet's usual size are cut from the embedded photographs.
The images lie in a folder, in tar shards byte for byte, and in tar shards re-encoded at a short side of 256. All
loaders make the same crops (see loaders.py), and have one thread or worker process per core. The page cache is warm:
what is measured is work, not a disk.

``pillow-uint8``, ``pillow-float``   facebookresearch/mae's loader with ``PILToTensor``, and as it is: ``ToTensor`` and
                                     normalisation, four times the bytes
``webdataset``                       the same transform with uint8 output behind a WebDataset pipeline
``nvimgcodec``                       nvImageCodec, which decodes the crop alone, and torch in a ``DataLoader``
``fastmae-torch``, ``fastmae-dali``  ours; on CUDA the latter decodes there
``fastmae-dali-host``                on CUDA: decoding on the CPU all the same
``dali-bare``, ``dali-bare-no-engine``  on CUDA: a DALI pipeline alone, with and without the hardware JPEG engine

Loaders take turns: while one is timed, the others wait with full queues. A loader works ahead, so that its first
batches after a pause cost nothing and its last ones leave work behind. Hence a turn begins with batches that are not
timed, more than any loader has ready, and ends when nobody works any more. Wall time is taken over the batches in
between; CPU time (this process, its threads and its worker processes) over the whole turn, which begins and ends with
full queues, and in which therefore exactly as many images were made as were taken.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import loaders
import numpy as np
import pytest
import torch
from benchmark import Benchmark, Setup, Timer, Unavailable, ratios
from op_benchmark import CUDA

from fastmae.data import Dataset, create_loader, has_dali, open_dataset
from fastmae.data.shards import ShardOptions, write_shards

DEVICE = torch.device("cuda" if CUDA else "cpu")
SIZE, SHORT_SIDE = (224, 224), 256
CORES = len(os.sched_getaffinity(0))
# More than any loader has ready: two per worker process, two in our queue and two in DALI's, and one in the making.
AHEAD, STEPS = max(6, 3 * CORES), max(12, 2 * CORES)
FOLDER, TAR, TAR256 = "folder", "tar shards", f"tar shards at {SHORT_SIDE}"
SOURCES = {
    **dict.fromkeys(("pillow-uint8", "pillow-float", "nvimgcodec"), (FOLDER,)),
    "webdataset": (TAR, TAR256),
    **dict.fromkeys(("fastmae-torch", "fastmae-dali"), (FOLDER, TAR, TAR256)),
}
if CUDA:
    SOURCES |= {"fastmae-dali-host": (FOLDER, TAR256), "dali-bare": (FOLDER,), "dali-bare-no-engine": (FOLDER,)}
COMPETITORS = [f"{loader}, {source}" for loader, sources in SOURCES.items() for source in sources]


def cpu_seconds() -> float:
    """CPU time of this process and of its worker processes, to the nanosecond (Linux)."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        total += time.clock_gettime((~worker.pid << 3) | 2)  # the kernel's clock of a process: clock_getcpuclockid
    return total


def wait_until_idle() -> None:
    """Wait, at most 20 seconds, until this process and its workers do nothing."""
    deadline, idle = time.monotonic() + 20.0, 0
    while idle < 2 and time.monotonic() < deadline:
        before = cpu_seconds()
        time.sleep(0.03)
        idle = idle + 1 if cpu_seconds() - before < 0.0015 else 0


class Turns:
    """Loaders of which one runs at a time, and the CPU time of their turns."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.begun: tuple[str, float] | None = None
        self.seconds: dict[str, list[float]] = {}

    def begin(self, name: str, batches: Iterator) -> Iterator:
        """Wait for the turn before to end, then take the batches that are not timed."""
        self.end()
        self.begun = name, cpu_seconds()
        for _ in range(AHEAD):
            next(batches)
        return batches

    def take(self, batches: Iterator) -> None:
        for _ in range(STEPS):
            next(batches)
        if CUDA:
            torch.cuda.synchronize()

    def end(self) -> None:
        wait_until_idle()
        if self.begun is not None:
            name, before = self.begun
            self.seconds.setdefault(name, []).append(cpu_seconds() - before)
            self.begun = None

    def facts(self, name: str, rounds: int) -> dict:
        """CPU time per image, a median, and its ratios to the others' turn by turn."""
        self.end()
        turns = {who: found[-rounds:] for who, found in self.seconds.items() if len(found) >= rounds}
        seconds = statistics.median(turns[name]) / (self.batch * (AHEAD + STEPS))
        return {"cpu_seconds_per_image": seconds, "cpu_ratios": ratios(turns, name)}


@pytest.fixture(scope="module")
def timer() -> Timer:
    """Loaders are timed by the clock, wherever their batches go."""
    return Timer(torch.device("cpu"))


@pytest.fixture(scope="module")
def sources(request, tmp_path_factory) -> Iterator[dict[str, tuple[Dataset, Path]]]:
    """The images in every form."""
    root, given = tmp_path_factory.mktemp("loaders"), request.config.getoption("--images")
    folder = Path(given).resolve() if given else root / "jpeg"
    if not given:
        loaders.write_photographs(folder, 32 if request.config.getoption("--tiny") else 256)
    images = open_dataset(folder, cache_dir=root / "cache")
    if images.bad:
        raise pytest.UsageError(f"--images: expected images that are all good, got {images.bad[0]} among them")
    found = {FOLDER: (images, folder)}
    for source, short_side in ((TAR, None), (TAR256, SHORT_SIDE)):
        # In the order of the folder, so that every form of the data has the same numbers and crops.
        options = ShardOptions(short_side, images_per_shard=-(-len(images) // (4 * CORES)), shuffle_seed=None)
        write_shards(images, root / source, options)
        found[source] = open_dataset(root / source, cache_dir=root / "cache"), root / source
    yield found
    shutil.rmtree(root)


def start(loader: str, dataset: Dataset, path: Path, plan: loaders.Plan, batch: int) -> Iterator | Unavailable:
    """An endless iterator of batches on the device."""
    try:
        import_module({"webdataset": "webdataset", "nvimgcodec": "nvidia.nvimgcodec"}.get(loader, "torch"))
    except ImportError as error:
        return Unavailable(f"{error}: pip install 'fastmae[bench]'")
    if "dali" in loader and not has_dali():
        return Unavailable("NVIDIA DALI is not installed")
    crops = {
        "pillow-uint8": loaders.pillow, "pillow-float": loaders.pillow_float, "nvimgcodec": loaders.nvimgcodec_crop
    }  # fmt: skip
    if loader in crops:
        return loaders.to_device(loaders.data_loader(dataset, plan, batch, CORES, crops[loader]), DEVICE)
    if loader == "webdataset":
        return loaders.to_device(loaders.webdataset_loader(dataset, path, plan, batch, CORES), DEVICE)
    if loader.startswith("dali-bare"):
        return loaders.bare_dali(dataset, plan, batch, CORES, 0.0 if loader.endswith("no-engine") else None)
    kind, device = loader.removeprefix("fastmae-").removesuffix("-host"), "cpu" if loader.endswith("host") else DEVICE
    options = {"batch_size": batch, "img_size": SIZE, "seed": 0, "num_threads": CORES, "cache_bytes": 0}
    return loaders.to_device(create_loader(dataset, loader=kind, device=device, **options), DEVICE)


def build(sources: dict[str, tuple[Dataset, Path]], batch: int) -> Benchmark:
    turns, calls = Turns(batch), {}
    plans = {source: loaders.draw_plan(dataset, SIZE, seed=0) for source, (dataset, _) in sources.items()}
    for name in COMPETITORS:
        loader, source = name.split(", ")
        batches = start(loader, *sources[source], plans[source], batch)
        unavailable = isinstance(batches, Unavailable)
        calls[name] = batches if unavailable else Setup(partial(turns.begin, name, batches), turns.take)
    images = sources[FOLDER][0]
    rows = images.rows(np.arange(len(images)))
    pixels = (rows["height"].astype(float) * rows["width"]).mean() / 1e6
    size = f"{len(images):,} images of {pixels:.2f} MP and {rows['size'].mean() / 1e3:.0f} kB"
    group = f"loader, {SIZE[0]} x {SIZE[1]} crops of {size}, {CORES} cores"
    return Benchmark(group, calls, images=batch * STEPS, flush=False, seconds=60.0, facts=turns.facts)


@pytest.mark.parametrize("competitor", COMPETITORS)
def bench_loader(compete, request, sources, competitor):
    compete(build, sources, 4 if request.config.getoption("--tiny") else 64)
