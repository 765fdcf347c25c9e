"""The global batch is kept whatever the number of processes; batch and accumulation follow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmae.train.batching.batch_division import divide_batch


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4096, 64, 64), (64, 1)),
        ((4096, 32, 64), (64, 2)),  # half the nodes: the same batch, twice the passes
        ((4096, 16, 256), (256, 1)),
        ((4096, 1, None), (4096, 1)),
        ((96, 4, 10), (8, 3)),  # the largest divisor of 24 up to 10
        ((4096, 4096, 64), (1, 1)),
    ],
)
def test_batch_is_the_largest_that_fits(arguments, expected):
    assert divide_batch(*arguments) == expected


def test_batch_holds_all_masks_of_an_image():
    assert divide_batch(96, 2, 20, multiple_of=4) == (16, 3)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 4), st.integers(1, 64))
def test_product_is_the_global_batch(share, world_size, multiple_of, max_batch):
    global_batch = share * world_size * multiple_of
    most = max(max_batch, multiple_of)
    batch, accumulation = divide_batch(global_batch, world_size, most, multiple_of=multiple_of)
    assert batch * accumulation * world_size == global_batch
    assert batch <= most
    assert batch % multiple_of == 0
    larger = range(batch + 1, min(most, global_batch // world_size) + 1)
    assert not [b for b in larger if (global_batch // world_size) % b == 0 and b % multiple_of == 0]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((100, 8), {}, "multiple of 8 for 8 processes, such as 96 or 104, got 100"),
        ((4, 8), {}, "such as 8, got 4"),
        ((96, 8, 4), {"multiple_of": 5}, "multiple of 40 for 8 processes with 5 masks an image, such as 80 or 120"),
        ((96, 8, 2), {"multiple_of": 3}, "max_batch: expected at least 3, got 2"),
        ((96, 8, 0), {}, "max_batch: expected at least 1, got 0"),
        ((96, 8, "auto"), {}, "max_batch: expected a number or None, got 'auto', which has to be settled first"),
        ((0, 8), {}, "global_batch: expected at least 1, got 0"),
        ((8, 0), {}, "world_size: expected at least 1, got 0"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        divide_batch(*arguments, **options)
