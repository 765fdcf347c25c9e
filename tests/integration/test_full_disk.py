"""A disk that is full for a while costs checkpoints and rows of metrics, loudly, and not the run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import load_checkpoint
from distributed import run_ranks
from full_disk import files_limited_to
from pretrain_flags import FLAGS, no_evaluation
from training import make_trainer, write_images

from fastmae.cli import main
from fastmae.data import LateBad
from fastmae.train.bad_files import BadFiles
from fastmae.train.checkpoint import CheckpointError, list_checkpoints, save

OPTIONS = {"steps": 20, "checkpoint_every_steps": 4, "log_every_steps": 4}


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("cannot mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for block in (1 << 16, 1):
            try:
                while file.write(b"0" * block):
                    pass
            except OSError:
                pass
    return ballast


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


def train(out: Path, images: Path, at: dict[int, Callable[[], object]], **options) -> Path:
    """Train, doing something when the row of a step is there, which is before the save of that step."""
    trainer = make_trainer(out, images, **OPTIONS | options)
    with trainer.run:
        trainer.fit(on_log=lambda row: at.get(row["step"], lambda: None)())
    return out


def rows(run: Path) -> dict[int, int]:
    """The failed saves that are logged, by step."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["failed_saves"] for row in found}


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run / "checkpoints")]


def test_training_goes_on_when_saves_fail_and_saves_again_once_it_can(tmp_path, images, caplog):
    run, seen = tmp_path / "run", {}
    with ExitStack() as limit, caplog.at_level(logging.WARNING, "fastmae"):
        at = {8: lambda: limit.enter_context(files_limited_to(60_000)), 16: limit.close}
        at[12] = lambda: seen.update(json.loads((run / "status.json").read_text()))
        train(run, images, at)
    assert rows(run) == {4: 0, 8: 0, 12: 1, 16: 2, 20: 0}
    assert steps(run) == [20, 16, 4]
    assert (seen["status"], seen["step"], seen["failed_saves"]) == ("running", 8, 1)
    assert seen["newest_checkpoint"] == "step-4"
    assert "File too large" in seen["reason"]
    first, second, recovered = [r.getMessage() for r in caplog.records if r.name == "fastmae.train.checkpoint.save"]
    assert first.startswith("CHECKPOINT OF STEP 8 NOT SAVED: could not write")
    assert "File too large" in first
    assert "The newest is step-4; training goes on" in first
    assert "2 failed in a row, 3 end the run" in second
    assert recovered == "step-16 is saved, after 2 failed saves"
    assert json.loads((run / "status.json").read_text())["status"] == "finished"

    undisturbed = train(tmp_path / "undisturbed", images, {})
    one, other = (load_checkpoint(path / "checkpoints/step-20", prefix="model.")[0] for path in (run, undisturbed))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's thread
def test_a_disk_without_a_byte_left_costs_rows_and_checkpoints_only(disk, images, caplog):
    run, ballast = disk / "run", []
    at = {8: lambda: ballast.append(fill(disk)), 16: lambda: ballast[0].unlink()}
    with caplog.at_level(logging.WARNING, "fastmae"):
        train(run, images, at, steps=28)
    assert {4, 8, 24, 28} <= rows(run).keys()  # the others fit, or not, into what is left of a page
    assert steps(run)[:3] == [28, 24, 20]
    messages = [record.getMessage() for record in caplog.records]
    assert sum("CHECKPOINT OF STEP" in text and "No space left" in text for text in messages) == 2


def test_the_first_save_and_the_last_must_not_fail(tmp_path, images):
    full = r"could not write .*step-{}: .*File too large"
    with files_limited_to(60_000), pytest.raises(CheckpointError, match=full.format(0)):
        train(tmp_path / "first", images, {})
    with ExitStack() as limit, pytest.raises(CheckpointError, match=full.format(20)):
        train(tmp_path / "last", images, {20: lambda: limit.enter_context(files_limited_to(60_000))})
    status = json.loads((tmp_path / "last/status.json").read_text())
    assert (status["status"], status["step"]) == ("failed", 20)
    assert steps(tmp_path / "last") == [16, 12, 8]


def second_disk_is_full(rank: int, folder: Path) -> tuple[int, list[str]]:
    """The second rank's files are cut in two saves; returns the exit code, and what was logged."""
    unlimited, messages = save.write_tensors, []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("fastmae").addHandler(handler)
    logging.getLogger("fastmae").setLevel(logging.INFO)

    def limited(path, *arguments):
        if rank == 1 and path.parent.name in ("step-8.tmp", "step-12.tmp"):
            with files_limited_to(5_000):
                return unlimited(path, *arguments)
        return unlimited(path, *arguments)

    save.write_tensors = limited
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{rank}")
    flags = ["--train.checkpoint-every-steps", "4", "--train.keep-checkpoints", "3", "--train.steps", "20"]
    flags += ["--train.parallel", "fsdp", "--data.path", str(folder / "images"), "--out", str(folder / "run")]
    with no_evaluation():
        return main([*FLAGS, *flags]), messages


def test_the_full_disk_of_one_rank_is_the_same_failure_for_all(tmp_path):
    write_images(tmp_path / "images")
    codes, logs = zip(*run_ranks(second_disk_is_full, 2, tmp_path), strict=True)
    assert codes == (0, 0)
    run = tmp_path / "run"
    assert rows(run) == {5: 0, 10: 1, 15: 2, 20: 0}
    assert steps(run) == [20, 16, 4]
    for step in (8, 12):
        (line,) = [text for text in logs[0] if f"CHECKPOINT OF STEP {step} NOT SAVED" in text]
        assert "rank 1: " in line
        assert "File too large" in line
        assert line in logs[1]


def test_bad_files_that_cannot_be_written_are_said(tmp_path, caplog):
    late = BadFiles(tmp_path / "bad.jsonl", SimpleNamespace(bad=[], bad_ids=np.array([]), path=str), lambda _: 1)
    late.begin()
    with files_limited_to(10), caplog.at_level(logging.WARNING, "fastmae"):
        late.update([LateBad(1, "damaged", 0)], 8)
    assert [bad.sample_id for bad in late.late] == [1]
    (record,) = caplog.records
    assert record.getMessage().endswith("bad.jsonl: not written: [Errno 27] File too large")
