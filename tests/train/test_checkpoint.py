"""Checkpoints: exact, atomic, verified on load with the file named, never pickled, readable by PyTorch's DCP."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil

import pytest
import torch
from checkpoints import Malicious, shard_of

from fastmae.data import DataError
from fastmae.train.checkpoint import (
    MANIFEST,
    CheckpointError,
    LostRankError,
    Ranks,
    clean,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    open_checkpoint,
    open_latest,
    save_checkpoint,
    set_aside_after,
)
from fastmae.train.checkpoint.format import write_manifest
from fastmae.train.config import PretrainConfig, to_json
from fastmae.train.state import check_architecture, compare_configs

TENSORS = {
    "model.weight": torch.arange(12.0).reshape(3, 4),
    "model.half": torch.tensor([1.5, -0.0, float("inf")], dtype=torch.bfloat16),
    "optimizer.weight.step": torch.tensor(3.0),
    "rng.0.cpu": torch.arange(256, dtype=torch.uint8),
    "metrics.interval": torch.zeros(0, 3),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def saved(folder):
    return save_checkpoint(folder, 7, TENSORS, {"samples_consumed": 224})


def test_round_trip_is_exact_with_zero_dimensional_and_strided_tensors(folder):
    strided = {**TENSORS, "model.strided": torch.arange(12.0).reshape(3, 4).T}
    path = save_checkpoint(folder, 7, strided, {"samples_consumed": 224})
    tensors, manifest = load_checkpoint(path)
    assert tensors.keys() == strided.keys()
    for name, tensor in strided.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name
    assert tensors["optimizer.weight.step"].shape == ()
    assert (manifest["step"], manifest["samples_consumed"]) == (7, 224)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_reads_the_tensor_file(saved):
    """The joint for resharding: ``torch.distributed.checkpoint`` finds every tensor, scalars included."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    target = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    load(target, storage_reader=HuggingFaceStorageReader(str(saved)), no_dist=True)
    for name, tensor in TENSORS.items():
        assert torch.equal(target[name], tensor), name


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def plant_pickle(shard):
    """What DCP's default storage would load and run."""
    shard.with_name(".metadata").write_bytes(pickle.dumps(Malicious(shard.parent.parent / "executed")))


