"""A rank that computes slowly or waits for images is named, though the steps of all ranks take equally long."""

from __future__ import annotations

import io
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
from distributed import run_ranks
from rich.console import Console
from torch import nn
from training import MODEL, TRAIN, write_images

from fastmae import data
from fastmae.model import create_model
from fastmae.train import parallel
from fastmae.train.checkpoint import Ranks
from fastmae.train.config import DataConfig, PretrainConfig
from fastmae.train.loop import Trainer
from fastmae.train.run_folder import RunFolder
from fastmae.train.telemetry.rank_log import RankLog
from fastmae.train.telemetry.stragglers import AGAIN, IN_A_ROW, Stragglers, summarize

HOSTS = ["node0", "node0", "node1", "node1"]
EVEN = [0.01] * 4
NONE = [0.0] * 4
FORWARDS = 3 * 12


def look(found: Stragglers, intervals: int, block_time=EVEN, data_time=NONE) -> list[str]:
    return [line for _ in range(intervals) for line in found.look(block_time, data_time, step_time=1.0)]


def test_a_rank_that_computes_slowly_is_named_after_some_intervals_and_then_rarely():
    found, slow = Stragglers(HOSTS, FORWARDS), [0.01, 0.01, 0.011, 0.014]
    assert not look(found, IN_A_ROW - 1, slow)
    (line,) = look(found, 1, slow)
    assert line.startswith("rank 3 (node1) computes 1.4x as long as the median (a block's forward 14.0 ms against 10.0")
    assert not look(found, AGAIN - 1, slow)
    assert look(found, 1, slow) == [line]


def test_slow_intervals_that_do_not_follow_each_other_are_nobodys_fault():
    found, slow = Stragglers(HOSTS, FORWARDS), [0.01, 0.03, 0.01, 0.01]
    for _ in range(5):
        assert not look(found, IN_A_ROW - 1, slow)
        assert not look(found, 1)
    assert look(found, IN_A_ROW, slow)


def test_a_rank_that_waits_for_images_is_named():
    found = Stragglers(HOSTS, FORWARDS)
    assert not look(found, IN_A_ROW, data_time=[0.3, 0.32, 0.3, 0.3])  # all of them do: no straggler
    (line,) = look(found, IN_A_ROW, data_time=[0.02, 0.0, 0.25, 0.0])
    assert line == "rank 2 (node1) waits 250.0 ms a step for images, the median 0.0 ms; all ranks wait for it"


def test_of_two_ranks_the_slower_one_is_the_straggler():
    found = Stragglers(HOSTS[:2], FORWARDS)
    (line,) = look(found, IN_A_ROW, [0.01, 0.02], [0.0, 0.0])
    assert line.startswith("rank 1 (node0) computes 2.0x")


def test_of_many_stragglers_the_slowest_are_described():
    hosts = [f"node{rank // 8}" for rank in range(64)]
    slow = [0.01] * 56 + [0.02 + 0.001 * number for number in range(8)]
    lines = look(Stragglers(hosts, FORWARDS), IN_A_ROW, slow, [0.0] * 64)
    assert [line.partition(" computes")[0] for line in lines[:3]] == [
        "rank 63 (node7)", "rank 62 (node7)", "rank 61 (node7)"
    ]  # fmt: skip
    assert lines[3:] == ["and so do 5 more ranks: 60, 59, 58, 57, 56"]


@pytest.mark.parametrize("times", [[math.nan] * 4, [0.01, math.nan, math.nan, math.nan], EVEN])
def test_what_is_not_known_is_nobodys_fault(times):
    assert not look(Stragglers(HOSTS, FORWARDS), 2 * IN_A_ROW, times)


@pytest.mark.parametrize(("forwards", "named"), [(12, False), (13, True)])
def test_computing_that_makes_a_step_hardly_longer_is_nobodys_fault(forwards, named):
    assert bool(look(Stragglers(HOSTS, forwards), IN_A_ROW, [0.008, 0.008, 0.008, 0.012])) == named


