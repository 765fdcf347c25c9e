"""Counter-based random numbers: Philox-4x32-10, the same 32-bit words on every device and in every library.

Every random choice that fastmae makes about a sample (its mask, its crop, its flip, its place in the epoch) is a pure
function of ``(seed, epoch, sample id)``. That is what makes a run repeatable on another batch size, another number of
processes or another device, and what lets a checkpoint store one number instead of generator states.

The functions here are written with arithmetic operators only, so that one body serves NumPy and PyTorch; the Triton
kernels carry the same function in device code (``kernels/philox.py``), and a test holds the three together.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3; the tests hold the
known answers of the Random123 library.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeVar

import numpy as np
import torch

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF

MAX_SAMPLE_ID = (1 << 48) - 1
"""Largest sample id: the upper 16 bits of the 64-bit counter word carry the stream and the draw."""

Array = TypeVar("Array", np.ndarray, torch.Tensor)


class Stream(IntEnum):
    """What a sequence of random words is for. Streams of one sample are independent of each other."""

    MASK = 0
    CROP = 1
    FLIP = 2
    ORDER = 3
    REPLACE = 4
    JITTER = 5
    AUGMENT = 6
    ERASE = 7
    MIX = 8
    DROP_PATH = 9


def philox4x32(c0: Array, c1: Array, c2: Array, c3: Array, k0: int, k1: int) -> tuple[Array, Array, Array, Array]:
    """Ten rounds of Philox-4x32 on int64 arrays that hold 32-bit words.

    Args:
        c0, c1, c2, c3: counter words, int64 arrays of broadcastable shapes, each value in [0, 2**32).
        k0, k1: key words, Python integers in [0, 2**32).

    Returns:
        Four int64 arrays of the broadcast shape, each value in [0, 2**32).
    """
    for _ in range(10):
        # A 32x32-bit product wraps in int64, but its bit pattern is right: masking after the (arithmetic) shift
        # gives the upper word whatever the sign.
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((product_b >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((product_a >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = product_b & _WORD, product_a & _WORD
        k0, k1 = (k0 + _WEYL_A) & _WORD, (k1 + _WEYL_B) & _WORD
    return c0, c1, c2, c3


def split_seed(seed: int) -> tuple[int, int]:
    """The two 32-bit key words of a seed in [0, 2**63)."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be an integer in [0, 2**63), got {seed!r}")
    return seed & _WORD, seed >> 32


def random_words(
    seed: int, epoch: Array, sample_ids: Array, stream: Stream, num_words: int, draw: int | Array = 0
) -> Array:
    """Random 32-bit words for each sample.

    Word ``j`` of a sample is output ``j % 4`` of Philox at counter
    ``(j // 4, epoch, sample_id[0:32], sample_id[32:48] | stream << 16 | draw << 24)`` and key
    ``(seed[0:32], seed[32:64])``.

    Args:
        seed: integer in [0, 2**63).
        epoch: int64, (N,), values in [0, 2**32).
        sample_ids: int64, (N,), values in [0, 2**48); an array of the same library as ``epoch``.
        stream: what the words are for.
        num_words: words a sample, at most 2**34.
        draw: repetition, in [0, 256), or int64 (N,) of such; other draws are independent.

    Returns:
        int64 (N, num_words), values in [0, 2**32).
    """
    key = split_seed(seed)
    blocks = -(-num_words // 4)
    if isinstance(sample_ids, torch.Tensor):
        c0 = torch.arange(blocks, dtype=torch.int64, device=sample_ids.device)[None, :]
        stack = torch.stack
    else:
        c0 = np.arange(blocks, dtype=np.int64)[None, :]
        stack = np.stack
    high = ((sample_ids >> 32) & 0xFFFF) | (int(stream) << 16) | (draw << 24)
    words = philox4x32(c0, epoch[:, None] & _WORD, (sample_ids & _WORD)[:, None], high[:, None], *key)
    return stack(words, -1).reshape(len(sample_ids), 4 * blocks)[:, :num_words]


def to_unit(words: Array) -> Array:
    """float64 in [0, 1) from 32-bit words: ``word / 2**32``, exact in double precision."""
    return words * (1.0 / 4294967296.0) if isinstance(words, np.ndarray) else words.double() * (1.0 / 4294967296.0)