DAMAGES = {
    "missing": (lambda shard: shard.unlink(), "missing, but listed"),
    "truncated": (lambda shard: shard.write_bytes(shard.read_bytes()[:-4]), "expected .* bytes"),
    "flipped": (flip, "contents differ"),
    "extra": (lambda shard: shutil.copy(shard, shard.with_name("shard-00002.safetensors")), "not listed"),
    "pickle": (plant_pickle, "not listed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_with_the_file_named(saved, damage):
    cause, message = DAMAGES[damage]
    cause(shard_of(saved))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(saved)
    assert str(saved) in str(caught.value)
    assert (".metadata" if damage == "pickle" else "shard-") in str(caught.value)
    assert not (saved.parent / "executed").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": "other"}', '{"format": "fastmae-checkpoint", "format_version": 9}', "[" * 100_000]
)
def test_a_strange_manifest_is_refused(saved, text):
    (saved / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        open_checkpoint(saved)


@pytest.mark.parametrize(
    ("old", "new"), [('"samples_consumed": 224', '"samples_consumed": 225'), ('"files"', '"filed"')]
)
def test_an_altered_manifest_is_refused(saved, old, new):
    text = (saved / MANIFEST).read_text()
    assert old in text
    (saved / MANIFEST).write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=r"manifest.json: contents differ"):
        load_checkpoint(saved)


def resign(saved, change):
    """Change a manifest and sign it anew, as a broken program would."""
    manifest = json.loads((saved / MANIFEST).read_text())
    step = manifest["step"]
    for key in ("sha256", "format", "format_version", "step"):
        del manifest[key]
    change(manifest)
    write_manifest(saved, step, manifest)


CHANGES = {
    "no files": lambda m: m.pop("files"),
    "files of another kind": lambda m: m.update(files=3),
    "a file without a size": lambda m: m["files"][0].pop("size"),
    "a file elsewhere": lambda m: m["files"][0].update(name="../../secret"),
    "no table": lambda m: m.pop("tensors"),
    "a table of another kind": lambda m: m.update(tensors=[1]),
    "a tensor without a shape": lambda m: m["tensors"]["model.weight"].pop("shape"),
    "an unknown type": lambda m: m["tensors"]["model.weight"].update(dtype="F4"),
    "a file that is not listed": lambda m: m["tensors"]["model.weight"].update(file="shard-00009.safetensors"),
    "another shape": lambda m: m["tensors"]["model.weight"].update(shape=[4, 3]),
    "a tensor too many": lambda m: m["tensors"].update({"x": m["tensors"]["model.weight"]}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_manifest_whose_checksum_fits_is_refused_with_the_file_named(folder, saved, change, capsys):
    newest = save_checkpoint(folder, 20, TENSORS, {})
    resign(newest, CHANGES[change])
    with pytest.raises(CheckpointError, match=str(newest)):
        open_checkpoint(newest)
    assert latest_checkpoint(folder.parent) == saved
    assert "WARNING: damaged checkpoint passed over" in capsys.readouterr().err


def test_a_manifest_that_the_caller_cannot_use_counts_as_damage(folder, saved):
    save_checkpoint(folder, 20, TENSORS, {"samples_consumed": "many"})
    assert open_latest(folder.parent, check=lambda manifest: int(manifest["samples_consumed"])).path == saved


@pytest.mark.parametrize("name", [MANIFEST, "shard"])
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(saved, name):
    path = saved / MANIFEST if name == MANIFEST else shard_of(saved)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"expected a regular file"):
        open_checkpoint(saved)


def test_latest_falls_back_loudly_from_a_damaged_one(folder, saved, capsys):
    newest = save_checkpoint(folder, 20, TENSORS, {})
    assert latest_checkpoint(folder.parent) == newest
    flip(shard_of(newest))
    assert latest_checkpoint(folder.parent) == saved
    assert "WARNING: damaged checkpoint passed over" in capsys.readouterr().err
    (saved / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no undamaged checkpoint.*step-20.*step-7"):
        latest_checkpoint(folder.parent)


def test_a_run_without_checkpoints_says_so(folder):
    with pytest.raises(CheckpointError, match="found none"):
        latest_checkpoint(folder.parent)


def test_unfinished_saves_are_not_found_and_are_cleaned(folder, saved):
    shutil.copytree(saved, folder / "step-9.tmp")
    shutil.copytree(saved, folder / ".trash-step-1")
    assert latest_checkpoint(folder.parent) == saved
    clean(folder)
    assert [p.name for p in folder.iterdir()] == ["step-7"]


def test_a_loss_of_a_rank_is_no_damage(folder, saved, monkeypatch, capsys):
    def lost(*arguments):
        raise LostRankError("verifying a checkpoint: a rank has ended or does not answer")

    ranks = Ranks()
    monkeypatch.setattr(ranks, "gather", lost)
    with pytest.raises(LostRankError, match=r"^verifying a checkpoint: a rank has ended"):
        open_latest(folder.parent, ranks=ranks)
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DataError("photos: no such folder"), "photos: no such folder"),
        (OSError("disk full"), "disk full"),
        (KeyError("a"), "KeyError('a')"),
        (ValueError(), "ValueError()"),
    ],
)
def test_all_ranks_are_told_what_an_error_says_and_of_a_bug_its_type(error, text):
    def fail():
        raise error

    for together in (Ranks().first, Ranks().gather):
        with pytest.raises(CheckpointError) as told:
            together("opening the data", fail)
        assert str(told.value) == text


def test_a_checkpoint_that_was_moved_and_linked_is_forgotten_and_not_deleted(folder, saved, tmp_path):
    archive = saved.rename(tmp_path / "archive")
    saved.symlink_to(archive)
    for step in (10, 20):
        save_checkpoint(folder, step, TENSORS, {}, keep=1)
    (folder / ".trash-step-1").symlink_to(tmp_path / "gone")
    clean(folder)
    assert [path.name for path in folder.iterdir()] == ["step-20"]
    assert load_checkpoint(archive)[1]["step"] == 7


def test_keeps_the_newest(folder):
    for step in (0, 5, 10, 100):
        save_checkpoint(folder, step, TENSORS, {}, keep=2)
    assert [p.name for p in list_checkpoints(folder)] == ["step-100", "step-10"]
    assert {p.name for p in folder.iterdir()} == {"step-100", "step-10"}


def test_a_checkpoint_just_written_survives_ones_of_later_steps(folder):
    save_checkpoint(folder, 50, TENSORS, {})
    written = save_checkpoint(folder, 20, TENSORS, {}, keep=1)
    assert written in list_checkpoints(folder)


def test_later_steps_are_set_aside(folder, saved):
    save_checkpoint(folder, 20, TENSORS, {})
    set_aside_after(folder, 7)
    assert list_checkpoints(folder) == [saved]
    assert (folder / "step-20.damaged" / MANIFEST).exists()


def test_saving_the_same_step_again_replaces_it(folder, saved):
    again = save_checkpoint(folder, 7, {"model.weight": torch.ones(2)}, {})
    assert again == saved
    assert load_checkpoint(saved)[0].keys() == {"model.weight"}


def test_a_full_disk_keeps_the_previous_checkpoint(folder, saved):
    """A limit on the size of files stands in for the full disk: the write fails half way in the same place."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"could not write .*step-8.*File too large: '.*shard-00001.*untouched"
        ):
            save_checkpoint(folder, 8, {"model.big": torch.zeros(100_000)}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.name for p in folder.iterdir()] == ["step-7"]
    assert latest_checkpoint(folder.parent) == saved


def test_an_unfinished_manifest_means_no_checkpoint(folder, saved, monkeypatch):
    """Nothing but the rename makes a checkpoint: fail just before it."""
    monkeypatch.setattr("fastmae.train.checkpoint.format.MANIFEST", "no/such/folder/manifest.json")
    with pytest.raises(CheckpointError):
        save_checkpoint(folder, 8, TENSORS, {})
    monkeypatch.undo()
    assert latest_checkpoint(folder.parent) == saved
    assert not (folder / "step-8").exists()


def test_another_architecture_is_refused_by_field():
    there = {"embed_dim": 192, "depth": 4, "img_size": [64, 64]}
    check_architecture(there, {**there, "img_size": (64, 64)})
    with pytest.raises(CheckpointError, match=r"embed_dim 192 there, 128 here; depth 4 there, 2 here"):
        check_architecture(there, {**there, "embed_dim": 128, "depth": 2})


def test_configs_are_compared_by_what_a_difference_does():
    saved = {"out": "a", "train": {"seed": 0, "global_batch_size": 32, "base_lr": 1.0, "log_every_steps": 1}}
    here = {"out": "b", "train": {"seed": 0, "global_batch_size": 32, "base_lr": 2.0, "log_every_steps": 2}}
    assert compare_configs(saved, here) == ["train.base_lr was 1.0, is 2.0"]
    here["train"]["seed"] = 1
    with pytest.raises(CheckpointError, match=r"--train.seed: .*started with, 0, got 1"):
        compare_configs(saved, here)


def test_fields_that_an_earlier_version_did_not_save_had_their_default():
    here = to_json(PretrainConfig())
    saved = to_json(PretrainConfig())
    del saved["model"]["mask_strategy"], saved["train"]["masks_per_image"]
    assert compare_configs(saved, here) == []
    here["model"]["mask_strategy"] = "block"
    assert compare_configs(saved, here) == ["model.mask_strategy was random, is block"]
    here["train"]["masks_per_image"] = 2
    with pytest.raises(CheckpointError, match=r"--train.masks-per-image: .*started with, 1, got 2"):
        compare_configs(saved, here)


def test_manifest_is_plain_json(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest["files"][0]["name"] == shard_of(saved).name
    assert len(manifest["files"][0]["sha256"]) == 64
