"""What the tests of checkpoints share: tensors of all kinds, comparing them, and a plant."""

from __future__ import annotations

import torch

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


def read_all(checkpoint):
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


class Malicious:
    """Writes a file when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def no_space(path, *arguments):
    """In the place of ``write_tensors``: the disk is full."""
    raise OSError(28, "No space left on device", str(path))
