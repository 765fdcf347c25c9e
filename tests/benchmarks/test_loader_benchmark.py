"""The loader benchmark: all loaders make the same crops, and CPU time is charged to the right one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from training import write_images

from fastmae.data import create_loader, open_dataset
from fastmae.data.shard import ShardOptions, write_shards

ROOT = Path(__file__).parents[2]

import loaders  # noqa: E402
import stages  # noqa: E402
import turns  # noqa: E402


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def ours(dataset, batch_size: int, size: tuple[int, int]):
    options = {"loader": "torch", "batch_size": batch_size, "img_size": size, "seed": 3, "num_threads": 1}
    with create_loader(dataset, **options) as loader:
        return [next(loader) for _ in range(3)]


def test_pillow_makes_the_crops_of_our_loader_in_the_same_order(images, tmp_path):
    dataset, size = open_dataset(images, cache_dir=tmp_path), (24, 32)
    plan = loaders.draw_plan(dataset, size, seed=3, epochs=2)
    batches = loaders.pillow_loader(dataset, plan, 5, 1, floats=False)
    for mine in ours(dataset, 5, size):
        theirs, ids = next(batches)
        assert ids.tolist() == mine.sample_ids.tolist()
        assert (theirs.float() - mine.images.float()).abs().mean() < 1


def test_webdataset_makes_the_crops_of_our_loader_for_the_same_samples(images, tmp_path):
    pytest.importorskip("webdataset")
    size = (24, 32)
    options = ShardOptions(images_per_shard=6, shuffle_seed=None)
    write_shards(open_dataset(images, cache_dir=tmp_path / "cache"), tmp_path / "shards", options)
    dataset = open_dataset(tmp_path / "shards", cache_dir=tmp_path / "cache")
    plan = loaders.draw_plan(dataset, size, seed=3, epochs=1)
    with create_loader(dataset, loader="torch", batch_size=len(dataset), img_size=size, seed=3) as loader:
        epoch = next(loader)
    expected = dict(zip(epoch.sample_ids.tolist(), epoch.images.float(), strict=True))
    batches = loaders.webdataset_loader(dataset, tmp_path / "shards", plan, 4, 1)
    seen: Counter[int] = Counter()
    for _ in range(5):
        crops, ids = next(batches)
        for crop, number in zip(crops, ids.tolist(), strict=True):
            assert (crop.float() - expected[number]).abs().mean() < 1
            seen[number] += 1
    assert len(seen) == len(dataset)


@pytest.mark.parametrize("who", stages.STAGED)
def test_stages_are_timed_and_ours_make_the_loaders_crops(images, tmp_path, who):
    if "dali" in who:
        pytest.importorskip("nvidia.dali")
    dataset, size = open_dataset(images, cache_dir=tmp_path), (24, 32)
    plan = loaders.draw_plan(dataset, size, seed=3, epochs=1)
    timed = stages.Stages(who, dataset, plan)
    timed()
    timed()
    found = timed.facts(2)["stages_us"]
    assert {"decode", "crop copy", "resize"} <= set(found)
    assert min(found.values()) > 0
    if who != "pillow-uint8":
        batch = ours(dataset, len(dataset), size)[0]
        difference = torch.from_numpy(timed.out).permute(0, 3, 1, 2).float() - batch.images.float()
        assert difference.abs().mean() < 1


def test_turns_count_the_processor_time_of_every_batch_of_the_turn(monkeypatch):
    clock, taken = [0.0], Counter()
    monkeypatch.setattr(turns, "processor_seconds", lambda: clock[0])
    monkeypatch.setattr(turns, "settle", lambda: None)
    course = turns.Course(batch_size=2, steps=3, ahead=2)

    def batches(name: str, seconds: float):
        while True:
            clock[0] += seconds
            taken[name] += 1
            yield name

    makers = {"quick": batches("quick", 1.0), "slow": batches("slow", 4.0)}
    for _ in range(3):
        for name, maker in makers.items():
            course.run(course.prepare(name, maker))
    assert course.images == 6
    quick, slow = (course.facts(name, rounds=2) for name in makers)
    assert taken == {"quick": 15, "slow": 15}
    assert (quick["cpu_seconds_per_image"], slow["cpu_seconds_per_image"]) == (0.5, 2.0)
    assert (quick["cpu_ratios"], slow["cpu_ratios"]) == ({"slow": 0.25}, {"quick": 4.0})


@pytest.mark.gpu
@pytest.mark.parametrize("hardware", [None, 0.0])
def test_bare_dali_makes_the_crops_of_our_loader_in_the_same_order(images, tmp_path, hardware):
    pytest.importorskip("nvidia.dali")
    dataset, size = open_dataset(images, cache_dir=tmp_path), (24, 32)
    plan = loaders.draw_plan(dataset, size, seed=3, epochs=2)
    batches = loaders.bare_dali(dataset, plan, 4, 2, hardware)
    for mine in ours(dataset, 4, size):
        theirs = next(batches).cpu()
        assert (theirs.float() - mine.images.float()).abs().mean() < 3
