"""What the protocols on a frozen encoder share: labelled splits as tensors, a held-out part to choose settings on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastmae.evaluate.labelled import number_labels

Setting = TypeVar("Setting")
_TOP = 5


class Split(NamedTuple):
    """Images to learn from and images to test on, as what an encoder makes of them.

    Attributes:
        inputs: (n, ...), features or tokens to learn from; tokens may be on another device than the labels.
        labels: int64 (n,), classes from 0 to K - 1.
        tests: (m, ...).
        test_labels: int64 (m,); -1 for a class that no image to learn from has, which counts as misclassified.
        num_classes: K.
    """

    inputs: Tensor
    labels: Tensor
    tests: Tensor
    test_labels: Tensor
    num_classes: int

    def held_out(self, seed: int, share: float = 0.1) -> Split:
        """The images to learn from, a share of them to test on, drawn within each class; none of the test images.

        Settings are chosen on this split, so that the test images are looked at once. A class of a single image stays
        among those to learn from.
        """
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed)).to(self.labels.device)
        shuffled = order[self.labels[order].argsort(stable=True)]
        counts = self.labels.bincount(minlength=self.num_classes)
        place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[self.labels[shuffled]]
        # At least one image of each class, rounded to the share otherwise.
        held = place < (counts * share).round().clamp(min=1).minimum(counts - 1)[self.labels[shuffled]]
        known, tests = shuffled[~held], shuffled[held]
        if not len(tests):
            raise ValueError(
                "expected a class of at least two images to learn from, to choose settings on, found one image of "
                "each; give the settings: --k and --temperature, --l2, or --lr"
            )
        rows = known.to(self.inputs.device), tests.to(self.inputs.device)
        return Split(
            self.inputs[rows[0]], self.labels[known], self.inputs[rows[1]], self.labels[tests], self.num_classes
        )


def split_of(
    inputs: Tensor, labels: np.ndarray, readable: Tensor, tests: Tensor, test_labels: np.ndarray, test_readable: Tensor
) -> Split:
    """A split of the images that could be read, their classes numbered from 0.

    Args:
        inputs, tests: what the encoder made of n images to learn from and of m to test on, on one device.
        labels, test_labels: int64 (n,) and (m,), their classes by the same numbers, whatever these are.
        readable, test_readable: bool (n,) and (m,), on the device that is to have the labels.

    Raises:
        ValueError: no readable image, a single class to learn from, a number of labels that does not fit, or inputs
            that are not finite.
    """
    for name, given, rows in (("to learn from", labels, readable), ("to test on", test_labels, test_readable)):
        if len(given) != len(rows):
            raise ValueError(f"expected a label for each of {len(rows)} images {name}, got {len(given)}")
        if not bool(rows.any()):
            raise ValueError(f"none of the {len(rows)} images {name} could be read")
    classes, targets = np.unique(labels[readable.cpu().numpy()], return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"expected images of at least two classes to learn from, got only class {classes[0]}")
    test_targets = number_labels(classes, test_labels[test_readable.cpu().numpy()])
    # Tokens may take most of the memory: no copy where none is needed.
    pairs = (inputs, readable), (tests, test_readable)
    inputs, tests = (x if bool(rows.all()) else x[rows.to(x.device)] for x, rows in pairs)
    check_finite(inputs)
    check_finite(tests)
    targets, test_targets = (torch.from_numpy(v).to(readable.device) for v in (targets, test_targets))
    return Split(inputs, targets, tests, test_targets, len(classes))


def choose(
    settings: Sequence[Setting], judge: Callable[[Split, Setting], dict[str, Any]], split: Split, seed: int
) -> Setting:
    """The setting of the highest ``top1`` on held-out images to learn from, the first of equal ones.

    Raises:
        ValueError: there are several, and no images can be held out.
    """
    if len(settings) == 1:
        return settings[0]
    inner = split.held_out(seed)
    return max(settings, key=lambda setting: judge(inner, setting)["top1"])


def accuracies(scores: Tensor, split: Split) -> dict[str, Any]:
    """``top1`` and, with more than five classes, ``top5`` on the test images, as shares."""
    found = {"top1": top_k_accuracy(scores, split.test_labels)}
    if split.num_classes > _TOP:
        found["top5"] = top_k_accuracy(scores, split.test_labels, _TOP)
    return found


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """The share of rows whose class is among the ``k`` with the highest scores.

    Of equal scores that of the earlier class counts as the higher one. A class whose score is -inf, which got no vote
    at all, is never a hit.

    Args:
        scores: floating (m, K), larger for likelier classes.
        labels: int64 (m,); a class that is not among the K counts as missed.
        k: at least 1.

    Raises:
        ValueError: no rows, or not a label for each.
    """
    if scores.ndim != 2 or len(scores) == 0 or labels.shape != scores.shape[:1]:
        raise ValueError(
            f"scores and labels: expected shapes (m, K) and (m,) with m at least 1, got {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}"
        )
    highest, order = scores.sort(dim=1, descending=True, stable=True)
    hits = (order == labels[:, None]) & (highest > -torch.inf)
    return float(hits[:, :k].any(1).double().mean())


def check_labelled(name: str, features: Tensor, labels: Tensor) -> None:
    """Refuse features without rows, or without a label a row."""
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{name}: expected shape (n, D) with n at least 1, got {tuple(features.shape)}")
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected int64 of shape ({len(features)},), got {labels.dtype} of {tuple(labels.shape)}"
        )


def check_finite(features: Tensor) -> None:
    """Refuse infinities and NaN; a few rows at a time, since what this compares is larger than the features."""
    if not all(bool(rows.isfinite().all()) for rows in features.split(1024)):
        raise ValueError("features: expected finite numbers, got some that are not")


def class_count(labels: Tensor, num_classes: int | None) -> int:
    """K, given or from the labels; refuses labels that are not from 0 to K - 1."""
    smallest, largest = int(labels.min()), int(labels.max())
    count = largest + 1 if num_classes is None else num_classes
    if smallest < 0 or largest >= count:
        raise ValueError(f"labels: expected classes from 0 to {count - 1}, got {smallest} to {largest}")
    return count
