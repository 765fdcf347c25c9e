"""Shared by the tests of checkpoints: tensors of all kinds, comparing them, saving, loading, and a hostile pickle."""

from __future__ import annotations

import json
from contextlib import nullcontext

import torch

from fastmae.train.checkpoint import Ranks, open_checkpoint, open_latest
from fastmae.train.checkpoint.format import prune
from fastmae.train.checkpoint.save import plan_save, write
from fastmae.train.checkpoint.state import restore

TENSORS = {
    "model.weight": torch.arange(12.0).reshape(3, 4),
    "model.strided": torch.arange(12.0).reshape(3, 4).T,
    "model.half": torch.tensor([1.5, -0.0, float("inf")], dtype=torch.bfloat16),
    "optimizer.weight.step": torch.tensor(3.0),
    "optimizer.half.step": torch.tensor(4, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3),
}


def shard_of(path):
    (shard,) = path.glob("*.safetensors")
    return shard


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(one[name], other[name]), name


def all_ranks(ranks=None):
    """The given ranks, or a new group of all that is closed afterwards."""
    return nullcontext(ranks) if ranks else Ranks.create()


def save_checkpoint(folder, step, tensors, manifest, *, keep=None, keep_every=None, ranks=None):
    """Save ``folder/step-N`` as the manager does, on a group that may be of some ranks only; each of them calls it."""
    with all_ranks(ranks) as ranks:
        path = write(folder, step, plan_save(tensors, ranks), json.dumps(manifest), ranks)
        if ranks.rank == 0:
            prune(folder, path, keep, keep_every)
    return path


def load_checkpoint(path, *, prefix=""):
    """The tensors and the manifest of ``step-N``."""
    checkpoint = open_checkpoint(path)
    return checkpoint.read_all(prefix), checkpoint.manifest


def latest_checkpoint(run):
    return open_latest(run).path


def load(path, model, optimizer, ranks=None):
    """Put a checkpoint folder into a model and optimiser; every rank calls it."""
    with all_ranks(ranks) as ranks:
        restore(open_checkpoint(path, ranks=ranks), model, optimizer, ranks)


class Malicious:
    """Writes a file when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def no_space(path, *arguments):
    """Replaces ``write_tensors``: the disk is full."""
    raise OSError(28, "No space left on device", str(path))
