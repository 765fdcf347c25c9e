"""Waiting for images is measured by the host's clock alone and said once where it is much; bad files are listed."""

from __future__ import annotations

import io
import json
from time import sleep

import pytest
import torch
from rich.console import Console
from training import make_trainer, write_images

from fastmae.data import DataError, LateBad
from fastmae.train.bad_files import BadFiles
from fastmae.train.guard import SamplePositions
from fastmae.train.run_folder import RunFolder
from fastmae.train.telemetry import clock as clock_module
from fastmae.train.telemetry.clock import Clock
from fastmae.train.telemetry.reporter import Reporter

CPU = torch.device("cpu")


class Time:
    """A clock that goes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(clock_module.time, "monotonic", lambda: self.now)


class Event:
    """A GPU's event that has been reached or not."""

    def __init__(self, reached):
        self.reached, self.recorded = reached, 0

    def record(self):
        self.recorded += 1

    def query(self):
        assert self.recorded
        return self.reached


def wait(clock: Clock, time: Time, seconds: float) -> None:
    with clock.waiting():
        time.now += seconds


def test_waiting_is_a_share_of_the_interval(monkeypatch):
    time = Time(monkeypatch)
    clock = Clock(CPU)
    wait(clock, time, 3.0)
    time.now += 4.0
    wait(clock, time, 1.0)
    assert clock.read(steps=2, images=16) == {
        "images_per_second": 2.0, "step_time": 4.0, "data_time": 2.0, "data_share": 0.5
    }  # fmt: skip
    clock.restart()
    time.now += 1.0
    assert clock.read(steps=1, images=16) == {
        "images_per_second": 16.0, "step_time": 1.0, "data_time": 0.0, "data_share": 0.0
    }  # fmt: skip


@pytest.mark.parametrize(("reached", "expected"), [(True, 3.0), (False, 0.0)])
def test_waiting_while_the_gpu_has_work_is_none(monkeypatch, reached, expected):
    time = Time(monkeypatch)
    clock = Clock(CPU)
    clock._event = Event(reached)
    wait(clock, time, 3.0)
    assert clock.read(steps=1, images=1)["data_time"] == expected
    assert clock._event.recorded == 1


@pytest.mark.gpu
def test_a_gpu_with_work_does_not_wait():
    clock = Clock(torch.device("cuda"))
    torch.cuda._sleep(10**9)
    with clock.waiting():
        sleep(0.01)
    assert clock.read(steps=1, images=1)["data_time"] == 0
    torch.cuda.synchronize()
    with clock.waiting():
        sleep(0.01)
    assert clock.read(steps=1, images=1)["data_time"] >= 0.01


def report(tmp_path, monkeypatch, shares: list[float]) -> tuple[str, list[dict]]:
    """What the terminal shows of intervals of 10 s with such shares of waiting, and the rows."""
    time, console = Time(monkeypatch), Console(file=io.StringIO(), width=200)
    with RunFolder(tmp_path / "run") as run:
        reporter = Reporter(run, console, CPU, interval=2, advice="ask fastmae bench")
        reporter.open(0, 2 * len(shares), deadline=float("inf"))
        reporter.start(0)
        for number, share in enumerate(shares):
            for _ in range(2):
                wait(reporter.clock, time, 5 * share)
                time.now += 5 * (1 - share)
                reporter.add(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(0.0))
            reporter.log({"step": 2 * number + 2, "lr": 0.1}, images=8)
        reporter.close()
        return console.file.getvalue(), run.read_metrics()


def test_a_loader_that_is_too_slow_is_said_once_and_not_of_the_start(tmp_path, monkeypatch):
    text, rows = report(tmp_path, monkeypatch, [0.9, 0.1, 0.5, 0.6])
    assert text.count("waiting for images") == 1
    assert "waiting for images: 50% of the time; ask fastmae bench" in text
    assert [row["data_time"] for row in rows] == pytest.approx([4.5, 0.5, 2.5, 3.0])
    assert "data 90%" in text


def test_a_loader_that_is_fast_enough_is_not(tmp_path, monkeypatch):
    text, rows = report(tmp_path, monkeypatch, [0.9, 0.2, 0.0])
    assert "waiting for images" not in text
    assert [row["data_share"] for row in rows] == pytest.approx([0.9, 0.2, 0.0])


@pytest.fixture
def spoilt(tmp_path):
    """Eleven images, of which two cannot be used, as the index sees."""
    folder = write_images(tmp_path / "images")
    (folder / "3.jpg").write_bytes(b"")
    content = (folder / "5.jpg").read_bytes()
    (folder / "5.jpg").write_bytes(content[: len(content) // 2])
    return folder


def test_bad_files_are_listed_and_counted(tmp_path, spoilt):
    trainer = make_trainer(tmp_path / "run", spoilt, options={"max_bad_fraction": 0.2})
    trainer.fit()
    trainer.run.close()
    lines = [json.loads(line) for line in (tmp_path / "run/bad_files.jsonl").read_text().splitlines()]
    assert [(line["path"], line["found"]) for line in lines] == [
        (str(spoilt / "3.jpg"), "index"),
        (str(spoilt / "5.jpg"), "index"),
    ]
    assert [trainer.dataset.path(line["sample_id"]) for line in lines] == [line["path"] for line in lines]
    assert "empty" in lines[0]["reason"]
    assert [row["bad_files"] for row in trainer.run.read_metrics()] == [2, 2, 2]


def test_too_many_bad_files_stop(tmp_path, spoilt):
    with pytest.raises(DataError, match=r"2 of 11 images cannot be used"):
        make_trainer(tmp_path / "run", spoilt)


def test_files_found_late_wait_for_their_step_and_come_once(tmp_path):
    dataset = make_trainer(tmp_path / "run", write_images(tmp_path / "images")).dataset
    bad = BadFiles(tmp_path / "bad.jsonl", dataset, SamplePositions(4, 11, 0).step_of)
    bad.begin()
    found = [LateBad(7, "cut", 9), LateBad(2, "torn", 4), LateBad(3, "burnt", 8)]
    bad.update(found, samples=8)
    assert (len(bad), bad.state()) == (1, [[2, "torn", 4]])
    bad.update(found, samples=12)
    bad.update(found, samples=12)
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(line["sample_id"], line["found"]) for line in lines] == [(2, 2), (3, 3), (7, 3)]

    again = BadFiles(tmp_path / "bad.jsonl", dataset, SamplePositions(4, 11, 0).step_of)
    again.restore(json.loads(json.dumps(bad.state()))[:2])
    again.begin()  # goes on from a checkpoint of before the last one was found
    again.update(found, samples=12)
    assert [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == lines
