"""Crop boxes and flips against torchvision's RandomResizedCrop; crop modes; factors of the colour jitter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from loading import smooth
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import RandomResizedCrop

from fastmae.data import Augment, crop_boxes, flips
from fastmae.data.augment import jitter_factors, jitter_into


def boxes_of(count: int, height: int, width: int, *, seed=0, epoch=0, **augment) -> np.ndarray:
    keys = np.arange(count), np.full(count, epoch)
    shape = np.full(count, height), np.full(count, width)
    return crop_boxes(*keys, *shape, seed=seed, augment=Augment(**augment))


@pytest.mark.parametrize("shape", [(375, 500), (64, 64), (100, 400)], ids=str)
def test_boxes_are_distributed_as_torchvisions(shape):
    augment, blank = Augment(), torch.empty(1, *shape)
    ours = boxes_of(2000, *shape).T
    theirs = [RandomResizedCrop.get_params(blank, augment.scale, augment.ratio) for _ in range(2000)]
    for name, statistic in {
        "area": lambda top, left, height, width: height * width,
        "aspect": lambda top, left, height, width: width / height,
        "top": lambda top, left, height, width: top,
        "left": lambda top, left, height, width: left,
    }.items():
        assert ks_2samp(statistic(*ours), statistic(*np.array(theirs).T)).pvalue > 1e-3, name


def test_the_fallback_for_extreme_shapes_is_torchvisions():
    for shape in [(1, 1000), (1000, 1), (2, 900), (900, 2)]:
        theirs = RandomResizedCrop.get_params(torch.empty(1, *shape), [0.9, 1.0], [3 / 4, 4 / 3])
        assert boxes_of(1, *shape, scale=(0.9, 1.0))[0].tolist() == list(theirs)


def test_boxes_lie_inside():
    random = np.random.default_rng(0)
    heights, widths = np.exp(random.uniform(0, np.log(65_500), (2, 20_000))).astype(np.int64)
    heights[:4], widths[:4] = [1, 1, 1000, 65_500], [1, 1000, 1, 65_500]
    ids = random.integers(0, 1 << 48, 20_000)
    top, left, crop_h, crop_w = crop_boxes(ids, ids * 0, heights, widths, seed=1, augment=Augment()).T
    assert min(top.min(), left.min()) == 0
    assert min(crop_h.min(), crop_w.min()) >= 1
    assert (top + crop_h <= heights).all()
    assert (left + crop_w <= widths).all()


def test_a_box_depends_on_seed_epoch_and_sample_alone():
    sizes = np.array([300, 40, 900, 64]), np.array([200, 700, 901, 64])
    ids, epochs = np.array([5, 9, 1 << 40, 5]), np.array([0, 0, 3, 1])
    together = crop_boxes(ids, epochs, *sizes, seed=7, augment=Augment())
    for j in range(4):
        row = slice(j, j + 1)
        alone = crop_boxes(ids[row], epochs[row], sizes[0][row], sizes[1][row], seed=7, augment=Augment())
        assert np.array_equal(alone[0], together[j])
    base = boxes_of(100, 300, 400)
    assert (boxes_of(100, 300, 400, seed=1) != base).any(1).mean() > 0.95
    assert (boxes_of(100, 300, 400, epoch=1) != base).any(1).mean() > 0.95
    assert len(np.unique(base, axis=0)) > 95


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_flips_have_their_probability(probability):
    ids = np.arange(20_000)
    both = flips(ids, ids * 0, seed=0, augment=Augment(hflip=probability, vflip=probability))
    for flipped in both.sum(0):
        if probability in (0.0, 1.0):
            assert flipped == probability * len(ids)
        else:
            expected = len(ids) * np.array([probability, 1 - probability])
            assert chisquare([flipped, len(ids) - flipped], expected).pvalue > 1e-3
    # Independent of each other, or half of the orientations would never be seen.
    assert abs((both[:, 0] & both[:, 1]).mean() - probability**2) < 0.02


def test_vertical_flips_are_off_by_default():
    ids = np.arange(1000)
    left_right, top_bottom = flips(ids, ids, seed=0, augment=Augment()).T
    assert 400 < left_right.sum() < 600
    assert not top_bottom.any()


def test_a_fixed_crop_has_the_training_size_s_aspect_and_lies_anywhere():
    ids = np.arange(4000)
    heights, widths = np.full(4000, 300), np.full(4000, 500)

    def boxes(crop, **size):
        return crop_boxes(ids, ids * 0, heights, widths, seed=0, augment=Augment(crop=crop), **size)

    square = boxes("fixed", img_size=(224, 224))
    assert (square[:, 2:] == 300).all()
    assert (square[:, 0] == 0).all()
    left = square[:, 1]
    assert (left.min(), left.max()) == (0, 200)
    assert abs(left.mean() - 100) < 4
    assert (boxes("fixed", img_size=(100, 200))[:, 2:] == (250, 500)).all()
    assert (boxes("center", img_size=(100, 200)) == (25, 0, 250, 500)).all()
    with pytest.raises(ValueError, match="img_size"):
        boxes("fixed")


def test_jitter_is_drawn_evenly_and_by_key():
    ids = np.arange(20_000)
    factors = jitter_factors(ids, ids * 0, seed=0, augment=Augment(color_jitter=0.4))
    low, high = [0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1]
    assert np.allclose(factors.min(0), low, atol=1e-3)
    assert np.allclose(factors.max(0), high, atol=1e-3)
    assert np.allclose(factors.mean(0), np.add(low, high) / 2, atol=5e-3)
    assert np.abs(np.corrcoef(factors.T) - np.eye(4)).max() < 0.03
    [row] = jitter_factors(ids[7:8], ids[:1], seed=0, augment=Augment(color_jitter=0.4))
    assert np.array_equal(row, factors[7])
    assert (jitter_factors(ids, ids * 0 + 1, seed=0, augment=Augment(color_jitter=0.4)) != factors).all(1).mean() > 0.99
    assert jitter_factors(ids, ids, seed=0, augment=Augment()) is None
    assert jitter_factors(ids, ids, seed=0, augment=Augment(color_jitter=2))[:, :3].min() >= 0


def test_jitter_changes_what_its_factors_name():
    image = smooth(40, 50, 0)

    def jittered(*factors):
        out = image.copy()
        jitter_into(out, np.array(factors, dtype=np.float64))
        return out.astype(int)

    assert np.abs(jittered(1, 1, 1, 0) - image).mean() < 3  # there and back through hue in 8 bits
    assert np.abs(jittered(0.5, 1, 1, 0) - image * 0.5).mean() < 3
    grey = jittered(1, 1, 0, 0)
    assert np.abs(grey - grey.mean(2, keepdims=True)).max() <= 1
    assert jittered(1, 0, 1, 0).std() < 1
    turned = jittered(1, 1, 1, 1 / 3)
    assert np.abs(turned - np.roll(image.astype(int), 1, 2)).mean() < 6  # red to green, green to blue, blue to red


def test_values_out_of_range_are_refused():
    refused = {
        "scale": [(0.0, 1.0), (0.5, 0.2), (0.2, 1.1)],
        "ratio": [(0.0, 1.0), (2.0, 1.0)],
        "hflip": [-0.1, 1.5],
        "vflip": [1.5],
        "crop": ["centre"],
        "color_jitter": [-0.1, 2.1],
    }
    for field, values in refused.items():
        for value in values:
            with pytest.raises(ValueError, match=field):
                Augment(**{field: value})
