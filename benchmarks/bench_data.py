"""Loaders: ours on torch and on DALI, against facebookresearch/mae's torchvision + Pillow loader, and WebDataset's.

``--images PATH`` is a folder of JPEGs; without it JPEGs of ImageNet's usual size are cut from the embedded photographs.
The images lie in a folder, in tar shards byte for byte, and in tar shards re-encoded at a short side of 256. All
loaders make the same crops (see loaders.py), take turns in one run (see turns.py), and have one thread or worker
process a core. The page cache is warm: what is measured is work, not a disk.

``pillow-uint8``, ``pillow-float``   facebookresearch/mae's loader with ``PILToTensor``, and as it is: ``ToTensor`` and
                                     normalisation, four times the bytes
``webdataset``                       the same transform with uint8 output behind a WebDataset pipeline
``fastmae-torch``, ``fastmae-dali``  ours; on CUDA the latter decodes there
``fastmae-dali-host``                on CUDA: decoding on the CPU all the same
``dali-bare``, ``dali-bare-no-engine``  on CUDA: a DALI pipeline alone, with and without the hardware JPEG engine
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import loaders
import numpy as np
import pytest
import torch
from comparison import Comparison, Prepared, Unavailable
from measure import Meter
from PIL import Image
from stages import STAGED, Stages
from turns import Course

from fastmae.data import Dataset, create_loader, fixed_crops, has_dali, open_dataset
from fastmae.data.shards import ShardOptions, write_shards

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BATCH, SIZE, SHORT_SIDE = 64, (224, 224), 256
# More than any loader has ready: two a worker process, two in our queue and two in DALI's, and one in the making.
CORES = len(os.sched_getaffinity(0))
AHEAD, STEPS = max(6, 3 * CORES), max(12, 2 * CORES)
SOURCES = {"folder": "folder", "tar": "tar shards", "tar256": f"tar shards at {SHORT_SIDE}"}
if CUDA:  # there is more to compare there, and little time
    del SOURCES["tar"]
WHO = ("pillow-uint8", "pillow-float", "webdataset", "fastmae-torch", "fastmae-dali")
ON_CUDA = ("fastmae-dali-host", "dali-bare", "dali-bare-no-engine")
COMPETITORS = [
    f"{who}, {SOURCES[source]}"
    for who in WHO + (ON_CUDA if CUDA else ())
    for source in SOURCES
    if (source == "folder" or not who.startswith(("pillow", "dali-bare")))
    and not (source == "folder" and who == "webdataset")
]


@pytest.fixture(scope="module")
def meter() -> Meter:
    """Loaders are timed by the clock, wherever their batches go."""
    return Meter(torch.device("cpu"))


@pytest.fixture(scope="module")
def sources(request, tmp_path_factory) -> dict[str, Path]:
    """The images in every form, in folders of their own."""
    root = tmp_path_factory.mktemp("loaders")
    given = request.config.getoption("--images")
    folder = Path(given).resolve() if given else _cut_photographs(root / "jpeg")
    paths = {"folder": folder} | {name: root / name for name in SOURCES if name != "folder"}
    for name, short_side in (("tar", None), ("tar256", SHORT_SIDE)):
        if name in SOURCES:
            _make_shards(folder, paths[name], short_side)
    yield paths
    shutil.rmtree(root)


def _cut_photographs(folder: Path) -> Path:
    folder.mkdir()
    for i, crop in enumerate(fixed_crops(open_dataset(None), (375, 500), seed=0, epoch=0, count=256)):
        Image.fromarray(crop.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.jpg", quality=92)
    return folder


def _make_shards(folder: Path, out: Path, short_side: int | None) -> None:
    """Tar shards in the order of the folder, so that every form of the data has the same numbers and crops."""
    dataset = open_dataset(folder, cache_dir=out.parent / "cache")
    if dataset.bad:
        raise pytest.UsageError(f"--images: expected images that are all good, got {dataset.bad[0]} among them")
    per_shard = -(-len(dataset) // (4 * CORES))
    write_shards(dataset, out, ShardOptions(short_side, images_per_shard=per_shard, shuffle_seed=None))


def _dataset(name: str, sources: dict[str, Path]) -> Dataset:
    return open_dataset(sources[name], cache_dir=sources["tar256"].parent / "cache")


def _open(who: str, dataset: Dataset, path: Path, plan: loaders.Plan) -> Iterator | Unavailable:
    """An endless iterator of batches on the device."""
    if who == "webdataset" and find_spec("webdataset") is None:
        return Unavailable("webdataset is not installed: pip install 'fastmae[bench]'")
    if "dali" in who and not has_dali():
        return Unavailable("NVIDIA DALI is not installed")
    if who.startswith("pillow"):
        return loaders.to_device(loaders.pillow_loader(dataset, plan, BATCH, CORES, who == "pillow-float"), DEVICE)
    if who == "webdataset":
        return loaders.to_device(loaders.webdataset_loader(dataset, path, plan, BATCH, CORES), DEVICE)
    if who.startswith("dali-bare"):
        return loaders.bare_dali(dataset, plan, BATCH, CORES, 0.0 if who.endswith("no-engine") else None)
    kind, host = who.removeprefix("fastmae-").removesuffix("-host"), who.endswith("-host")
    options = {"batch_size": BATCH, "img_size": SIZE, "seed": 0, "num_threads": CORES, "cache_bytes": 0}
    device = torch.device("cpu") if host else DEVICE
    return loaders.to_device(create_loader(dataset, loader=kind, device=device, **options), DEVICE)


def build(sources: dict[str, Path]) -> Comparison:
    datasets = {name: _dataset(name, sources) for name in SOURCES}
    plans = {name: loaders.draw_plan(dataset, SIZE, seed=0) for name, dataset in datasets.items()}
    course = Course(BATCH, STEPS, AHEAD, torch.cuda.synchronize if CUDA else lambda: None)
    competitors: dict[str, Prepared | Unavailable] = {}
    for name in COMPETITORS:
        who, label = name.split(", ", 1)
        source = next(key for key, value in SOURCES.items() if value == label)
        made = _open(who, datasets[source], sources[source], plans[source])
        unavailable = isinstance(made, Unavailable)
        competitors[name] = made if unavailable else Prepared(partial(course.prepare, name, made), course.run)
    group = f"loader, {SIZE[0]} x {SIZE[1]} crops of {_describe(datasets['folder'])}, {CORES} cores"
    return Comparison(group, competitors, images=course.images, flush=False, seconds=60.0, facts=course.facts)


def _describe(dataset: Dataset) -> str:
    """How many images of what size, for the name of the group."""
    rows = dataset.rows(np.arange(len(dataset)))
    pixels = (rows["height"].astype(float) * rows["width"]).mean() / 1e6
    return f"{len(dataset):,} images of {pixels:.2f} MP and {rows['size'].mean() / 1e3:.0f} kB"


@pytest.mark.parametrize("competitor", COMPETITORS)
def bench_loader(compete, sources, competitor):
    compete(build, sources)


def build_stages(sources: dict[str, Path]) -> Comparison:
    dataset = _dataset("folder", sources)
    plan = loaders.draw_plan(dataset, SIZE, seed=0, epochs=1)
    missing = Unavailable("NVIDIA DALI is not installed")
    # Pipelines and decoded images are made at the first call only.
    stages = {who: missing if "dali" in who and not has_dali() else Stages(who, dataset, plan) for who in STAGED}
    group = f"loader stages, {SIZE[0]} x {SIZE[1]} crops, one thread"
    return Comparison(
        group, stages, images=stages["pillow-uint8"].count, flush=False, seconds=8.0,
        facts=lambda who, rounds: stages[who].facts(rounds),
    )  # fmt: skip


@pytest.mark.parametrize("competitor", STAGED)
def bench_stages(compete, sources, competitor):
    compete(build_stages, sources)


@pytest.mark.parametrize("size", [64, 224])
def bench_photographs(benchmark, size):
    """The embedded photographs, which the torch loader decodes once and keeps."""
    benchmark.group, benchmark.extra_info["images"] = "embedded photographs", BATCH * STEPS
    options = {"batch_size": BATCH, "img_size": (size, size), "seed": 0, "num_threads": CORES}

    def steps(loader) -> None:
        for _ in range(STEPS):
            next(loader)

    with create_loader(open_dataset(None), **options) as loader:
        benchmark.pedantic(steps, args=(loader,), rounds=5, warmup_rounds=2)
