"""The global batch is kept whatever the number of processes; batch and accumulation follow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae.data.sampler import batch_positions
from fastmae.train.autotune import describe_uneven_shares, divide_batch


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4096, 56, 256), (74, 1)),  # a node fewer: 8 take 74 and 48 take 73
        ((4096, 1, None), (4096, 1)),
        ((15, 1, 4), (3, 5)),  # five equal passes rather than four
        ((8, 3), (3, 1)),
        ((28, 2, 8, 4), (8, 2)),  # seven images with four masks each: four for one, three for the other
    ],
)
def test_passes_are_few_and_equal(arguments, expected):
    assert divide_batch(*arguments) == expected


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(1, 12), st.integers(1, 32), st.integers(0, 3), st.integers(0, 500))
def test_ranks_and_passes_divide_every_step_into_consecutive_parts(images, world_size, max_batch, step, position):
    images = max(images, world_size)
    max_batch = max(max_batch, 1 + (images % world_size > 0))
    batch, accumulation = divide_batch(images, world_size, max_batch)
    own = {"batch_size": batch, "position": position, "world_size": world_size, "total": images}
    parts = [
        [batch_positions(step * accumulation + number, rank=rank, **own) for rank in range(world_size)]
        for number in range(accumulation)
    ]
    first = position + step * images
    assert np.array_equal(np.concatenate([part for ranks in parts for part in ranks]), np.arange(first, first + images))
    sizes = np.array([[len(part) for part in ranks] for ranks in parts])
    assert sizes.max() == batch <= max_batch
    assert sizes.min() >= max(1, batch - 1)
    assert np.ptp(sizes.sum(0)) <= 1
    fewest = -(-images // (world_size * max_batch))
    assert accumulation == fewest or (accumulation < 2 * fewest and np.ptp(sizes) == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 8), "--train.global-batch-size: expected at least 8 for 8 processes, got 4"),
        ((12, 8, None, 2), "expected at least 16 for 8 processes with 2 masks per image, got 12"),
        ((96, 8, 4, 5), "expected a multiple of --train.masks-per-image 5, got 96"),
        ((8, 3, 1), "--train.batch-size: expected at least 2, since 8 do not divide evenly among 3 processes, got 1"),
    ],
)
def test_fewer_images_than_processes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        divide_batch(*arguments)


def test_uneven_shares_are_described():
    assert describe_uneven_shares(4096, 64) is None
    assert "8 of them take 74 and 48 take 73" in describe_uneven_shares(4096, 56)
    assert "take 16 and 1 take 12" in describe_uneven_shares(28, 2, masks_per_image=4)
