"""Which sample stands at which position of the training run: a pure function, so that resuming is one number.

Global position ``g`` counts the samples that all ranks together have seen. ``epoch = g // N``, and the sample is a
pseudorandom permutation of ``0..N-1``, keyed by ``(seed, epoch)``, at ``g % N``. Ranks take slices of each global
batch, equal or one sample longer, batches straddle epochs, and nothing is dropped or padded.

The permutation is an alternating Feistel network on ``ceil(log2 N)`` bits, walked along its cycle until it lands below
``N`` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 3 and 5). It costs the same for
10 samples as for 2**40: no table of the permutation exists anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastmae.ops.philox import Stream, random_words

_ROUNDS = 16
MAX_SAMPLES = 1 << 40


def permuted_ids(positions: np.ndarray, num_samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The samples at some global positions.

    Args:
        positions: int64 (n,), each at least 0.
        num_samples: N, from 1 to 2**40.
        seed: in [0, 2**63).

    Returns:
        ``sample_ids`` and ``epochs``, both int64 (n,).
    """
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ValueError(f"num_samples: expected an integer from 1 to 2**40, got {num_samples}")
    epochs, values = np.divmod(positions, num_samples)
    distinct, which = np.unique(epochs, return_inverse=True)
    keys = random_words(seed, distinct, np.zeros_like(distinct), Stream.ORDER, _ROUNDS)[which].T.astype(np.uint64)
    bits = max((num_samples - 1).bit_length(), 2)
    values = _feistel(values.astype(np.uint64), keys, bits)
    while (outside := np.flatnonzero(values >= num_samples)).size:
        values[outside] = _feistel(values[outside], keys[:, outside], bits)
    return values.astype(np.int64), epochs


def _feistel(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """A permutation of [0, 2**bits): ``values`` uint64 (n,), ``keys`` uint64 (rounds, n) of 32-bit words."""
    low_bits, high_bits = bits // 2, bits - bits // 2
    low, high = values & _mask(low_bits), values >> np.uint64(low_bits)
    for key in keys:
        # The halves change places, and so do their widths; an even number of rounds brings the widths back.
        low, high = high ^ (_mix(low, key) & _mask(high_bits)), low
        low_bits, high_bits = high_bits, low_bits
    return (high << np.uint64(low_bits)) | low


def _mix(words: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A round function: the finaliser of MurmurHash3 (64 bits) of the word and the round's key, upper half."""
    mixed = (words ^ (key << np.uint64(24))) * np.uint64(0xFF51AFD7ED558CCD) + key
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    mixed ^= mixed >> np.uint64(33)
    return mixed >> np.uint64(24)


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def micro_batches(total: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[range]:
    """A rank's parts of the ``total`` samples of an optimiser step.

    Every rank has equally many micro-batches, the fewest whose largest has ``batch_size`` samples. Number ``m`` of rank
    ``r`` is part ``m * world_size + r`` of all. Parts follow each other without gaps. Their lengths differ by at most
    one, longer ones first, so the shares of two ranks differ by at most one sample too.
    """
    count = -(-total // (batch_size * world_size))
    length, longer = divmod(total, count * world_size)
    numbers = range(rank, count * world_size, world_size)
    starts = (number * length + min(number, longer) for number in numbers)
    return [range(start, start + length + (n < longer)) for n, start in zip(numbers, starts, strict=True)]


def batch_positions(
    batch: int, *, batch_size: int, position: int = 0, rank: int = 0, world_size: int = 1, total: int | None = None
) -> np.ndarray:
    """Global positions, int64 (n,), of a rank's ``batch``-th batch after ``position`` samples were consumed.

    Args:
        batch_size: n at most.
        position: where an optimiser step begins.
        total: samples of a step on all ranks, as :func:`micro_batches` divides them; None: ``batch_size * world_size``.
    """
    total = total or batch_size * world_size
    parts = micro_batches(total, batch_size, rank=rank, world_size=world_size)
    step, number = divmod(batch, len(parts))
    return position + step * total + np.array(parts[number], dtype=np.int64)


def replacements(sample_id: int, epoch: int, num_samples: int, seed: int) -> Iterator[int]:
    """Samples to put in place of an undecodable one, in the order in which to try them; at most 256, some repeated."""
    for draw in range(256):
        words = random_words(seed, np.array([epoch]), np.array([sample_id]), Stream.REPLACE, 2, draw)
        yield ((int(words[0, 0]) << 32) | int(words[0, 1])) % num_samples
