"""Saving in the background: the values of a step, one save at a time, errors that surface once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import no_space

from fastmae.train.checkpoint import (
    CheckpointError,
    CheckpointManager,
    LostRankError,
    list_checkpoints,
    open_checkpoint,
    save,
)
from fastmae.train.checkpoint.format import write_tensors


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


class SlowDisk:
    """Files are written once they are allowed to be."""

    def __init__(self):
        self.go = threading.Event()
        self.written = []

    def __call__(self, path, *arguments):
        assert self.go.wait(30)
        self.written.append(path.parent.name)
        return write_tensors(path, *arguments)


@pytest.fixture
def slow_disk(monkeypatch):
    disk = SlowDisk()
    monkeypatch.setattr(save, "write_tensors", disk)
    yield disk
    disk.go.set()


def test_a_background_save_holds_the_values_of_its_step(folder, slow_disk):
    weight = torch.zeros(4)
    with CheckpointManager(folder, background=True) as saver:
        values = {"samples": [1]}
        saver.save(1, {"w": weight}, values)
        weight += 1  # the next step, while the disk is still busy
        values["samples"].append(2)
        assert list_checkpoints(folder) == []
        saver.saving or saver.wait()
        assert saver.newest is None
        slow_disk.go.set()
        saver.wait()
        assert saver.newest == folder / "step-1"
        saver.save(2, {"w": weight}, values)
        weight += 1
    first, second = (open_checkpoint(folder / f"step-{step}") for step in (1, 2))  # leaving it has waited
    assert (first.read("w").tolist(), first.manifest["samples"]) == ([0.0] * 4, [1])
    assert (second.read("w").tolist(), second.manifest["samples"]) == ([1.0] * 4, [1, 2])


def test_a_second_save_waits_for_the_first(folder, slow_disk):
    with CheckpointManager(folder, background=True) as saver:
        saver.save(1, {"w": torch.zeros(1)}, {})
        threading.Timer(0.1, slow_disk.go.set).start()
        saver.save(2, {"w": torch.ones(1)}, {})
        assert slow_disk.written[0] == "step-1.tmp"
        assert (folder / "step-1").exists()
    assert open_checkpoint(folder / "step-1").read("w").item() == 0
    assert open_checkpoint(folder / "step-2").read("w").item() == 1


def poll_until(saver, condition):
    while not condition():
        saver.saving or saver.wait()
        time.sleep(0.001)


def test_a_step_learns_once_of_a_save_that_is_done(folder):
    told = []
    with CheckpointManager(folder, background=True) as saver:
        saver.on_saved = told.append
        saver.save(1, {"w": torch.zeros(1)}, {})
        poll_until(saver, lambda: saver.holds(1))
        saver.saving or saver.wait()
    assert told == [folder / "step-1"]


def test_background_saves_are_deleted_as_others_are(folder):
    with CheckpointManager(folder, background=True, keep=1, keep_every=2) as saver:
        for step in range(1, 6):
            saver.save(step, {"w": torch.zeros(1)}, {})
    assert [path.name for path in list_checkpoints(folder)] == ["step-5", "step-4", "step-2"]


def test_a_failed_save_is_logged_and_the_third_in_a_row_ends_the_run(folder, monkeypatch, caplog):
    reported = []
    with CheckpointManager(folder, background=True) as saver:
        saver.on_failed = reported.append
        saver.save(1, {"w": torch.zeros(1)}, {})
        saver.wait()
        monkeypatch.setattr(save, "write_tensors", no_space)
        saver.save(2, {"w": torch.zeros(1)}, {})
        poll_until(saver, lambda: saver.failed == 1)
        assert "CHECKPOINT OF STEP 2 NOT SAVED: could not write" in caplog.text
        saver.save(3, {"w": torch.zeros(1)}, {})
        saver.save(4, {"w": torch.zeros(1)}, {})
        with pytest.raises(CheckpointError, match=r"3 saves in a row failed; .*step-1.*step-4.*No space.*untouched"):
            poll_until(saver, lambda: False)
        assert [values["failed_saves"] for values in reported] == [1, 2]
        monkeypatch.undo()
        saver.save(5, {"w": torch.zeros(1)}, {})
    assert (saver.failed, reported[-1]) == (0, {})
    assert [path.name for path in list_checkpoints(folder)] == ["step-5", "step-1"]


def test_the_first_save_and_the_last_must_not_fail(folder, monkeypatch):
    with CheckpointManager(folder) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(save, "write_tensors", no_space)
            with pytest.raises(CheckpointError, match="step-1"):
                saver.save(1, {"w": torch.zeros(1)}, {})
        saver.save(1, {"w": torch.zeros(1)}, {})
        monkeypatch.setattr(save, "write_tensors", no_space)
        with pytest.raises(CheckpointError, match="step-2"):
            saver.save(2, {"w": torch.zeros(1)}, {}, last=True)


def test_a_lost_rank_is_not_waited_for_three_times(folder, monkeypatch):
    with CheckpointManager(folder, background=True) as saver:
        saver.save(1, {"w": torch.zeros(1)}, {})
        saver.wait()
        monkeypatch.setattr(saver, "_save", lambda *_: (_ for _ in ()).throw(LostRankError("a rank has ended")))
        saver.save(2, {"w": torch.zeros(1)}, {})
        with pytest.raises(LostRankError):
            saver.wait()


LEAVES = """
import sys, time, torch
from pathlib import Path
from fastmae.train.checkpoint import CheckpointManager, save
unhurried = save.write_tensors
save.write_tensors = lambda *arguments: (time.sleep(0.5), unhurried(*arguments))[1]
CheckpointManager(Path(sys.argv[1]), background=True).__enter__().save(1, {"w": torch.ones(3)}, {})
sys.exit(3)
"""


def test_a_process_that_ends_waits_for_its_save(folder):
    process = subprocess.run([sys.executable, "-c", LEAVES, str(folder)], cwd=Path(__file__).parents[2])
    assert process.returncode == 3
    assert open_checkpoint(folder / "step-1").read("w").tolist() == [1.0] * 3


def test_the_thread_waits_on_the_device_of_its_rank(folder, monkeypatch):
    """Else it opens a context on the first GPU, which costs memory there for every rank of the node."""
    now, seen = [None], []

    @contextmanager
    def device(which):
        now.append(which)
        yield
        now.pop()

    class Event:
        device = torch.device("cuda", 3)

        def synchronize(self):
            seen.append(now[-1])

    monkeypatch.setattr(save, "_events", lambda tensors: [Event()])
    monkeypatch.setattr(torch.cuda, "device", device)
    with CheckpointManager(folder, background=True) as saver:
        saver.save(1, {"w": torch.zeros(4)}, {})
    assert seen == [torch.device("cuda", 3)]


def test_an_error_of_the_training_is_not_hidden_by_one_of_the_save(folder, monkeypatch, capsys):
    monkeypatch.setattr(save, "write_tensors", no_space)

    def train_and_fail():
        with CheckpointManager(folder, background=True) as saver:
            saver.save(1, {"w": torch.zeros(1)}, {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_and_fail()
    assert "WARNING: could not write" in capsys.readouterr().err


def test_values_that_json_does_not_know_are_refused_at_once(folder):
    with CheckpointManager(folder, background=True) as saver, pytest.raises(TypeError):
        saver.save(1, {}, {"path": folder})


@pytest.mark.gpu
def test_copies_of_cuda_tensors_are_of_their_step(folder):
    weight = torch.zeros(1 << 24, device="cuda")
    scalar = torch.zeros((), device="cuda")
    with CheckpointManager(folder, background=True) as saver:
        for step in range(3):
            saver.save(step, {"w": weight, "s": scalar}, {})
            weight += 1
            scalar += 1
    for step in range(3):
        checkpoint = open_checkpoint(folder / f"step-{step}")
        assert (checkpoint.read("w") == step).all()
        assert checkpoint.read("s").item() == step
    target = torch.empty_like(weight)
    checkpoint.read_into({"w": target})
    assert (target == 2).all()
