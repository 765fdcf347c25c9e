"""The protocols on cached features: nearest neighbours and logistic regression.

Settings are chosen on held-out images to learn from, never on the test images.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from fastmae.evaluate.frozen import Split, accuracies, choose
from fastmae.evaluate.knn import knn_scores
from fastmae.evaluate.linear_probe import fit_linear

NEIGHBOURS, TEMPERATURES = (5, 10, 20, 50, 100, 200), (0.02, 0.07, 0.2)
PENALTIES = tuple(10.0**exponent for exponent in range(-6, 2))


def evaluate_knn(
    split: Split, *, k: int | None = None, temperature: float | None = None, seed: int = 0
) -> dict[str, Any]:
    """Accuracy of weighted nearest neighbours (:func:`knn_scores`).

    Args:
        split: features (n, D) and (m, D).
        k, temperature: None: chosen among ``NEIGHBOURS`` (those below n) and ``TEMPERATURES``.
        seed: of the images held out.
    """

    def judge(split: Split, setting: tuple[int, float]) -> dict[str, Any]:
        options = {"num_classes": split.num_classes, "k": setting[0], "temperature": setting[1]}
        return accuracies(knn_scores(split.inputs, split.labels, split.tests, **options), split)

    numbers = [n for n in NEIGHBOURS if n <= len(split.labels)] or [1] if k is None else [k]
    setting = choose(list(product(numbers, TEMPERATURES if temperature is None else [temperature])), judge, split, seed)
    return judge(split, setting) | {"k": setting[0], "temperature": setting[1]}


def evaluate_logistic(split: Split, *, l2: float | None = None, seed: int = 0) -> dict[str, Any]:
    """Accuracy of multinomial logistic regression on standardised features (:func:`fit_linear`).

    Args:
        split: features (n, D) and (m, D).
        l2: penalty of the weights; None: chosen among ``PENALTIES``.
        seed: of the images held out.
    """

    def judge(split: Split, penalty: float) -> dict[str, Any]:
        classifier = fit_linear(split.inputs, split.labels, num_classes=split.num_classes, l2=penalty)
        return accuracies(classifier.scores(split.tests), split)

    l2 = choose(PENALTIES if l2 is None else [l2], judge, split, seed)
    return judge(split, l2) | {"l2": l2}
