"""Checkpoints of one process: exact, atomic, verified on load with the file named, never pickled, readable by DCP."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import weakref
from stat import S_ISREG

import numpy as np
import pytest
import torch
from checkpoints import (
    TENSORS,
    Malicious,
    assert_equal,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    shard_of,
)
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as dcp_load

from fastmae.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    LostRankError,
    Ranks,
    consolidate,
    format,
    open_checkpoint,
    open_latest,
)
from fastmae.train.checkpoint.format import MANIFEST, SHARD, Chunk, clean, read_header, write_manifest, write_tensors
from fastmae.train.checkpoint.state import compare_configs
from fastmae.train.config import PretrainConfig, to_json


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def saved(folder):
    return save_checkpoint(folder, 7, TENSORS, {"samples_consumed": 224})


# ---- what is written, and reading it --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_round_trip_is_exact_and_dcp_reads_the_file(saved):
    """Scalars, strided and empty tensors included."""
    tensors, manifest = load_checkpoint(saved)
    assert_equal(tensors, TENSORS)
    assert (manifest["step"], manifest["samples_consumed"]) == (7, 224)
    assert load_checkpoint(saved, prefix="model.")[0].keys() == {"weight", "strided", "half"}
    target = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    dcp_load(target, storage_reader=HuggingFaceStorageReader(str(saved)), no_dist=True)
    assert_equal(target, TENSORS)


def test_tensors_are_aligned_in_the_file(saved):
    """The widest type first, after a header of a multiple of eight bytes: readers map the file into memory."""
    raw = shard_of(saved).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    widths = {"F32": 4, "BF16": 2, "I64": 8, "BOOL": 1}
    assert length % 8 == 0
    assert not any(entry["data_offsets"][0] % widths[entry["dtype"]] for entry in header.values())


def test_types_that_safetensors_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x: safetensors has no type for torch.complex64"):
        save_checkpoint(tmp_path, 1, {"x": torch.zeros((), dtype=torch.complex64)}, {})


def test_consolidation_holds_one_tensor_at_a_time(saved, tmp_path, monkeypatch):
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
    out = consolidate(open_checkpoint(saved), tmp_path / "all.safetensors", optimizer=True)
    assert most == [1] * len(TENSORS)
    assert_equal(load_file(out), TENSORS)
    weights = consolidate(open_checkpoint(saved), tmp_path / "weights.safetensors")
    assert load_file(weights).keys() == {"weight", "strided", "half"}
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "all.safetensors", "weights.safetensors"}


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "missing": (lambda shard: shard.unlink(), "missing, but listed"),
    "truncated": (lambda shard: shard.write_bytes(shard.read_bytes()[:-4]), "expected .* bytes"),
    "flipped": (flip, "contents differ"),
    "extra": (lambda shard: shutil.copy(shard, shard.with_name("shard-00002.safetensors")), "not listed"),
    "pipe": (as_pipe, "expected a regular file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_with_the_file_named_and_the_one_before_is_used(folder, saved, damage, capsys):
    newest = save_checkpoint(folder, 20, TENSORS, {})
    assert latest_checkpoint(folder.parent) == newest
    cause, message = DAMAGES[damage]
    cause(shard_of(newest))
    with pytest.raises(CheckpointError, match=rf"{newest}/shard-.*{message}"):
        open_checkpoint(newest)
    assert latest_checkpoint(folder.parent) == saved
    assert "WARNING: damaged checkpoint passed over" in capsys.readouterr().err
    as_pipe(saved / MANIFEST)
    with pytest.raises(CheckpointError, match=r"no undamaged checkpoint.*step-20.*step-7/manifest.json: expected"):
        latest_checkpoint(folder.parent)


def signed_again(change):
    """Change a manifest and sign it, as a broken program would."""

    def rewrite(path):
        manifest = json.loads(path.read_text())
        change(manifest)
        values = {name: value for name, value in manifest.items() if name not in ("sha256", "format", "format_version")}
        write_manifest(path.parent, values.pop("step"), values)

    return rewrite


MANIFESTS = {
    "empty": lambda path: path.write_text(""),
    "a list": lambda path: path.write_text("[]"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "of another program": lambda path: path.write_text('{"format": "other"}'),
    "of the future": lambda path: path.write_text('{"format": "fastmae-checkpoint", "format_version": 9}'),
    "another value": lambda path: path.write_text(path.read_text().replace(": 224", ": 225")),
    "no step": signed_again(lambda m: m.update(step="7")),
    "no files": signed_again(lambda m: m.pop("files")),
    "files of another kind": signed_again(lambda m: m.update(files=3)),
    "a file without a size": signed_again(lambda m: m["files"][0].pop("size")),
    "a file elsewhere": signed_again(lambda m: m["files"][0].update(name="../../secret")),
    "no table": signed_again(lambda m: m.pop("tensors")),
    "a table of another kind": signed_again(lambda m: m.update(tensors=[1])),
    "a tensor without a shape": signed_again(lambda m: m["tensors"]["model.weight"].pop("shape")),
    "an unknown type": signed_again(lambda m: m["tensors"]["model.weight"].update(dtype="F4")),
    "a file that is not listed": signed_again(lambda m: m["tensors"]["model.weight"].update(file="shard-00009")),
    "another shape": signed_again(lambda m: m["tensors"]["model.weight"].update(shape=[4, 3])),
    "a tensor too many": signed_again(lambda m: m["tensors"].update({"x": m["tensors"]["model.weight"]})),
    "not usable": signed_again(lambda m: m.update(samples_consumed="many")),
}


def test_every_wrong_manifest_is_passed_over_with_its_folder_named(folder, saved, capsys):
    for name, change in MANIFESTS.items():
        newest = save_checkpoint(folder, 20, TENSORS, {"samples_consumed": 224})
        change(newest / MANIFEST)
        latest = open_latest(folder.parent, check=lambda manifest: int(manifest["samples_consumed"]))
        assert latest.path == saved, name
        assert f"WARNING: damaged checkpoint passed over: {newest}/" in capsys.readouterr().err, name


HEADERS = [b"", b"[]", b'{"a": 1}', b'{"a": {"dtype": "X", "shape": []}}', b'{"a": {"dtype": "F32"}}']


@pytest.mark.parametrize("raw", [b"", b"\xff" * 16, pickle.dumps(1), *(struct.pack("<Q", len(h)) + h for h in HEADERS)])
def test_what_is_no_safetensors_file_is_refused(tmp_path, raw):
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(CheckpointError, match="file: unreadable"):
        read_header(tmp_path / "file")


def vouch(path, files):
    """Write a manifest of version 1 for files, as whoever planted them could."""
    entries = [{"name": f.name, "size": f.stat().st_size, "sha256": format.hashlib.sha256(f.read_bytes()).hexdigest()}
               for f in files]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(format, "FORMAT_VERSION", 1)  # which has no table of tensors and reads the files' headers
        write_manifest(path, 7, {"files": entries})


def test_pickles_are_refused_and_never_executed(tmp_path, saved):
    """Also where someone wrote a manifest that vouches for them."""
    marker, shard = tmp_path / "executed", shard_of(saved)
    for name in (".metadata", "model.pt", "__0_0.distcp"):  # .metadata is what DCP's default storage loads and runs
        (saved / name).write_bytes(pickle.dumps(Malicious(marker)))
        with pytest.raises(CheckpointError, match=rf"{name}: not listed"):
            open_checkpoint(saved)
        vouch(saved, [shard, saved / name])
        with pytest.raises(CheckpointError, match=rf"lists {name}, which is not a checkpoint's tensor file"):
            open_checkpoint(saved)
        planted = (saved / name).rename(tmp_path / name)
        vouch(saved, [shard])
    shutil.copy(planted, shard)
    vouch(saved, [shard])
    with pytest.raises(CheckpointError, match=f"{shard.name}: unreadable"):
        open_checkpoint(saved)
    assert not marker.exists()
    pickle.loads(planted.read_bytes())
    assert marker.exists()  # it would have worked


def test_version_1_is_read_by_its_headers_and_a_gap_is_refused(saved):
    shard = shard_of(saved)
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, shard)
    vouch(saved, [shard])
    assert_equal(load_checkpoint(saved)[0], TENSORS)
    second_half = {"a": Chunk(torch.float32, (2,), 2)}
    write_tensors(shard, second_half, lambda name: torch.zeros(2), format.offsets_metadata(second_half))
    vouch(saved, [shard])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: a is .*shape=\(2,\).*but .*shape=\(4,\)"):
        open_checkpoint(saved)


def test_a_lost_rank_is_no_damage(folder, saved, monkeypatch, capsys):
    def lost(*arguments):
        raise LostRankError("verifying a checkpoint: a rank has ended or does not answer")

    ranks = Ranks()
    monkeypatch.setattr(ranks, "gather", lost)
    with pytest.raises(LostRankError, match=r"^verifying a checkpoint: a rank has ended"):
        open_latest(folder.parent, ranks=ranks)
    assert "damaged" not in capsys.readouterr().err


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_what_is_not_finished_is_never_found(folder, saved, monkeypatch):
    """A full disk, a disk that reports nothing, and an end just before the rename leave the checkpoint before."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # the write fails half way, as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"could not write .*step-8.*File too large: '.*shard-0.*untouched"):
            save_checkpoint(folder, 8, {"model.big": torch.zeros(100_000)}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with monkeypatch.context() as patch:
        truncate = lambda descriptor: S_ISREG(os.fstat(descriptor).st_mode) and os.truncate(descriptor, 50)  # noqa: E731
        patch.setattr(format.os, "fsync", truncate)
        with pytest.raises(
            CheckpointError, match=r"could not write .*step-8: .* bytes were written, and rank 0 sees 50"
        ):
            save_checkpoint(folder, 8, TENSORS, {})
    with monkeypatch.context() as patch:
        patch.setattr(format, "MANIFEST", "no/such/folder/manifest.json")
        with pytest.raises(CheckpointError):
            save_checkpoint(folder, 8, TENSORS, {})
    assert [path.name for path in folder.iterdir()] == ["step-7"]
    assert latest_checkpoint(folder.parent) == saved


def test_leftovers_are_neither_found_nor_taken_over_and_are_cleaned(folder, saved):
    stale = folder / "step-8.tmp" / SHARD.format(2)
    stale.parent.mkdir()
    stale.write_bytes(b"of another run")
    assert latest_checkpoint(folder.parent) == saved
    path = save_checkpoint(folder, 8, TENSORS, {})
    assert {file.name for file in path.iterdir()} == {MANIFEST, SHARD.format(1)}
    shutil.copytree(saved, folder / "step-9.tmp")
    shutil.copytree(saved, folder / ".trash-step-1")
    clean(folder)
    assert {path.name for path in folder.iterdir()} == {"step-7", "step-8"}


def test_the_one_just_written_stays_and_the_same_step_again_replaces_it(folder):
    save_checkpoint(folder, 70, {"a": torch.zeros(1)}, {})
    save_checkpoint(folder, 20, {"a": torch.ones(1)}, {}, keep=1)
    again = save_checkpoint(folder, 20, {"a": torch.ones(2)}, {}, keep=1)
    assert {path.name for path in folder.iterdir()} == {"step-70", "step-20"}
    assert open_checkpoint(again).read("a").tolist() == [1.0, 1.0]


def test_a_checkpoint_that_was_moved_and_linked_is_forgotten_and_not_deleted(folder, saved, tmp_path):
    archive = saved.rename(tmp_path / "archive")
    saved.symlink_to(archive)
    for step in (10, 20):
        save_checkpoint(folder, step, TENSORS, {}, keep=1)
    (folder / ".trash-step-1").symlink_to(tmp_path / "gone")
    clean(folder)
    assert [path.name for path in folder.iterdir()] == ["step-20"]
    assert load_checkpoint(archive)[1]["step"] == 7


# ---- comparing runs --------------------------------------------------------------------------------------------------


def test_configs_are_compared_by_what_a_difference_does():
    """A field that an earlier version did not save had its default."""
    saved, here = to_json(PretrainConfig()), to_json(PretrainConfig())
    here["out"], here["train"]["log_every_steps"] = "b", 2
    del saved["model"]["mask_strategy"], saved["train"]["masks_per_image"]
    assert compare_configs(saved, here) == []
    here["model"]["mask_strategy"] = "block"
    assert compare_configs(saved, here) == ["model.mask_strategy was random, is block"]
    here["train"]["masks_per_image"] = 2
    with pytest.raises(CheckpointError, match=r"--train.masks-per-image: .*started with, 1, got 2"):
        compare_configs(saved, here)
