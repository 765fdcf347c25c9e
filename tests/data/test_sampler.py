"""The order of the samples: a permutation, a uniform one, sliced by rank."""

from __future__ import annotations

import math
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fastmae.data.sampler import Order, batch_positions, permuted_ids, replacements


def epoch_order(num_samples: int, epoch: int, seed: int) -> np.ndarray:
    positions = np.arange(epoch * num_samples, (epoch + 1) * num_samples)
    ids, epochs = permuted_ids(positions, num_samples, seed)
    assert (epochs == epoch).all()
    return ids


def test_each_epoch_is_a_permutation():
    for num_samples in [*range(1, 20), 31, 32, 33, 127, 128, 129, 1000, 4096, 4097, 65537]:
        for epoch in (0, 7):
            assert np.array_equal(np.sort(epoch_order(num_samples, epoch, seed=3)), np.arange(num_samples))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 1 << 40), st.integers(0, (1 << 63) - 1), st.integers(0, 1 << 20))
def test_ids_are_in_range_and_distinct_for_any_size(num_samples, seed, start):
    positions = np.arange(start, start + min(64, num_samples))
    ids, epochs = permuted_ids(positions, num_samples, seed)
    assert ids.dtype == epochs.dtype == np.int64
    assert ((ids >= 0) & (ids < num_samples)).all()
    assert np.array_equal(epochs, positions // num_samples)
    for epoch in np.unique(epochs):
        assert len(np.unique(ids[epochs == epoch])) == (epochs == epoch).sum()


def test_orders_differ_between_epochs_and_seeds():
    orders = [epoch_order(1000, epoch, seed) for epoch, seed in [(0, 0), (1, 0), (0, 1), (0, 1 << 40)]]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).mean() < 0.02  # a random pair agrees in about one place of 1,000


