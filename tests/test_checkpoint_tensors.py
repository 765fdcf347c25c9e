"""Checkpoints in one process: pieces, one file from many, saving in the background; nothing is ever unpickled."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmae.train.checkpoint import (
    MANIFEST,
    BackgroundSaver,
    Checkpoint,
    CheckpointError,
    consolidate,
    list_checkpoints,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
    tensor_file,
    write,
)
from fastmae.train.checkpoint.folder import SHARD, write_manifest
from fastmae.train.checkpoint.tensor_file import Piece, read_header, write_tensors
from fastmae.train.model_state import collect, collect_own, load
from fastmae.train.run_folder import RunFolder

TENSORS = {
    "model.weight": torch.arange(12.0).reshape(3, 4),
    "model.strided": torch.arange(12.0).reshape(3, 4).T,
    "model.half": torch.tensor([1.5, -0.0, float("inf")], dtype=torch.bfloat16),
    "optimizer.weight.step": torch.tensor(3.0),
    "optimizer.half.step": torch.tensor(4, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def saved(folder):
    return save_checkpoint(folder, 7, TENSORS, {"samples_consumed": 224})


def shard_of(path):
    (shard,) = path.glob("*.safetensors")
    return shard


def vouch(path, files):
    """Write a manifest, as whoever planted the files could."""
    values = [{"name": f.name, "size": f.stat().st_size, "sha256": tensor_file.sha256(f)} for f in files]
    write_manifest(path, 7, {"files": values})


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(one[name], other[name]), name


def read_all(checkpoint):
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_checkpoints_of_earlier_versions_are_read(folder):
    """They had one file, written by safetensors itself."""
    path = folder / "step-7"
    path.mkdir()
    shard = path / SHARD.format(1)
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, shard)
    vouch(path, [shard])
    assert_equal(read_all(open_checkpoint(path)), TENSORS)


def test_tensors_are_aligned_in_the_file(saved):
    """The widest type first, after a header of a multiple of eight bytes: readers map the file into memory."""
    raw = shard_of(saved).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    widths = {"F32": 4, "BF16": 2, "I64": 8, "BOOL": 1}
    assert length % 8 == 0
    assert {name: entry["data_offsets"][0] % widths[entry["dtype"]] for name, entry in header.items()} == dict.fromkeys(
        TENSORS, 0
    )


def test_an_announced_tensor_is_what_is_written(tmp_path):
    piece = Piece(torch.float32, (2,), (0,))
    with pytest.raises(ValueError, match=r"x: expected torch.float32 \(2,\), got torch.float64 \(2,\)"):
        write_tensors(tmp_path / "file", {"x": piece}, lambda name: torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"no type for torch.complex64"):
        write_tensors(tmp_path / "file", {"x": Piece(torch.complex64, (), ())}, lambda name: torch.zeros(()))


HEADERS = [b"", b"[]", b'{"a": 1}', b'{"a": {"dtype": "X", "shape": []}}', b'{"a": {"dtype": "F32"}}']


@pytest.mark.parametrize("raw", [b"", b"\xff" * 16, pickle.dumps(1), *(struct.pack("<Q", len(h)) + h for h in HEADERS)])
def test_what_is_no_safetensors_file_is_refused(tmp_path, raw):
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(ValueError, match="expected a safetensors file"):
        read_header(tmp_path / "file")


class Malicious:
    """Writes a file when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def pickled(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("name", [".metadata", "model.pt", "__0_0.distcp"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_planted_pickle_is_refused_and_never_executed(tmp_path, saved, name, listed):
    """Also where someone wrote a manifest that vouches for it."""
    marker = tmp_path / "executed"
    (saved / name).write_bytes(pickled(Malicious(marker)))
    if listed:
        vouch(saved, [shard_of(saved), saved / name])
    message = f"lists {name}, which is no tensor file" if listed else f"{name}: not listed"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(saved)
    assert not marker.exists()
    torch.load(saved / name, weights_only=False)
    assert marker.exists()  # the plant works, where pickles are trusted


def test_a_pickle_under_a_shards_name_is_refused(tmp_path, saved):
    """With a manifest made for it: what reads the file knows safetensors only."""
    marker, shard = tmp_path / "executed", shard_of(saved)
    shard.write_bytes(pickled(Malicious(marker)))
    vouch(saved, [shard])
    with pytest.raises(CheckpointError, match=shard.name):
        open_checkpoint(saved)
    assert not marker.exists()


def test_pieces_that_leave_a_gap_are_refused(folder, saved):
    """As a manifest without one of the shards would."""
    pieces = {"a": Piece(torch.float32, (2,), (2,))}
    shard = shard_of(saved)
    write_tensors(shard, pieces, lambda name: torch.zeros(2), tensor_file.offsets_metadata(pieces))
    vouch(saved, [shard])
    with pytest.raises(CheckpointError, match=r"pieces of a do not make up a tensor of shape \(4,\)"):
        open_checkpoint(saved)


def test_reading_refuses_other_shapes_types_and_names(saved):
    checkpoint = open_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"model.weight is float32 \(3, 4\), expected float32 \(4, 3\)"):
        checkpoint.read_into({"model.weight": torch.zeros(4, 3)})
    with pytest.raises(CheckpointError, match=r"model.weight is float32 \(3, 4\), expected bfloat16 \(3, 4\)"):
        checkpoint.read_into({"model.weight": torch.zeros(3, 4, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=r"step-7: has no tensor model.other"):
        checkpoint.read_into({"model.other": torch.zeros(4, 3)})


def test_keeps_the_newest_and_the_milestones(folder):
    for step in range(0, 80, 10):
        save_checkpoint(folder, step, {"a": torch.zeros(1)}, {}, keep=2, keep_every=30)
    assert [path.name for path in list_checkpoints(folder)] == ["step-70", "step-60", "step-30"]
    assert len(list(folder.iterdir())) == 3


def test_what_an_interrupted_save_left_is_not_taken_over(folder):
    stale = folder / "step-7.tmp" / SHARD.format(2)
    stale.parent.mkdir()
    stale.write_bytes(b"of another run")
    path = save_checkpoint(folder, 7, TENSORS, {})
    assert {file.name for file in path.iterdir()} == {MANIFEST, SHARD.format(1)}
    assert [file.name for file in folder.iterdir()] == ["step-7"]


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs:/bucket/run"])
def test_object_stores_are_refused(address):
    with pytest.raises(ValueError, match=r"expected a folder of a mounted file system"):
        save_checkpoint(address, 1, {}, {})
    with pytest.raises(ValueError, match=r"expected a folder of a mounted file system"):
        BackgroundSaver(Path(address))
    with pytest.raises(ValueError, match=r"expected a folder of a mounted file system"):
        RunFolder(Path(address))


def test_a_file_that_was_cut_without_an_error_is_no_checkpoint(folder, saved, monkeypatch):
    """Some file systems report a full disk late or never; what is there is compared with what was written."""
    monkeypatch.setattr(tensor_file.os, "fsync", lambda descriptor: tensor_file.os.truncate(descriptor, 50))
    with pytest.raises(CheckpointError, match=r"could not write .*step-8: .*wrote \d+ bytes, the file has 50"):
        save_checkpoint(folder, 8, TENSORS, {})
    monkeypatch.undo()
    assert list_checkpoints(folder) == [saved]


def test_consolidation_holds_one_tensor_at_a_time(folder, saved, tmp_path, monkeypatch):
    alive, most = set(), []
    read = Checkpoint.read

    def counted(self, name):
        tensor = read(self, name)
        memory = np.empty(max(tensor.nbytes, 1), np.uint8)
        alive.add(name)
        weakref.finalize(memory, alive.discard, name)
        most.append(len(alive))
        return torch.from_numpy(memory)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    monkeypatch.setattr(Checkpoint, "read", counted)
    out = consolidate(saved, tmp_path / "all.safetensors", optimizer=True)
    assert_equal(load_file(out), TENSORS)
    assert len(most) == len(TENSORS)
    assert max(most) == 1
    assert_equal(load_checkpoint(saved)[0], TENSORS)
    assert load_checkpoint(saved, prefix="model.")[0].keys() == {"weight", "strided", "half"}
    weights = consolidate(saved, tmp_path / "weights.safetensors")
    assert load_file(weights).keys() == {"weight", "strided", "half"}
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "all.safetensors", "weights.safetensors"}


def test_consolidation_refuses_what_is_damaged(saved, tmp_path):
    shard = shard_of(saved)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    with pytest.raises(CheckpointError, match="contents differ"):
        consolidate(saved, tmp_path / "all.safetensors")
    assert not (tmp_path / "all.safetensors").exists()


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
    monkeypatch.setattr(write, "write_tensors", disk)
    yield disk
    disk.go.set()


def test_a_background_save_holds_the_values_of_its_step(folder, slow_disk):
    weight = torch.zeros(4)
    with BackgroundSaver(folder) as saver:
        values = {"samples": [1]}
        saver.save(1, {"w": weight}, values)
        weight += 1  # the next step, while the disk is still busy
        values["samples"].append(2)
        assert list_checkpoints(folder) == []
        assert saver.poll() is None
        slow_disk.go.set()
        assert saver.wait() == folder / "step-1"
        assert saver.wait() is None
        assert saver.poll() is None
        saver.save(2, {"w": weight}, values)
        weight += 1
    first, second = (open_checkpoint(folder / f"step-{step}") for step in (1, 2))  # leaving it has waited
    assert (first.read("w").tolist(), first.manifest["samples"]) == ([0.0] * 4, [1])
    assert (second.read("w").tolist(), second.manifest["samples"]) == ([1.0] * 4, [1, 2])


def test_a_second_save_waits_for_the_first(folder, slow_disk):
    with BackgroundSaver(folder) as saver:
        saver.save(1, {"w": torch.zeros(1)}, {})
        threading.Timer(0.1, slow_disk.go.set).start()
        saver.save(2, {"w": torch.ones(1)}, {})
        assert slow_disk.written[0] == "step-1.tmp"
        assert (folder / "step-1").exists()
    assert open_checkpoint(folder / "step-1").read("w").item() == 0
    assert open_checkpoint(folder / "step-2").read("w").item() == 1


def poll_until_done(saver):
    while (path := saver.poll()) is None:
        time.sleep(0.001)
    return path


def test_who_waits_needs_no_copies(folder, slow_disk):
    weight = torch.zeros(4)
    with BackgroundSaver(folder) as saver:
        saver.save(1, {"w": weight}, {}, copy=False)
        weight += 1  # too early
        slow_disk.go.set()
        saver.wait()
    assert open_checkpoint(folder / "step-1").read("w").tolist() == [1.0] * 4


def test_a_step_learns_of_a_save_that_is_done_once(folder):
    with BackgroundSaver(folder) as saver:
        saver.save(1, {"w": torch.zeros(1)}, {})
        assert poll_until_done(saver) == folder / "step-1"
        assert saver.poll() is None


def test_background_saves_are_deleted_as_others_are(folder):
    with BackgroundSaver(folder, keep=1, keep_every=2) as saver:
        for step in range(1, 6):
            saver.save(step, {"w": torch.zeros(1)}, {})
    assert [path.name for path in list_checkpoints(folder)] == ["step-5", "step-4", "step-2"]


def test_an_error_of_a_background_save_surfaces_later_and_once(folder, monkeypatch):
    def fails(path, *arguments):
        raise OSError(28, "No space left on device", str(path))

    with BackgroundSaver(folder) as saver:
        saver.save(1, {"w": torch.zeros(1)}, {})
        saver.wait()
        monkeypatch.setattr(write, "write_tensors", fails)
        saver.save(2, {"w": torch.zeros(1)}, {})
        with pytest.raises(CheckpointError, match=r"could not write .*step-2.*No space left.*untouched"):
            poll_until_done(saver)
        assert saver.poll() is None
        saver.save(3, {"w": torch.zeros(1)}, {})
        with pytest.raises(CheckpointError, match="step-3"):
            saver.save(4, {"w": torch.zeros(1)}, {})
        monkeypatch.undo()
    assert [path.name for path in folder.iterdir()] == ["step-1"]


LEAVES = """
import sys, time, torch
from pathlib import Path
from fastmae.train.checkpoint import BackgroundSaver, write
unhurried = write.write_tensors
write.write_tensors = lambda *arguments: (time.sleep(0.5), unhurried(*arguments))[1]
BackgroundSaver(Path(sys.argv[1])).save(1, {"w": torch.ones(3)}, {})
sys.exit(3)
"""


def test_a_process_that_ends_waits_for_its_save(folder):
    process = subprocess.run([sys.executable, "-c", LEAVES, str(folder)], cwd=Path(__file__).parents[1])
    assert process.returncode == 3
    assert open_checkpoint(folder / "step-1").read("w").tolist() == [1.0] * 3


def test_an_error_of_the_training_is_not_hidden_by_one_of_the_save(folder, monkeypatch, capsys):
    def fails(path, *arguments):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(write, "write_tensors", fails)

    def train_and_fail():
        with BackgroundSaver(folder) as saver:
            saver.save(1, {"w": torch.zeros(1)}, {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_and_fail()
    assert "WARNING: could not write" in capsys.readouterr().err
    with pytest.raises(CheckpointError), BackgroundSaver(folder) as saver:
        saver.save(1, {"w": torch.zeros(1)}, {})


def test_values_that_json_does_not_know_are_refused_at_once(folder):
    with BackgroundSaver(folder) as saver, pytest.raises(TypeError):
        saver.save(1, {}, {"path": folder})


def train(model, optimizer, steps):
    for step in steps:
        images = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def test_model_and_optimizer_go_on_exactly(folder):
    model, optimizer = make()
    path = save_checkpoint(folder, 0, collect(model, optimizer), {}, own=collect_own(0))
    assert optimizer.state == {}  # asking must not make a state, nor a step
    train(model, optimizer, range(3))
    path = save_checkpoint(folder, 3, collect(model, optimizer), {}, own=collect_own(0))
    expected = torch.rand(2)
    train(model, optimizer, range(3, 5))

    again, other = make()
    load(folder / "step-0", again, other)
    train(again, other, range(1))
    load(path, again, other)
    assert torch.equal(torch.rand(2), expected)
    assert all(state["step"].item() == 3 for state in other.state.values())
    train(again, other, range(3, 5))
    assert_equal(collect(again, other), collect(model, optimizer))
    load(folder / "step-0", again, other)
    assert other.state == {}


def test_steps_that_are_counted_in_groups_go_on(folder):
    """As apex's FusedAdam counts them."""
    model, optimizer = make()
    path = save_checkpoint(folder, 3, collect(model, optimizer), {"param_groups": [{"lr": 0.5, "step": 3}]})
    load(path, model, optimizer)
    assert optimizer.param_groups[0]["step"] == 3
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_names_are_those_of_the_bare_model(folder):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    model, _ = make()
    model[0] = torch.compile(checkpoint_wrapper(model[0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model[0]._orig_mod  # noqa: B018, the wrapper is there
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names = {name.removeprefix("model.") for name in collect(model, optimizer) if name.startswith("model.")}
    assert names == get_model_state_dict(model).keys()
    flat = torch.distributed.checkpoint.state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
    theirs = get_optimizer_state_dict(model, optimizer, options=flat)
    ours = {name.removeprefix("optimizer."): t for name, t in collect(model, optimizer).items() if "optimizer" in name}
    assert_equal(ours, {name.removeprefix("state."): t for name, t in theirs.items() if name.startswith("state.")})


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
def test_copies_of_cuda_tensors_are_of_their_step(folder):
    weight = torch.zeros(1 << 24, device="cuda")
    scalar = torch.zeros((), device="cuda")
    with BackgroundSaver(folder) as saver:
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


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
def test_training_on_a_gpu_goes_on_exactly(folder, fused):
    def make_there():
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64, device="cuda")
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)

    def train_there(model, optimizer, steps):
        for step in steps:
            images = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).cuda()
            model(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make_there()
    train_there(model, optimizer, range(3))
    with BackgroundSaver(folder) as saver:
        saver.save(3, collect(model, optimizer), {}, own=collect_own(0))
        train_there(model, optimizer, range(3, 5))
    again, other = make_there()
    load(folder / "step-3", again, other)
    here, there = (next(iter(o.state.values()))["step"].device.type for o in (other, optimizer))
    assert here == there
    train_there(again, other, range(3, 5))
    assert_equal(collect(again, other), collect(model, optimizer))
