"""Rows of metrics: values that survive a save, times by the host's clock, MFU, and ranks that hold up the others."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from rich.console import Console
from training import MODEL, TRAIN, make_trainer, write_images

from fastmae import data
from fastmae.model import create_model
from fastmae.train import flops, metrics, parallel, profile
from fastmae.train.checkpoint import LostRankError, Ranks
from fastmae.train.config import PretrainConfig
from fastmae.train.flops import count_flops, matmul_flops, peak_flops
from fastmae.train.metrics import AGAIN, IN_A_ROW, SHOWN_RANKS, Reporter, StepValues, combine_ranks
from fastmae.train.parallel import Parallelism
from fastmae.train.profile import StageTimes
from fastmae.train.run_folder import RunFolder

CPU = torch.device("cpu")
NAN = math.nan


class Clock:
    """Stands in for the host's clock."""

    def __init__(self) -> None:
        self.now, self.perf_counter = 100.0, time.perf_counter

    def monotonic(self) -> float:
        return self.now

    def advance(self, seconds: Iterator[float], *_: object) -> None:
        self.now += next(seconds)

    def spend(self, stage: AbstractContextManager[None], seconds: float) -> None:
        with stage:
            self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr(profile, "time", clock)
    return clock


def test_values_of_an_interval_survive_a_save_also_with_another_interval():
    values = StepValues(4, Parallelism())
    for step in range(3):
        values.add(*map(torch.tensor, (float(step), -1.0, 0.0)))
    state = values.state_dict()
    for interval, expected in ((4, [0.0, 1.0, 2.0, 3.0]), (2, [2.0, 3.0]), (8, [0.0, 1.0, 2.0, 3.0])):
        continued = StepValues(interval, Parallelism())
        continued.load_state_dict(state)
        continued.begin(step=7)
        continued.add(*map(torch.tensor, (3.0, -1.0, 0.0)))
        count = len(expected)
        assert continued.take()() == {"loss": expected, "grad_norm": [-1.0] * count, "skipped": [0.0] * count}


@pytest.mark.gpu
def test_a_gpu_is_timed_by_events_that_nobody_waits_for():
    """Waiting for images costs nothing while the GPU has work."""
    stages = StageTimes(torch.device("cuda"), {"data", "forward"})
    torch.cuda._sleep(10**9)
    for name in ("data", "forward", "backward"):
        with stages(name):
            time.sleep(0.01)
            torch.cuda._sleep(10**8 * (name == "forward"))
    assert not any(stages.take().values())
    torch.cuda.synchronize()
    found = stages.take()
    assert found.keys() == {"data", "forward"}
    assert found["data"][0] < 0.005 < found["forward"][0]
    with stages("data"):
        time.sleep(0.01)
    torch.cuda.synchronize()
    assert stages.take()["data"][0] >= 0.01


def create_reporter(run: RunFolder) -> Reporter:
    """Of a row every two steps, each of 1e12 FLOPs."""
    config = PretrainConfig(train=replace(TRAIN, log_every_steps=2))
    console = Console(file=io.StringIO(), width=200)
    return Reporter(config, run, console, Parallelism(), Ranks(), lambda: 10**12)


def report(folder: Path, clock: Clock, shares: list[float], **values: list[float]) -> tuple[str, list[dict]]:
    """What the terminal shows of intervals of 10 s and such shares of waiting; and the rows."""
    with RunFolder(folder) as run:
        reporter = create_reporter(run)
        reporter.open(0, 2 * len(shares))
        reporter.start(0)
        for number, share in enumerate(shares):
            for step in range(2):
                clock.spend(reporter.stages("data"), 5 * share)
                clock.spend(reporter.stages("backward"), 5 * (1 - share))
                of_step = {"loss": 1.0, "grad_norm": 2.0, "skipped": 0.0}
                of_step |= {name: steps[2 * number + step] for name, steps in values.items()}
                reporter.add(*map(torch.tensor, of_step.values()))
            reporter.log({"step": 2 * number + 2, "epoch": 1.0, "lr": 0.1}, images=8)
        reporter.close()
        return reporter._console.file.getvalue(), run.read_metrics()


def test_a_slow_loader_is_reported_once_and_not_while_it_starts(tmp_path, clock):
    text, rows = report(tmp_path / "slow", clock, [0.9, 0.1, 0.5, 0.6])
    assert text.count("waiting for images") == 1
    assert "waiting for images: 50% of the time; `fastmae bench`" in text
    assert [row["data_time"] for row in rows] == pytest.approx([4.5, 0.5, 2.5, 3.0])
    assert [row["data_share"] for row in rows] == pytest.approx([0.9, 0.1, 0.5, 0.6])
    assert "data 90%" in text
    text, _ = report(tmp_path / "fast", clock, [0.9, 0.2, 0.0])
    assert "waiting for images" not in text