@pytest.mark.parametrize("num_samples", [2, 3, 5])
def test_every_order_of_few_samples_is_as_likely(num_samples):
    ids, _ = permuted_ids(np.arange(num_samples * 24_000), num_samples, seed=11)
    codes = ids.reshape(-1, num_samples) @ num_samples ** np.arange(num_samples)
    counts = np.zeros(math.factorial(num_samples))
    distinct, frequencies = np.unique(codes, return_counts=True)
    counts[: len(distinct)] = frequencies
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("num_samples", [13, 100])
def test_places_and_neighbours_are_uniform(num_samples):
    ids, _ = permuted_ids(np.arange(num_samples * (200_000 // num_samples)), num_samples, seed=5)
    orders = ids.reshape(-1, num_samples)
    table = np.zeros((num_samples, num_samples))
    np.add.at(table, (np.broadcast_to(np.arange(num_samples), orders.shape), orders), 1)
    assert chisquare(table.ravel()).pvalue > 1e-3
    steps = np.bincount(((orders[:, 1:] - orders[:, :-1]) % num_samples).ravel(), minlength=num_samples)
    assert steps[0] == 0
    assert chisquare(steps[1:]).pvalue > 1e-3


def test_no_table_of_the_permutation_is_made():
    permuted_ids(np.arange(64), 1000, 0)
    tracemalloc.start()
    permuted_ids(np.arange(10**15, 10**15 + 4096), 10**9, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_the_order_is_fixed_for_good():
    # Runs are continued by newer versions: another order here would show a resumed run samples twice.
    assert epoch_order(10, 0, seed=0).tolist() == [4, 9, 3, 7, 2, 8, 5, 1, 0, 6]
    assert permuted_ids(np.array([0, 1, 10**9 + 5]), 10**9, 42)[0].tolist() == [436478568, 780684948, 35814418]


def windowed(sizes: list[int], window: int, seed: int = 0) -> tuple[Order, np.ndarray]:
    starts = np.cumsum([0, *sizes])[:-1]
    return Order(sum(sizes), seed, starts=starts, window=window), starts


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 50), st.integers(0, 5))
def test_two_levels_give_each_sample_once_per_epoch_and_windows_of_whole_shards(sizes, window, epoch):
    order, starts = windowed(sizes, window)
    total = sum(sizes)
    positions = np.arange(epoch * total, (epoch + 1) * total)
    ids, epochs = order.ids(positions)
    assert np.array_equal(np.sort(ids), np.arange(total))
    assert (epochs == epoch).all()
    # However a run cuts its positions into batches, and wherever it resumes, each has its sample.
    mixed = np.random.default_rng(epoch).permutation(total)
    assert np.array_equal(order.ids(positions[mixed])[0], ids[mixed])
    windows = max(1, round(len(sizes) / window))
    shards = np.searchsorted(starts, ids, "right") - 1
    seen, place = set(), 0
    for number in range(windows):
        in_window = (number + 1) * len(sizes) // windows - number * len(sizes) // windows
        distinct = list(dict.fromkeys(shards[place:].tolist()))[:in_window]
        end = place + sum(sizes[shard] for shard in distinct)
        assert set(shards[place:end].tolist()) == set(distinct)
        assert not seen & set(distinct)
        seen, place = seen | set(distinct), end
    assert place == total


def test_two_levels_are_uniform_over_epochs():
    sizes, epochs = [3, 5, 4, 6], 600
    order, starts = windowed(sizes, 2, seed=9)
    orders = order.ids(np.arange(sum(sizes) * epochs))[0].reshape(epochs, -1)
    shards = np.searchsorted(starts, orders, "right") - 1
    firsts = np.argmax(shards[:, None] == np.arange(4)[:, None], 2)  # where each shard's first sample comes
    window = firsts.argsort(1).argsort(1) // 2
    counts = np.stack([np.bincount(window[:, s], minlength=2) for s in range(4)])
    assert chisquare(counts.ravel()).pvalue > 1e-3  # each shard is as likely in either window
    together = orders[window[:, :2].sum(1) == 0][:, :8]  # the first two shards are the first window
    counts = np.zeros((8, 8))
    np.add.at(counts, (np.broadcast_to(np.arange(8), together.shape), together), 1)
    assert len(together) > 60
    assert chisquare(counts.ravel()).pvalue > 1e-3  # and each sample of a window in each of its places


def test_a_window_of_all_shards_is_the_order_without_windows():
    order, _ = windowed([5] * 8, 8, seed=3)
    assert np.array_equal(order.ids(np.arange(200))[0], permuted_ids(np.arange(200), 40, 3)[0])


def test_the_order_in_two_levels_is_fixed_for_good():
    order, _ = windowed([2, 3, 1, 4], 2)
    assert order.ids(np.arange(10))[0].tolist() == [1, 5, 0, 7, 4, 9, 2, 3, 8, 6]


def test_ranks_slice_each_global_batch():
    whole = np.concatenate([batch_positions(k, batch_size=6, position=17) for k in range(4)])
    sliced = [batch_positions(k, batch_size=3, position=17, rank=r, world_size=2) for k in range(4) for r in range(2)]
    assert np.array_equal(whole, np.concatenate(sliced))
    assert np.array_equal(whole, np.arange(17, 41))


def test_sizes_out_of_range_are_refused():
    for num_samples in (0, -1, (1 << 40) + 1):
        with pytest.raises(ValueError, match="num_samples"):
            permuted_ids(np.arange(4), num_samples, 0)


def test_replacements_are_keyed_and_in_range():
    first = list(islice(replacements(3, 0, 1000, seed=1), 20))
    assert first == list(islice(replacements(3, 0, 1000, seed=1), 20))
    assert all(0 <= candidate < 1000 for candidate in first)
    assert len(set(first)) > 15
    assert first != list(islice(replacements(3, 1, 1000, seed=1), 20))
    assert first != list(islice(replacements(4, 0, 1000, seed=1), 20))
