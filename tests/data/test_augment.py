"""Crop boxes and flips against torchvision's RandomResizedCrop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import RandomResizedCrop

from fastmae.data import Augment, crop_boxes, flips


def boxes_of(count: int, height: int, width: int, *, seed=0, epoch=0, augment=None) -> np.ndarray:
    keys = np.arange(count), np.full(count, epoch)
    shape = np.full(count, height), np.full(count, width)
    return crop_boxes(*keys, *shape, seed=seed, augment=augment or Augment())


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (64, 64), (100, 400)], ids=str)
def test_boxes_are_distributed_as_torchvisions(shape):
    augment = Augment()
    ours = boxes_of(4000, *shape, augment=augment)
    blank = torch.empty(1, *shape)
    theirs = np.array([RandomResizedCrop.get_params(blank, augment.scale, augment.ratio) for _ in range(4000)])
    statistics = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
    }
    for name, statistic in statistics.items():
        assert ks_2samp(statistic(ours), statistic(theirs)).pvalue > 1e-3, name


@pytest.mark.parametrize("shape", [(1, 1000), (1000, 1), (2, 900), (900, 2)], ids=str)
def test_fallback_is_torchvisions(shape):
    blank = torch.empty(1, *shape)
    theirs = RandomResizedCrop.get_params(blank, [0.9, 1.0], [3 / 4, 4 / 3])
    assert boxes_of(1, *shape, augment=Augment(scale=(0.9, 1.0)))[0].tolist() == list(theirs)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 1 << 48))
def test_boxes_lie_inside(height, width, sample_id):
    keys = np.array([sample_id % (1 << 48)]), np.array([0])
    box = crop_boxes(*keys, np.array([height]), np.array([width]), seed=1, augment=Augment())
    top, left, crop_h, crop_w = box[0]
    assert crop_h >= 1
    assert crop_w >= 1
    assert 0 <= top <= height - crop_h
    assert 0 <= left <= width - crop_w


@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (1000, 1), (65500, 65500)], ids=str)
def test_extreme_sizes(shape):
    top, left, crop_h, crop_w = boxes_of(500, *shape).T
    assert (crop_h >= 1).all()
    assert (crop_w >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + crop_h <= shape[0]).all()
    assert (left + crop_w <= shape[1]).all()


def test_a_box_depends_on_its_own_key_only():
    sizes = np.array([300, 40, 900, 64]), np.array([200, 700, 901, 64])
    ids, epochs = np.array([5, 9, 1 << 40, 5]), np.array([0, 0, 3, 1])
    together = crop_boxes(ids, epochs, *sizes, seed=7, augment=Augment())
    for j in range(4):
        row = slice(j, j + 1)
        alone = crop_boxes(ids[row], epochs[row], sizes[0][row], sizes[1][row], seed=7, augment=Augment())
        assert np.array_equal(alone[0], together[j])


def test_boxes_change_with_seed_epoch_and_sample():
    base = boxes_of(100, 300, 400)
    assert (boxes_of(100, 300, 400, seed=1) != base).any(1).mean() > 0.95
    assert (boxes_of(100, 300, 400, epoch=1) != base).any(1).mean() > 0.95
    assert len(np.unique(base, axis=0)) > 95


@pytest.mark.parametrize("probability", [0.0, 0.5, 0.2, 1.0])
def test_flips_have_their_probability(probability):
    ids = np.arange(20_000)
    both = flips(ids, np.zeros_like(ids), seed=0, augment=Augment(hflip=probability, vflip=probability))
    for flipped in both.sum(0):
        if probability in (0.0, 1.0):
            assert flipped == probability * len(ids)
        else:
            expected = len(ids) * np.array([probability, 1 - probability])
            assert chisquare([flipped, len(ids) - flipped], expected).pvalue > 1e-3
    # Independent of each other, or half of the orientations would never be seen.
    assert abs((both[:, 0] & both[:, 1]).mean() - probability**2) < 0.02


def test_vertical_flips_are_off_unless_asked_for():
    ids = np.arange(1000)
    left_right, top_bottom = flips(ids, ids, seed=0, augment=Augment()).T
    assert 400 < left_right.sum() < 600
    assert not top_bottom.any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.2)),
        ("scale", (0.2, 1.1)),
        ("ratio", (0.0, 1.0)),
        ("ratio", (2.0, 1.0)),
        ("hflip", -0.1),
        ("hflip", 1.5),
        ("vflip", 1.5),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Augment(**{field: value})
