"""The loader benchmark: right tables from given numbers, and loaders that really make the same crops."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_report import raw
from training import write_images

from fastmae.data import create_loader, open_dataset
from fastmae.data.shard import ShardOptions, write_shards

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import loaders  # noqa: E402
import report_data  # noqa: E402
import report_pages  # noqa: E402
import report_results  # noqa: E402
import stages  # noqa: E402
import turns  # noqa: E402

GROUP = "loader, 224 x 224 crops of 9 images, 2 cores"
SECONDS = {"pillow-uint8": 2.0, "pillow-float": 3.0, "fastmae-torch": 1.0}


def entry(group: str, competitor: str, median: float, **extra) -> dict:
    times = dict.fromkeys(("median", "iqr", "q1", "q3", "min"), median)
    extra = {"competitor": competitor} | extra
    return {"group": group, "name": "x", "extra_info": extra, "stats": times | {"rounds": 3}}


def results() -> list[dict]:
    """Pillow on a folder, WebDataset and ours on shards; ratios within rounds that are not those of the medians."""
    found = []
    for name, seconds in SECONDS.items():
        ratios = {"fastmae-torch, folder": 2.5} if name == "pillow-uint8" else {}
        facts = {"cpu_seconds_per_image": seconds / 100, "images_per_cpu_second": 100 / seconds, "cpu_ratios": ratios}
        found.append(
            entry(
                GROUP,
                f"{name}, folder",
                seconds,
                images_per_s=100 / seconds,
                ratios=dict.fromkeys(ratios, 2.25),
                **facts,
            )
        )
    slow = {"cpu_seconds_per_image": 0.05, "images_per_cpu_second": 20.0}
    found.append(entry(GROUP, "fastmae-torch, tar shards", 4.0, images_per_s=25.0, **slow))
    fast = {"cpu_seconds_per_image": 0.06, "images_per_cpu_second": 17.0}
    found.append(entry(GROUP, "webdataset, tar shards", 3.0, images_per_s=33.0, **fast))
    by_stage = {"pillow-uint8": {"decode": 1500.0, "resize": 400.0}}
    by_stage["fastmae-torch"] = {"read": 10.0, "decode": 900.0, "resize": 100.0}
    return found + [entry("loader stages, one thread", who, 1.0, stages_us=us) for who, us in by_stage.items()]


@pytest.fixture
def machine() -> report_results.Machine:
    return report_results.Machine("a-card", {"data": report_results.slim(raw(results()))})


def test_loader_table_holds_everything_against_the_baselines(machine):
    (entries,) = machine.of("loader").values()
    table = report_data.loader_table(entries).splitlines()
    assert table[0].startswith(
        "| loader | reads | images/s | `pillow-uint8` | `pillow-float` | images per CPU-second |"
    )
    rows = {line.split("|")[1].strip() + "," + line.split("|")[2]: line for line in table[2:]}
    assert "| 100 | 2.25x | 3.00x | 100 | 2.50x | 3.00x |" in rows["`fastmae-torch`, folder "]
    assert "| 25 | **0.50x (slower)** | **0.75x (slower)** | 20 |" in rows["`fastmae-torch`, tar shards "]
    assert "| 50 | 1.00x | 1.50x | 50 | 1.00x | 1.50x |" in rows["`pillow-uint8`, folder "]


def test_stage_table_has_sums_and_the_whole_loader(machine):
    (found,), (entries,) = machine.of("loader stages").values(), machine.of("loader").values()
    table = report_data.stage_table(machine.of("loader stages")["loader stages, one thread"], entries).splitlines()
    assert found
    assert table[0] == "| µs an image | read | decode | resize | stages together | whole loader, CPU |"
    assert table[2] == "| `pillow-uint8` | - | 1,500 | 400 | 1,900 | 20,000 |"
    assert table[3] == "| `fastmae-torch` | 10 | 900 | 100 | 1,010 | 10,000 |"


def test_a_faster_rival_on_the_same_source_is_a_loss_and_one_on_another_source_is_not(machine):
    found = [loss[1:] for loss in report_data.losses(machine)]
    assert found == [("fastmae-torch, tar shards", "webdataset, tar shards", 0.75)]


def test_the_block_of_the_data_page_is_written_between_its_markers(machine, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"{report_results.BEGIN}\n{report_results.END}\n")
    page = tmp_path / report_data.DATA_PAGE
    page.write_text(f"before\n{report_data.BEGIN}\nstale text\n{report_data.END}\nafter\n")
    texts = report_pages.pages([machine], tmp_path)
    text = texts[report_data.DATA_PAGE]
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale text" not in text
    assert "| `fastmae-torch` | folder | 100 | 2.25x |" in text
    assert "| `fastmae-torch, tar shards` | `webdataset, tar shards` | 0.75x |" in text
    assert "### Loaders" in texts[report_results.PAGE]
    for one in (text, texts[report_results.PAGE]):
        assert "Measured on A Card with python 3.12.1, torch 2.99.0; 2026-01-02, commit abcdef012345-dirty." in one
    page.unlink()
    assert report_data.DATA_PAGE not in report_pages.pages([machine], tmp_path)


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


def test_turns_count_the_processor_time_of_every_batch_of_the_turn():
    course = turns.Course(batch_size=2, steps=3, ahead=2)
    taken: Counter[str] = Counter()

    def batches(name: str, seconds: float):
        while True:
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass
            taken[name] += 1
            yield name

    makers = {"quick": batches("quick", 0.005), "slow": batches("slow", 0.02)}
    for _ in range(3):
        for name, maker in makers.items():
            course.run(course.prepare(name, maker))
    assert course.images == 6
    quick, slow = (course.facts(name, rounds=2) for name in makers)
    assert taken == {"quick": 15, "slow": 15}
    # At least what the batches burnt; the turns before the last two are not asked for.
    assert 0.0025 <= quick["cpu_seconds_per_image"] < 0.01 <= slow["cpu_seconds_per_image"]
    assert slow["cpu_ratios"]["quick"] > 1.5 > 0.67 > quick["cpu_ratios"]["slow"]
    json.dumps(quick)


def test_children_are_found_and_their_processor_time_is_read():
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=_burn)
    process.start()
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and turns.processor_seconds() - time.process_time() < 0.2:
            time.sleep(0.05)
        assert turns.processor_seconds() - time.process_time() >= 0.2
    finally:
        process.kill()
        process.join()


def _burn() -> None:
    while True:
        pass


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
