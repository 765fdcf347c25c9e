"""Which labelled images features are judged on: always the same ones, spread over the whole data set."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

from fastmae.data import Dataset

logger = logging.getLogger(__name__)

_LOOKED_AT = 40_000
"""Images whose labels are looked up at least, where a data set has so many: some may have none."""
HELD_OUT = 10
"""One image of so many is tested on, where there are no others to test on."""


class LabelledImages(NamedTuple):
    """Some images of a data set, and the classes they are of."""

    dataset: Dataset
    sample_ids: np.ndarray
    """int64 (n,)."""
    labels: np.ndarray
    """int64 (n,), numbers as the data set has them."""

    def take(self, rows: np.ndarray) -> LabelledImages:
        """Those rows, by number or as a mask."""
        return LabelledImages(self.dataset, self.sample_ids[rows], self.labels[rows])


def choose_labelled(dataset: Dataset, count: int) -> LabelledImages:
    """Up to ``count`` images that have a label and are not known to be bad, evenly spread over the data set's order.

    Classes lie next to each other there, so that each gets its share. No random number is involved: the same data set
    gives the same images.

    Raises:
        ValueError: ``count`` is not positive, or no image has a label.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    ids = _spread(len(dataset), max(4 * count, _LOOKED_AT))
    labels = dataset.labels(ids)
    usable = (labels >= 0) & ~dataset.is_bad(ids)
    if not usable.any():
        raise ValueError(
            f"the images of {dataset.name} have no labels; expected a folder per class, .cls members in shards, or a "
            "list file with a class after each path"
        )
    rows = np.flatnonzero(usable)
    rows = rows[_spread(len(rows), count)]
    return LabelledImages(dataset, ids[rows], labels[rows])


def hold_out(images: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """Every tenth image to test on, the others to learn from.

    Returns:
        Those to learn from, and those to test on.

    Raises:
        ValueError: fewer than ten images.
    """
    tests = np.arange(len(images.labels)) % HELD_OUT == HELD_OUT - 1
    if not tests.any():
        raise ValueError(f"expected at least {HELD_OUT} labelled images to hold some out, got {len(images.labels)}")
    return images.take(~tests), images.take(tests)


def match_classes(known: LabelledImages, tests: LabelledImages, *, strict: bool = False) -> LabelledImages:
    """Test images of another data set, with the classes' numbers of the one to learn from.

    Classes are the same if their names are; where neither data set has names, if their numbers are.

    Args:
        strict: raise where a test image is of a class that is not known; otherwise it is left out, with a warning.

    Raises:
        ValueError: one has names and the other numbers, or no class is in both.
    """
    names, others = known.dataset.classes, tests.dataset.classes
    if bool(names) != bool(others):
        with_names, without = (known, tests) if names else (tests, known)
        raise ValueError(
            f"expected the same classes in {known.dataset.name} and {tests.dataset.name}, but "
            f"{with_names.dataset.name} has names of classes and {without.dataset.name} only numbers"
        )
    if names:
        numbers = {name: i for i, name in enumerate(names)}
        translation = np.full(max(len(others), tests.labels.max() + 1), -1)  # a shard may name classes beyond the list
        translation[: len(others)] = [numbers.get(name, -1) for name in others]
        labels = translation[tests.labels]
    else:
        labels = np.where(np.isin(tests.labels, known.labels), tests.labels, -1)
    if not (labels >= 0).any():
        raise ValueError(
            f"expected classes of {known.dataset.name} ({_some(known)}) in {tests.dataset.name}, got {_some(tests)}"
        )
    unknown = tests.take(labels < 0)
    if len(unknown.labels):
        text = f"{_some(unknown)} in {len(unknown.labels):,} of {len(tests.labels):,} images"
        if strict:
            raise ValueError(f"expected only classes of {known.dataset.name} in {tests.dataset.name}, got {text}")
        logger.warning(
            "%s: images of classes that %s lacks are left out: %s", tests.dataset.name, known.dataset.name, text
        )
    return tests._replace(labels=labels).take(labels >= 0)


def number_labels(classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The places of labels among sorted classes, int64; -1 for a label that is not among them."""
    places = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
    return np.where(classes[places] == labels, places, -1)


def _some(images: LabelledImages) -> str:
    labels = np.unique(images.labels)
    names = images.dataset.classes
    shown = [names[i] if i < len(names) else str(i) for i in labels[:3].tolist()]
    return ", ".join(shown) + (", ..." if len(labels) > 3 else "")


def _spread(total: int, count: int) -> np.ndarray:
    """At most ``count`` of the numbers below ``total``, in equal distances, from 0 on."""
    count = min(count, total)
    return np.arange(count) * total // count
