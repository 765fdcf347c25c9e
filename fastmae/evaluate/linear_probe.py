"""A linear classifier on frozen features, fitted to its optimum."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmae.evaluate.knn import check_labelled, class_count

L2 = 1e-2
"""Strength of the penalty that :func:`fit_linear` puts on the weights."""
_MOST_ITERATIONS = 200


class LinearClassifier(NamedTuple):
    """A linear layer on standardised features."""

    mean: Tensor
    """(D,), subtracted from features."""
    std: Tensor
    """(D,), that they are divided by."""
    weight: Tensor
    """(K, D)."""
    bias: Tensor
    """(K,)."""

    def scores(self, features: Tensor) -> Tensor:
        """Logits, float32 (m, K), of features (m, D)."""
        return F.linear((features.float() - self.mean) / self.std, self.weight, self.bias)


def fit_linear(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    l2: float = L2,
    max_iterations: int = _MOST_ITERATIONS,
) -> LinearClassifier:
    """Multinomial logistic regression on standardised features, by full-batch L-BFGS.

    Minimises the mean cross-entropy plus ``l2 / 2`` times the sum of squared weights (biases are free), which has one
    minimum: no learning rate, no order of batches, no random start. Features are standardised first, each by its own
    mean and standard deviation over the rows, as the batch norm without scale and shift does that facebookresearch/mae
    puts before its linear head. Computed where the features are.

    Args:
        features: floating (n, D).
        labels: int64 (n,), classes from 0.
        num_classes: K; None for one more than the largest label.
        l2: the penalty; scikit-learn's ``LogisticRegression`` calls ``1 / (l2 * n)`` C.
        max_iterations: of L-BFGS, at most.

    Raises:
        ValueError: no features, shapes or labels that do not fit, features that are not finite, or a negative ``l2``.
    """
    check_labelled("features", features, labels)
    if l2 < 0:
        raise ValueError(f"l2: expected at least 0, got {l2}")
    num_classes = class_count(labels, num_classes)
    features = features.detach().float()
    if not bool(features.isfinite().all()):
        raise ValueError("features: expected finite numbers, got some that are not")
    std, mean = torch.std_mean(features, 0, correction=0)
    std = std.clamp_min(1e-6)
    x = (features - mean) / std
    weight = torch.zeros(num_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearClassifier(mean, std, weight.detach(), bias.detach())