def test_summary_of_ranks():
    assert summarize("x", [3.0, math.nan, 7.0, 1.0], HOSTS) == {
        "x_min": 1.0, "x_median": 3.0, "x_max": 7.0, "x_max_rank": 2, "x_max_host": "node1"
    }  # fmt: skip
    assert summarize("x", [math.nan] * 4, HOSTS) == {}


def job(rank: int, folder: Path) -> dict[str, tuple[str, list[dict]]]:
    """Runs of two ranks of which the second is slow in one way or another: the terminal, or else the log, and rows."""
    found = {}
    for name, mode in (("block", "ddp"), ("images", "ddp"), ("sharded", "fsdp")):
        place = parallel.initialize(mode, "cpu")
        config = PretrainConfig(
            out=folder / f"run-{name}",
            model=replace(MODEL, img_size=32),
            data=DataConfig(path=folder / "images", loader="torch", num_threads=1),
            train=replace(TRAIN, precision="fp32", log_every_steps=2, steps=11, warmup_steps=1),
        )
        dataset = data.open_dataset(folder / "images", cache_dir=folder / f"cache-{rank}")
        model = parallel.construct(lambda config=config: create_model(**config.model_arguments()), place)
        console = Console(file=io.StringIO(), width=200, quiet=rank > 0)
        with Ranks.create() as ranks, RunFolder(config.out, leader=rank == 0) as run:
            options = {"console": console, "parallelism": place, "ranks": ranks}
            create = SlowLoader if name == "images" and rank else data.create_loader
            trainer = Trainer(config, model, dataset, run, create_loader=create, **options)
            if name != "images" and rank:
                slow_down(model.blocks[len(model.blocks) // 2])
            ranks.first("making the run folder", lambda: None)
            with RankLog(run.path, rank) as log:
                assert trainer.fit() == "finished"
            found[name] = console.file.getvalue() or log.path.read_text(), run.read_metrics()
    return found


def slow_down(block: nn.Module) -> None:
    forward = block.forward

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return forward(*args, **kwargs)

    block.forward = slow


class SlowLoader:
    """A loader that takes its time."""

    def __init__(self, *args, **kwargs) -> None:
        self._loader = data.create_loader(*args, **kwargs)

    def __next__(self) -> data.Batch:
        time.sleep(0.1)
        return next(self._loader)

    def __getattr__(self, name: str):
        return getattr(self._loader, name)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, tuple[str, list[dict], str]]:
    """What the terminal showed, the rows, and the second rank's own log."""
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "images")
    terminal, log = run_ranks(job, 2, folder)
    return {name: (*terminal[name], log[name][0]) for name in terminal}


@pytest.mark.parametrize("name", ["block", "sharded"])
def test_the_rank_whose_block_is_slow_is_named(found, name):
    text, rows, log = found[name]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 11]
    (line,) = [line for line in text.splitlines() if line.startswith("rank ") and "computes" in line]
    assert line.startswith("rank 1 (")
    assert line in log
    for row in rows:
        assert row["block_time_max_rank"] == 1
        assert row["ranks"]["block_time"] == [row["block_time_min"], row["block_time_max"]]
        assert row["block_time_max"] > 0.05


def test_the_rank_whose_images_are_late_is_named(found):
    text, rows, _ = found["images"]
    (line,) = [line for line in text.splitlines() if line.startswith("rank ") and "for images" in line]
    assert line.startswith("rank 1 (")
    assert all(row["data_time_max_rank"] == 1 for row in rows)
    for row in rows:  # though the rank that writes them waits for no images
        assert row["data_time"] == row["data_time_max"] >= 0.1
        assert row["data_share"] == pytest.approx(row["data_time"] / row["step_time"])


def test_rows_of_several_ranks_have_what_those_of_one_have(found):
    for _, rows, _ in found.values():
        assert all(row["host_memory_gib"] > 0.05 and row["mfu"] > 0 for row in rows)
