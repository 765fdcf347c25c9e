"""Weighted nearest neighbours in feature space: how well features separate classes, with nothing trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    if k < 1 or not temperature > 0:
        raise ValueError(f"k and temperature: expected positive numbers, got {k} and {temperature}")
    num_classes = class_count(labels, num_classes)
    known = F.normalize(bank.float(), dim=1)
    scores = torch.zeros(len(queries), num_classes, device=bank.device)
    for start in range(0, len(queries), _CHUNK):
        similarity = F.normalize(queries[start : start + _CHUNK].float(), dim=1) @ known.T
        nearest, ids = similarity.topk(min(k, len(bank)), dim=1)
        shares = (nearest / temperature).softmax(1)
        scores[start : start + _CHUNK].scatter_add_(1, labels[ids], shares)
    return scores.log_()


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


def class_count(labels: Tensor, num_classes: int | None) -> int:
    """K, given or from the labels; refuses labels that are not from 0 to K - 1."""
    smallest, largest = int(labels.min()), int(labels.max())
    count = largest + 1 if num_classes is None else num_classes
    if smallest < 0 or largest >= count:
        raise ValueError(f"labels: expected classes from 0 to {count - 1}, got {smallest} to {largest}")
    return count
