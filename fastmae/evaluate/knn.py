"""Weighted nearest neighbours in feature space: how well features separate classes, with nothing trained."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmae.evaluate.frozen import Split, accuracies, check_labelled, choose, class_count

NEIGHBOURS, TEMPERATURES = (5, 10, 20, 50, 100, 200), (0.02, 0.07, 0.2)
_CHUNK = 1024
"""Queries that are compared with the whole bank at once, which bounds the memory."""


@torch.no_grad()
def knn_scores(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    num_classes: int | None = None,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """What the ``k`` most similar images of a bank vote for.

    Similarity is the cosine; each neighbour votes for its class with ``exp(similarity / temperature)``.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section
    3.4; DINO (Caron et al., ICCV 2021) evaluates with these values of ``k`` and ``temperature``.

    Args:
        bank: floating (n, D), the features that are known.
        labels: int64 (n,), their classes, from 0.
        queries: floating (m, D).
        num_classes: K; None for one more than the largest label.
        k: neighbours that vote; all of the bank if it is smaller.
        temperature: of the votes; the smaller it is, the more the nearest decides.

    Returns:
        float32 (m, K): the logarithm of each class's share of the votes, -inf where no neighbour is of the class.

    Raises:
        ValueError: an empty bank, shapes or labels that do not fit, or ``k`` or ``temperature`` not positive.
    """
    check_labelled("bank", bank, labels)
    if queries.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(f"queries: expected shape (m, {bank.shape[1]}) like the bank, got {tuple(queries.shape)}")
    _check_setting(k, temperature)
    num_classes = class_count(labels, num_classes)
    return _votes(*_nearest(bank, labels, queries, k), num_classes, k, temperature)


def _check_setting(k: int, temperature: float) -> None:
    if k < 1 or not temperature > 0:
        raise ValueError(f"k and temperature: expected positive numbers, got {k} and {temperature}")


def _nearest(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities (m, k) of the nearest images of the bank, the nearest first, and their classes."""
    known = F.normalize(bank.float(), dim=1)
    similarities = (F.normalize(part.float(), dim=1) @ known.T for part in queries.split(_CHUNK))
    found = [similarity.topk(min(k, len(bank)), dim=1) for similarity in similarities]
    return torch.cat([values for values, _ in found]), labels[torch.cat([ids for _, ids in found])]


def _votes(similarity: Tensor, classes: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """What the first ``k`` of the neighbours vote for, as :func:`knn_scores`."""
    shares = (similarity[:, :k] / temperature).softmax(1)
    return similarity.new_zeros(len(similarity), num_classes).scatter_add_(1, classes[:, :k], shares).log_()


def evaluate_knn(
    split: Split, *, k: int | None = None, temperature: float | None = None, seed: int = 0
) -> dict[str, Any]:
    """Accuracy of weighted nearest neighbours (:func:`knn_scores`).

    Args:
        split: features (n, D) and (m, D).
        k, temperature: None: chosen among ``NEIGHBOURS`` (those below n) and ``TEMPERATURES``.
        seed: of the images held out.
    """
    numbers = [n for n in NEIGHBOURS if n <= len(split.labels)] or [1] if k is None else [k]
    settings = list(product(numbers, TEMPERATURES if temperature is None else [temperature]))
    _check_setting(*settings[0])

    @lru_cache(maxsize=1)
    def nearest(split: Split) -> tuple[Tensor, Tensor]:
        """Most of the work, and the same for all settings."""
        return _nearest(split.inputs, split.labels, split.tests, max(numbers))

    def judge(split: Split, setting: tuple[int, float]) -> dict[str, Any]:
        return accuracies(_votes(*nearest(split), split.num_classes, *setting), split)

    setting = choose(settings, judge, split, seed)
    return judge(split, setting) | {"k": setting[0], "temperature": setting[1]}
