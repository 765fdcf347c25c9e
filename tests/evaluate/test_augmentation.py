"""Augmentation of labelled images: functions of (seed, epoch, image), with timm's operations and the papers' shares."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut
from torch import Tensor

from fastmae.evaluate import augmentation
from fastmae.evaluate.augmentation import (
    OPERATIONS,
    BatchAugment,
    draw_erasing,
    draw_mixing,
    draw_operations,
    mix,
    randaugment,
    smoothed_targets,
)
from fastmae.train.classification import LabelledDataConfig

IDS, EPOCHS = np.arange(5, 13), np.full(8, 3)
RESAMPLED = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}
NONE = LabelledDataConfig(randaugment=0, erasing=0, mixup=0, cutmix=0, label_smoothing=0)


def images(count: int = 8) -> Tensor:
    """Noise over a slope, channels last in memory, as a loader hands images out."""
    noise = torch.randint(0, 60, (count, 24, 32, 3), generator=torch.Generator().manual_seed(0))
    slope = torch.arange(32)[None, None, :, None] * 5 + torch.tensor([0, 20, 35])
    return (noise + slope).clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2)


def test_a_pair_of_images_is_augmented_alike_in_any_batch():
    augment = BatchAugment(7, 4, LabelledDataConfig(erasing=1.0))  # and the rest of Table 9
    labels, normalized = IDS % 4, lambda x: x * 2 - 1
    whole, targets = augment(images(), labels, IDS, EPOCHS, normalized)
    for start in range(0, 8, 2):
        rows = slice(start, start + 2)
        part = augment(images()[rows], labels[rows], IDS[rows], EPOCHS[rows], normalized)
        assert torch.equal(part[0], whole[rows])
        assert torch.equal(part[1], targets[rows])
    assert whole.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    other = augment(images(), labels, IDS, EPOCHS + 1, normalized)
    assert not torch.equal(other[0], whole)


def test_without_augmentation_a_batch_stays_as_the_loader_made_it():
    batch = images()
    found, targets = BatchAugment(0, 4, NONE)(batch, IDS % 4, IDS, EPOCHS, lambda x: x)
    assert torch.equal(found, batch)
    assert found.dtype == torch.uint8
    assert targets.tolist() == torch.eye(4)[IDS % 4].tolist()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_timm(name):
    """But for rounding and, of resampled images, a row of pixels at the border."""
    from timm.data import auto_augment as timm

    level, photograph = 0.9, Image.fromarray(astronaut()).resize((64, 48), Image.Resampling.BICUBIC)
    timm_name = {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"}.get(name, name)
    increasing = {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}
    timm_name += "Increasing" if name in increasing else ""
    options = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BILINEAR}
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None]
    found = set()
    for sign in (-1.0, 1.0):
        arguments = [torch.full((1, 1, 1, 1), value) for value in (level, sign)]
        ours = OPERATIONS[name](pixels, *arguments).round().clamp(0, 255)[0].permute(1, 2, 0).numpy()
        to_args, apply = timm.LEVEL_TO_ARG[timm_name], timm.NAME_TO_OP[timm_name]
        random.seed(0)
        errors = []
        for _ in range(10):  # timm draws the sign
            values = to_args(10 * level, {}) if to_args else ()
            theirs = np.asarray(apply(photograph, *values, **options))
            errors.append(np.abs(ours - theirs.astype(float)).mean())
        assert min(errors) < (1.5 if name in RESAMPLED else 0.6), errors
        found.add(ours.tobytes())
    signed = RESAMPLED | {"Color", "Contrast", "Brightness", "Sharpness"}
    assert len(found) == 1 + (name in signed)


def test_operations_are_drawn_as_often_and_as_strong_as_the_table_says():
    ids = np.arange(20_000)
    operations, levels, signs = draw_operations(0, np.zeros_like(ids), ids, 9.0, 0.5)
    assert operations.shape == (20_000, 2)
    counts = np.bincount(operations.ravel() + 1, minlength=16) / operations.size
    assert abs(counts[0] - 0.5) < 0.01  # none
    np.testing.assert_allclose(counts[1:], 0.5 / 15, atol=0.003)
    assert abs(levels.mean() - 0.9) < 0.01
    assert abs(levels.std() - 0.05) < 0.005
    assert levels.max() == 1.0
    assert abs(signs.mean()) < 0.02


def test_an_image_gets_its_own_operations(monkeypatch):
    copied, copy = [], augmentation.to_device
    monkeypatch.setattr(augmentation, "to_device", lambda *arguments: copied.append(1) or copy(*arguments))
    invert, solarize = (list(OPERATIONS).index(name) for name in ("Invert", "Solarize"))
    operations = np.array([[-1, -1], [invert, -1], [invert, invert], [solarize, -1]])
    batch = images(4)
    found = randaugment(batch, operations, np.full((4, 2), 1.0), np.ones((4, 2)))
    assert torch.equal(found[0], batch[0])
    assert torch.equal(found[1], 255 - batch[1])
    assert torch.equal(found[2], batch[2])
    assert torch.equal(found[3], 255 - batch[3])  # at the highest level all pixels are above the threshold
    assert len(copied) == 1 + 2  # to a GPU: levels, and one per layer however many operations there are


def test_a_rectangle_of_some_images_is_erased():
    ids = np.arange(20_000)
    boxes, seeds = draw_erasing(0, np.zeros_like(ids), ids, (24, 32), 0.25)
    erased = boxes[:, 2] > 0
    assert abs(erased.mean() - 0.25) < 0.01
    shares = boxes[erased, 2] * boxes[erased, 3] / (24 * 32)
    assert 0.01 < shares.min() < 0.03
    assert 0.3 < shares.max() < 0.36
    assert (boxes[:, :2] + boxes[:, 2:] <= (24, 32)).all()
    assert len(np.unique(seeds)) > 19_000


def test_shares_are_drawn_from_beta_and_the_target_follows_the_pixels():
    ids, epochs, size = np.arange(40_000), np.zeros(40_000, np.int64), (24, 32)
    shares, boxes = draw_mixing(0, epochs, ids, size, 0.8, 1.0)
    assert (shares[::2] == shares[1::2]).all()
    cut = boxes[:, 2] > 0
    assert abs(cut.mean() - 0.5) < 0.02
    mixed = draw_mixing(0, epochs, ids, size, 0.8, 0.0)[0]
    assert abs(mixed.mean() - 0.5) < 0.01
    assert abs(mixed.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.005  # of Beta(0.8, 0.8)
    some = np.flatnonzero(cut)[:8:2] // 2 * 2
    rows = np.stack([some, some + 1], 1).ravel()
    plain = torch.tensor([0.0, 1.0]).repeat(4).view(8, 1, 1, 1).expand(8, 3, *size)
    found, targets = mix(plain, torch.eye(2).repeat(4, 1), shares[rows], boxes[rows])
    torch.testing.assert_close(found.mean((1, 2, 3)), targets[:, 1])


def test_targets_are_smoothed_and_an_unknown_class_has_none():
    found = smoothed_targets(torch.tensor([2, -1]), 4, 0.1)
    torch.testing.assert_close(found[0], torch.tensor([0.025, 0.025, 0.925, 0.025]))
    assert found[1].tolist() == [0, 0, 0, 0]
