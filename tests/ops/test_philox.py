"""Philox: the published vectors, and NumPy, PyTorch and Triton word for word."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastmae.kernels.philox import philox4x32
from fastmae.ops import masking, philox
from fastmae.ops._dispatch import is_interpreted
from fastmae.ops.philox import Stream, random_words, split_seed, to_unit

pytestmark = pytest.mark.ops

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@triton.jit
def philox_kernel(out_ptr, in_ptr):
    """One counter and one key, six 32-bit words, to four words."""
    i = tl.arange(0, 1)
    c0, c1 = tl.load(in_ptr + i).to(tl.uint32), tl.load(in_ptr + 1 + i).to(tl.uint32)
    c2, c3 = tl.load(in_ptr + 2 + i).to(tl.uint32), tl.load(in_ptr + 3 + i).to(tl.uint32)
    k0, k1 = tl.load(in_ptr + 4).to(tl.uint32), tl.load(in_ptr + 5).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + i, w0.to(tl.int32))
    tl.store(out_ptr + 1 + i, w1.to(tl.int32))
    tl.store(out_ptr + 2 + i, w2.to(tl.int32))
    tl.store(out_ptr + 3 + i, w3.to(tl.int32))


def _words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("make", [lambda w: np.array([w], dtype=np.int64), lambda w: torch.tensor([w])])
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_published_vectors(counter, key, result, make):
    words = philox.philox4x32(*map(make, _words(counter)), *_words(key))
    assert [int(word[0]) for word in words] == _words(result)


@pytest.mark.skipif(not (torch.cuda.is_available() or is_interpreted()), reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_published_vectors_on_triton(device, counter, key, result):
    as_int32 = torch.tensor(_words(counter) + _words(key)).to(torch.int32).to(device)
    out = torch.zeros(4, dtype=torch.int32, device=device)
    philox_kernel[(1,)](out, as_int32)
    assert (out.cpu().long() & 0xFFFFFFFF).tolist() == _words(result)


def test_numpy_equals_torch():
    ids = np.array([0, 1, (1 << 48) - 1], dtype=np.int64)
    epochs = np.array([0, (1 << 32) - 1, 7], dtype=np.int64)
    want = random_words((1 << 63) - 1, epochs, ids, Stream.REPLACE, 10, draw=255)
    got = random_words((1 << 63) - 1, torch.from_numpy(epochs), torch.from_numpy(ids), Stream.REPLACE, 10, draw=255)
    assert want.shape == (3, 10)
    np.testing.assert_array_equal(got.numpy(), want)


def test_every_part_of_the_key_matters():
    def words(seed=1, epoch=2, sample_id=3, stream=Stream.MASK, draw=0):
        return tuple(random_words(seed, np.array([epoch]), np.array([sample_id]), stream, 4, draw)[0].tolist())

    others = [
        words(seed=1 + (1 << 32)), words(seed=0), words(epoch=3), words(sample_id=4), words(sample_id=3 + (1 << 32)),
        words(stream=Stream.CROP), words(draw=1),
    ]  # fmt: skip
    assert len({words(), *others}) == 8


def test_unit_is_in_the_half_open_interval():
    words = np.array([0, (1 << 32) - 1], dtype=np.int64)
    assert to_unit(words).tolist() == [0.0, 1 - 2.0**-32]
    assert to_unit(torch.from_numpy(words)).tolist() == [0.0, 1 - 2.0**-32]


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1.0, True, "0"])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="seed"):
        split_seed(seed)


@pytest.mark.skipif(not is_interpreted(), reason="kernels are compiled in this process")
def test_ops_on_cpu_tensors_launch_kernels(monkeypatch):
    """Without which the interpreter's run would prove nothing."""
    launched = []
    kernel = masking._kernels.random_masking_kernel
    run = type(kernel).run
    monkeypatch.setattr(type(kernel), "run", lambda self, *a, **k: (launched.append(self), run(self, *a, **k))[1])
    masking.random_masking(1, 16, 0.75, seed=0)
    assert launched == [kernel]
