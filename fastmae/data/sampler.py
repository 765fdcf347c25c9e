"""Which sample each position of the training run takes: a pure function, so that resuming needs one number.

Global position ``g`` counts the samples that all ranks together have seen, and ``epoch = g // N``. Within an epoch the
order is a keyed permutation of ``0..N-1``, in one of two forms:

- over the whole data set, or
- in two levels, for data sets of many shards: the shards are permuted, and the samples of each *window* of
  successive shards are permuted among themselves. A reader then has one window's shards open, not all of them.

Ranks take slices of each global batch, equal or one sample longer, batches straddle epochs, and nothing is dropped or
padded.

The permutation is an alternating Feistel network on ``ceil(log2 N)`` bits, walked along its cycle until it lands below
``N`` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 3 and 5). It costs the same for
10 samples as for 2**40, and no table of the samples exists anywhere; the order in two levels has one of the shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from fastmae.ops.philox import Stream, random_words

_ROUNDS = 16
MAX_SAMPLES = 1 << 40
_WHOLE, _SHARDS, _FIRST_WINDOW = 0, 1, 2
"""Which permutation of an epoch a key is for."""


def permuted_ids(positions: np.ndarray, num_samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The samples at some global positions, in an order over the whole data set.

    Args:
        positions: int64 (n,), each at least 0.
        num_samples: N, from 1 to 2**40.
        seed: in [0, 2**63).

    Returns:
        ``sample_ids`` and ``epochs``, both int64 (n,).
    """
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ValueError(f"num_samples: expected an integer from 1 to 2**40, got {num_samples}")
    epochs, places = np.divmod(positions, num_samples)
    return _permuted(places, num_samples, seed, epochs, _WHOLE), epochs


class Order:
    """The order of a run's samples.

    Args:
        num_samples, seed: as for :func:`permuted_ids`.
        starts: the first sample of each shard, ascending from 0, int64 (shards,); needed with a ``window``.
        window: shards whose samples are mixed. An epoch has ``shards / window`` windows, rounded, whose shares of the
            shards differ by at most one, so that no window is much smaller than the others. 0: one order over the
            whole data set.
    """

    def __init__(self, num_samples: int, seed: int, *, starts: np.ndarray | None = None, window: int = 0):
        self.num_samples, self.seed, self._starts = num_samples, seed, starts
        self._num_windows = round(len(starts) / window) if window else 1
        self._windows = lru_cache(maxsize=2)(self._windows_of_epoch)  # a batch lies in one epoch or two

    def ids(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``sample_ids`` and ``epochs`` at some global positions, all int64 (n,)."""
        if self._num_windows <= 1:  # with a single window nothing would be read more locally
            return permuted_ids(positions, self.num_samples, self.seed)
        epochs, places = np.divmod(positions, self.num_samples)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            behind, ends, windows = self._windows(epoch)
            numbers = np.searchsorted(windows, places[here], "right") - 1
            for window in np.unique(numbers).tolist():
                inside = here[numbers == window]
                first, size = int(windows[window]), int(windows[window + 1] - windows[window])
                keys = self.seed, epochs[inside], _FIRST_WINDOW + window
                mixed = first + _permuted(places[inside] - first, size, *keys)
                shards = np.searchsorted(ends, mixed, "right")
                ids[inside] = behind[shards] - (ends[shards] - mixed)
        return ids, epochs

    def _windows_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For the shards of an epoch in their order, the sample behind the last and the place behind the last; and the
        places where the windows begin, with the end of the epoch."""
        count = len(self._starts)
        shards = _permuted(np.arange(count), count, self.seed, np.full(count, epoch), _SHARDS)
        behind = np.append(self._starts[1:], self.num_samples)[shards]
        ends = np.cumsum(behind - self._starts[shards])
        last = np.arange(1, self._num_windows + 1) * count // self._num_windows - 1
        return behind, ends, np.append(0, ends[last])


def _permuted(places: np.ndarray, size: int, seed: int, epochs: np.ndarray, which: int) -> np.ndarray:
    """Where a permutation of [0, size) takes some places; each epoch has its own, and so has each ``which``."""
    distinct, inverse = np.unique(epochs, return_inverse=True)
    words = random_words(seed, distinct, np.full_like(distinct, which), Stream.ORDER, _ROUNDS)
    keys = words[inverse].T.astype(np.uint64)
    bits = max((size - 1).bit_length(), 2)
    values = _feistel(places.astype(np.uint64), keys, bits)
    while (outside := np.flatnonzero(values >= size)).size:
        values[outside] = _feistel(values[outside], keys[:, outside], bits)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """A permutation of [0, 2**bits): ``values`` uint64 (n,), ``keys`` uint64 (rounds, n) of 32-bit words."""
    low_bits = bits // 2
    masks = [np.uint64((1 << width) - 1) for width in (bits - low_bits, low_bits)]
    low, high = values & masks[1], values >> np.uint64(low_bits)
    for number, key in enumerate(keys):
        # The halves change places, and so do their widths; an even number of rounds brings the widths back.
        low, high = high ^ (_mix(low, key) & masks[number % 2]), low
    return (high << np.uint64(low_bits)) | low


def _mix(words: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A round function: the finaliser of MurmurHash3 (64 bits) of the word and the round's key, upper half."""
    mixed = (words ^ (key << np.uint64(24))) * np.uint64(0xFF51AFD7ED558CCD) + key
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    mixed ^= mixed >> np.uint64(33)
    return mixed >> np.uint64(24)


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
