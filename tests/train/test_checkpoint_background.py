"""Saving in the background: the values of a step, one save at a time, errors that surface once; continuing from it."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch
from checkpoints import assert_equal, load, no_space, save_checkpoint

from fastmae.train.checkpoint import (
    CheckpointError,
    CheckpointManager,
    LostRankError,
    list_checkpoints,
    open_checkpoint,
    save,
)
from fastmae.train.checkpoint.format import write_tensors
from fastmae.train.checkpoint.state import collect


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


def test_a_background_save_holds_the_values_of_its_step_and_is_noticed_once(folder, slow_disk):
    weight, saved = torch.zeros(4), []
    with CheckpointManager(folder, background=True) as saver:
        saver.on_saved = lambda path: saved.append(path.name)
        values = {"samples": [1]}
        saver.save(1, {"w": weight}, values)
        weight += 1  # the next step, while the disk is still busy
        values["samples"].append(2)
        assert saver.saving
        assert saver.newest is None
        assert list_checkpoints(folder) == []
        threading.Timer(0.1, slow_disk.go.set).start()
        saver.save(2, {"w": weight}, values)  # waits for the first
        assert slow_disk.written[0] == "step-1.tmp"
        assert saver.newest == folder / "step-1"
        weight += 1
    first, second = (open_checkpoint(folder / f"step-{step}") for step in (1, 2))  # leaving it has waited
    assert (first.read("w").tolist(), first.manifest["samples"]) == ([0.0] * 4, [1])
    assert (second.read("w").tolist(), second.manifest["samples"]) == ([1.0] * 4, [1, 2])
    assert saved == ["step-1", "step-2"]


def test_background_saves_are_pruned_as_others_are(folder):
    with CheckpointManager(folder, background=True, keep=1, keep_every=2) as saver:
        for step in range(1, 6):
            saver.save(step, {"w": torch.zeros(1)}, {}, protect=lambda: 1)
    assert [path.name for path in list_checkpoints(folder)] == ["step-5", "step-4", "step-2", "step-1"]


def test_a_failed_save_is_logged_and_the_third_in_a_row_ends_the_run(folder, monkeypatch, caplog):
    reported = []
    with CheckpointManager(folder, background=True) as saver:
        saver.on_failed = reported.append
        saver.save(1, {"w": torch.zeros(1)}, {})
        saver.wait()
        monkeypatch.setattr(save, "write_tensors", no_space)
        saver.save(2, {"w": torch.zeros(1)}, {})
        saver.wait()
        assert "CHECKPOINT OF STEP 2 NOT SAVED: could not write" in caplog.text
        saver.save(3, {"w": torch.zeros(1)}, {})
        saver.save(4, {"w": torch.zeros(1)}, {})
        with pytest.raises(CheckpointError, match=r"3 saves in a row failed; .*step-1.*step-4.*No space.*untouched"):
            saver.wait()
        assert [values["failed_saves"] for values in reported] == [1, 2]
        monkeypatch.undo()
        saver.save(5, {"w": torch.zeros(1)}, {})
    assert (saver.failed, reported[-1]) == (0, {})
    assert [path.name for path in list_checkpoints(folder)] == ["step-5", "step-1"]


def test_the_first_save_and_the_last_must_not_fail_and_a_lost_rank_ends_the_run_at_once(folder, monkeypatch):
    with CheckpointManager(folder) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(save, "write_tensors", no_space)
            with pytest.raises(CheckpointError, match="step-1"):
                saver.save(1, {"w": torch.zeros(1)}, {})
        saver.save(1, {"w": torch.zeros(1)}, {})
        monkeypatch.setattr(save, "write_tensors", no_space)
        with pytest.raises(CheckpointError, match="step-2"):
            saver.save(2, {"w": torch.zeros(1)}, {}, last=True)
        monkeypatch.setattr(save, "write", lambda *_: (_ for _ in ()).throw(LostRankError("a rank has ended")))
        with pytest.raises(LostRankError):
            saver.save(3, {"w": torch.zeros(1)}, {})


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

    monkeypatch.setattr(save, "_events", lambda tensors: [Event()])  # as of CUDA tensors
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


# ---- model and optimiser: exact continuation, and what does not fit --------------------------------------------------


def make(device="cpu"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3, device=device), torch.nn.LayerNorm(3, device=device))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def train(model, optimizer, steps):
    for step in steps:
        images = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(images.to(model[0].weight.device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_model_and_optimizer_go_on_exactly(folder):
    model, optimizer = make()
    path = save_checkpoint(folder, 0, collect(model, optimizer), {})
    assert optimizer.state == {}  # asking must not make a state, nor a step
    train(model, optimizer, range(3))
    path = save_checkpoint(folder, 3, collect(model, optimizer), {})
    train(model, optimizer, range(3, 5))

    again, other = make()
    load(folder / "step-0", again, other)
    train(again, other, range(1))
    load(path, again, other)
    assert all(state["step"].item() == 3 for state in other.state.values())
    train(again, other, range(3, 5))
    assert_equal(collect(again, other), collect(model, optimizer))
    load(folder / "step-0", again, other)
    assert other.state == {}


def test_a_model_of_other_names_is_refused(folder):
    model, optimizer = make()
    path = save_checkpoint(folder, 0, collect(model, optimizer), {})
    other = torch.nn.Sequential(torch.nn.Linear(5, 3))
    with pytest.raises(CheckpointError, match=r"do not fit the model: missing \[\], unknown \['model.1.bias'"):
        load(path, other, torch.optim.AdamW(other.parameters()))
    wider = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.LayerNorm(3))
    with pytest.raises(CheckpointError, match=r"model.0.weight is float32 \(3, 5\), expected float32 \(3, 6\)"):
        load(path, wider, torch.optim.AdamW(wider.parameters()))


@pytest.mark.gpu
def test_training_on_a_gpu_goes_on_exactly(folder):
    model, optimizer = make("cuda")
    train(model, optimizer, range(3))
    with CheckpointManager(folder, background=True) as saver:
        saver.save(3, collect(model, optimizer), {})
        train(model, optimizer, range(3, 5))
    again, other = make("cuda")
    load(folder / "step-3", again, other)
    here, there = (next(iter(o.state.values()))["step"].device.type for o in (other, optimizer))
    assert here == there
    train(again, other, range(3, 5))
    assert_equal(collect(again, other), collect(model, optimizer))


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
