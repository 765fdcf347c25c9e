"""Files of a checkpoint in one process: pieces, one file from many; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import weakref
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from checkpoints import TENSORS, Malicious, assert_equal, read_all, shard_of
from safetensors.torch import load_file, save_file

from fastmae.train.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    CheckpointManager,
    consolidate,
    format,
    list_checkpoints,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from fastmae.train.checkpoint.format import SHARD, Piece, offsets_metadata, read_header, write_manifest, write_tensors
from fastmae.train.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def saved(folder):
    return save_checkpoint(folder, 7, TENSORS, {"samples_consumed": 224})


def vouch(path, files):
    """Write a manifest, as whoever planted the files could."""
    digest = lambda f: hashlib.sha256(f.read_bytes()).hexdigest()  # noqa: E731
    values = [{"name": f.name, "size": f.stat().st_size, "sha256": digest(f)} for f in files]
    with patch.object(format, "FORMAT_VERSION", 1):  # which believes the headers of the files
        write_manifest(path, 7, {"files": values})


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
    message = f"lists {name}, which is not a checkpoint's tensor file" if listed else f"{name}: not listed"
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
    write_tensors(shard, pieces, lambda name: torch.zeros(2), offsets_metadata(pieces))
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
        CheckpointManager(Path(address))
    with pytest.raises(ValueError, match=r"expected a folder of a mounted file system"):
        RunFolder(Path(address))


def test_a_file_that_was_cut_without_an_error_is_no_checkpoint(folder, saved, monkeypatch):
    """Some file systems report a full disk late or never; what is there is compared with what was written."""
    monkeypatch.setattr(format.os, "fsync", lambda descriptor: format.os.truncate(descriptor, 50))
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