def test_a_row_has_means_and_maxima_of_what_is_finite(tmp_path, clock):
    losses, skipped = [1.0, 3.0, NAN, 2.0, math.inf, NAN], [0.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    _, rows = report(tmp_path / "run", clock, [0.0] * 3, loss=losses, skipped=skipped)
    assert [(row["loss"], row["loss_max"]) for row in rows] == [(2.0, 3.0), (2.0, 2.0), (None, None)]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2]
    assert all(row["grad_norm"] == row["grad_norm_max"] == 2.0 for row in rows)


@pytest.mark.parametrize(("peak", "mfu"), [(8e11, 0.25), (1e11, 1.0), (None, None)])
def test_mfu_is_the_flops_over_the_time_and_the_peak(tmp_path, clock, monkeypatch, peak, mfu):
    monkeypatch.setattr(metrics, "peak_flops", lambda device, dtype: peak)
    _, (row,) = report(tmp_path / "run", clock, [0.5])
    assert (row["tflops_per_second"], row["images_per_second"]) == pytest.approx((0.2, 1.6))
    assert row.get("mfu") == mfu


def test_a_peak_is_measured_once_without_the_runs_random_numbers(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(flops.time, "perf_counter", lambda: float(next(ticks)))
    peak_flops.cache_clear()
    state = torch.get_rng_state()
    assert peak_flops(CPU, torch.float32) == peak_flops(CPU, torch.float32) == 2 * 384**3  # a second per product
    assert next(ticks) == 2 * 5
    assert torch.equal(torch.get_rng_state(), state)
    peak_flops.cache_clear()
    monkeypatch.setattr(torch, "mm", lambda *args, **options: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    assert peak_flops(CPU, torch.float32) is None
    peak_flops.cache_clear()


@pytest.mark.gpu
def test_rows_of_a_gpu_have_its_memory_and_a_share_of_its_peak(tmp_path):
    device, before = torch.device("cuda"), torch.cuda.memory_allocated()
    assert peak_flops(device, torch.bfloat16) == pytest.approx(matmul_flops(device, torch.bfloat16), rel=0.2)
    assert torch.cuda.memory_allocated() == before
    trainer = make_trainer(tmp_path / "run", write_images(tmp_path / "images"), device="cuda", steps=20)
    with trainer.run as run:
        trainer.fit()
    for row in run.read_metrics():
        assert 0 < row["peak_memory_gib"] < 0.5  # without the matrices of the measurement
        assert 0 < row["mfu"] < 1


def ranks(data_time: list[float], forward_time: float | list[float] = 0.05) -> list[list[float]]:
    """What ranks tell of steps of a second on a CPU."""
    forward = forward_time if isinstance(forward_time, list) else [forward_time] * len(data_time)
    return [[*times, NAN, 1.0 + rank] for rank, times in enumerate(zip(data_time, forward, strict=True))]


HOSTS = ["node0", "node0", "node1", "node1"]


@pytest.mark.parametrize(
    ("data_time", "forward_time", "words"),
    [
        ([0.02, 0.0, 0.25, 0.0], 0.05, "rank 2 (node1) .* 250.0 ms waiting for images (median 0.0)"),
        ([0.02, 0.0, 0.25, 0.0], NAN, "rank 2 (node1) .* 250.0 ms waiting for images (median 0.0)"),
        ([0.0] * 4, [0.05, 0.05, 0.055, 0.085], "rank 3 (node1) .* 85.0 ms in forward passes (median 50.0)"),
        ([0.0, 0.2], 0.05, "rank 1 (node0) .* 200.0 ms waiting for images (median 0.0)"),  # of two the slower one
        ([0.3, 0.32, 0.3, 0.3], 0.05, None),  # all of them wait
        ([0.0] * 4, [0.05, 0.05, 0.055, 0.082], None),  # a step is less than 10 % longer
        ([0.0] * 4, [0.05, NAN, 0.05, 0.09], None),
    ],
)
def test_a_rank_whose_own_work_takes_longer_is_named(data_time, forward_time, words):
    row, line = combine_ranks(ranks(data_time, forward_time), 1.0, HOSTS[: len(data_time)])
    assert bool(line) == bool(words)
    for part in (words or "").split(" .* "):
        assert part in line
    if words:
        assert words.startswith(f"rank {row['slowest_rank']} ({row['slowest_host']})")
    assert (row["data_time"], row["data_share"]) == (max(data_time), max(data_time))
    assert row["host_memory_gib"] == len(data_time)
    assert row["ranks"]["data_time"] == data_time
    assert "NaN" not in json.dumps(row)


@pytest.mark.parametrize("size", [1, SHOWN_RANKS, SHOWN_RANKS + 1])
def test_rows_of_many_ranks_do_not_have_the_times_of_each(size):
    row, _ = combine_ranks(ranks([0.1] * size), 1.0, ["node"] * size)
    assert ("ranks" in row) == (size == SHOWN_RANKS)
    assert ("slowest_rank" in row) == (size > 1)


def test_a_straggler_is_named_after_some_rows_in_a_row_and_then_rarely(tmp_path):
    with RunFolder(tmp_path / "run") as run:
        reporter = create_reporter(run)

    def named(rows: int, line: str = "rank 3 is slow") -> int:
        before = reporter._console.file.getvalue().count("rank 3")
        for _ in range(rows):
            reporter._print_if_slow({"data_share": 0.0}, line)
        return reporter._console.file.getvalue().count("rank 3") - before

    for _ in range(3):
        assert named(IN_A_ROW - 1) == 0
        assert named(1, "") == 0
    assert named(IN_A_ROW) == 1
    assert named(AGAIN - 1) == 0
    assert named(1) == 1


class Loader:
    """The loader of a run, which takes some seconds per batch on a clock."""

    def __init__(self, clock: Clock, seconds: float, *args, **options) -> None:
        self._clock, self._seconds, self._loader = clock, seconds, data.create_loader(*args, **options)

    def __next__(self) -> data.Batch:
        self._clock.now += self._seconds
        return next(self._loader)

    def __getattr__(self, name: str):
        return getattr(self._loader, name)


def job(rank: int, folder: Path) -> tuple[dict[str, tuple[str, list[dict]]], str]:
    """Runs of two ranks of which the second is slow: what the terminal shows, and the rows; then the first one is left
    alone: its error.

    Only the loader and a block move the ranks' clocks, so that nothing depends on how busy the machine is.
    """
    found, clock = {}, Clock()
    metrics.time = profile.time = clock
    for mode in ("ddp", "fsdp"):
        place = parallel.initialize(mode, "cpu")
        console = Console(file=io.StringIO(), width=200, quiet=rank > 0)
        create = partial(Loader, clock, 0.2 if mode == "fsdp" and rank else 0.05)
        options = {"model": replace(MODEL, img_size=32), "create_loader": create, "place": place, "console": console}
        options |= {"precision": "fp32", "batch_size": 2, "log_every_steps": 2, "steps": 9, "warmup_steps": 1}
        with Ranks.create() as ranks:
            trainer = make_trainer(folder / mode, folder / "images", ranks=ranks, **options)
            seconds = cycle([0.3, 0.3, 0.3, 9.0] if mode == "ddp" and rank else [0.1])  # something interrupts a pass
            trainer.model.blocks[0].register_forward_hook(partial(clock.advance, seconds))
            with trainer.run as run:
                assert trainer.fit() == "finished"
                found[mode] = console.file.getvalue(), run.read_metrics()
    with Ranks.create(timeout=20) as ranks:
        assert ranks.collect("collecting times", [rank, 0.5])() == [[0.0, 0.5], [1.0, 0.5]]
        if rank == 1:
            return found, ""
        with pytest.raises(LostRankError) as error:
            ranks.collect("collecting times", [0.0])()
        return found, str(error.value)


def test_the_slow_rank_of_a_run_is_named_though_the_steps_of_all_take_equally_long(tmp_path):
    """Each rank makes two passes per step."""
    write_images(tmp_path / "images")
    (found, error), _ = run_ranks(job, 2, tmp_path, timeout=120)
    architecture = create_model(**PretrainConfig(model=replace(MODEL, img_size=32)).model_arguments()).architecture
    tflops = count_flops(architecture, 8, 0.75) / 1e12  # of a step, on both ranks together
    for mode, times, what in (
        ("ddp", {"data_time": [0.1, 0.1], "forward_time": [0.2, 0.6]}, "600.0 ms in forward passes (median 200.0)"),
        ("fsdp", {"data_time": [0.1, 0.4]}, "400.0 ms waiting for images (median 100.0)"),  # forwards wait for others
    ):
        text, rows = found[mode]
        (line,) = [line for line in text.splitlines() if line.startswith("rank ")]
        assert line.startswith("rank 1 (")
        assert what in line
        assert [row["step"] for row in rows] == [2, 4, 6, 8, 9]
        for row in rows:
            assert row["slowest_rank"] == 1
            assert {name: pytest.approx(values) for name, values in row["ranks"].items()} == times
            assert row["step_time"] == pytest.approx(0.3)  # by the clock of rank 0, which writes the row
            assert row["data_share"] == pytest.approx(min(max(times["data_time"]) / 0.3, 1.0))
            assert row["tflops_per_second"] == pytest.approx(tflops / 0.3, rel=0.01)
            assert row["host_memory_gib"] > 0.05
            assert row["mfu"] > 0
    assert error.startswith("collecting times: a rank has ended or does not answer (")
