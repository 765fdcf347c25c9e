"""What the protocols on a frozen encoder share: labelled splits as tensors, a held-out part to choose settings on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastmae.evaluate.knn import top_k_accuracy
from fastmae.evaluate.labelled import LabelledImages

Setting = TypeVar("Setting")
_TOP = 5


class Split(NamedTuple):
    """Images to learn from and images to test on, as what an encoder makes of them.

    Attributes:
        inputs: (n, ...), features or tokens to learn from.
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
        return Split(self.inputs[known], self.labels[known], self.inputs[tests], self.labels[tests], self.num_classes)


def split_of(
    known: LabelledImages, inputs: Tensor, readable: Tensor, tests: LabelledImages, test_inputs: Tensor,
    test_readable: Tensor,
) -> Split:  # fmt: skip
    """A split of readable images, classes numbered from 0.

    Args:
        known, tests: the images, classes by the same numbers.
        inputs, test_inputs: what the encoder made of them, rows in their order.
        readable, test_readable: bool (n,) and (m,), images that could be read.

    Raises:
        ValueError: no readable image, or a single class to learn from.
    """
    for name, rows in (("to learn from", readable), ("to test on", test_readable)):
        if not bool(rows.any()):
            raise ValueError(f"none of the {len(rows)} images {name} could be read")
    good, test_good = readable.cpu(), test_readable.cpu()
    classes, labels = np.unique(known.labels[good.numpy()], return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"expected images of at least two classes to learn from, got only class {classes[0]}")
    given = tests.labels[test_good.numpy()]
    places = np.searchsorted(classes, given).clip(max=len(classes) - 1)
    test_labels = np.where(classes[places] == given, places, -1)
    device = inputs.device
    numbers = (torch.from_numpy(values.astype(np.int64)).to(device) for values in (labels, test_labels))
    labels, test_labels = numbers
    rows = good.to(device), test_good.to(device)
    return Split(inputs[rows[0]], labels, test_inputs[rows[1]], test_labels, len(classes))


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
