"""Linear probes of frozen features: logistic regression on cached ones, and the paper's (Table 10), a layer behind a
batch norm without parameters that LARS trains in large batches on random crops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmae.evaluate.frozen import Split, accuracies, check_finite, check_labelled, choose, class_count

# ---------------------------------------------------------------------------------------------------------------------
# Logistic regression, fitted to its optimum

L2 = 1e-2
"""Strength of the penalty that :func:`fit_linear` puts on the weights."""
_MOST_ITERATIONS = 200
_ROWS = 1 << 16
"""Images whose logits are in memory at a time."""
PENALTIES = tuple(10.0**exponent for exponent in range(-6, 2))


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
    check_finite(features)
    std, mean = torch.std_mean(features, 0, correction=0)
    std = std.clamp_min(1e-6)
    x = (features - mean).div_(std)
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
        penalty = l2 / 2 * weight.square().sum()
        penalty.backward()
        # Some rows at a time: logits may be larger than features. Summed in float64: over a million rows float32 rounds
        # by more than a line search looks for, above all where CUDA adds them one after the other.
        total = penalty.detach().double()
        for rows, classes in zip(x.split(_ROWS), labels.split(_ROWS), strict=True):
            losses = F.cross_entropy(F.linear(rows, weight, bias), classes, reduction="none")
            loss = losses.sum(dtype=torch.float64) / len(x)
            loss.backward()
            total += loss.detach()
        return total

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearClassifier(mean, std, weight.detach(), bias.detach())


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


# ---------------------------------------------------------------------------------------------------------------------
# Table 10

BASE_LR = {"lars": 0.1, "sgd": 0.1}
GLOBAL_BATCH = {"lars": 16_384, "sgd": 4_096}
"""Table 10; the smaller batch is for plain SGD, which does not bear the larger."""


def create_head(dim: int, num_classes: int) -> nn.Sequential:
    """Batch norm without parameters and a linear layer, drawn with a standard deviation of 0.01."""
    linear = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear)


def learning_rate(epoch: float, *, epochs: int, warmup_epochs: int, base_lr: float, batch_size: int) -> float:
    """Linear warm-up from 0, then half a cosine to 0; ``base_lr`` is for a batch of 256."""
    peak = base_lr * batch_size / 256
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak / 2 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def fit_linear_probe(
    batches: Iterator[tuple[Tensor, Tensor]],
    dim: int,
    num_classes: int,
    *,
    images: int,
    device: torch.device,
    optimizer: Literal["lars", "sgd"] = "lars",
    epochs: int = 90,
    warmup_epochs: int = 10,
    base_lr: float | None = None,
    batch_size: int | None = None,
    on_batch: Callable[[Tensor], None] = lambda loss: None,
) -> nn.Sequential:
    """Train a head on features of random crops.

    Args:
        batches: endless, features (N, D) and labels (N,): a new crop of each image in every pass.
        images: in one pass.
        optimizer: momentum 0.9, no weight decay. LARS (timm's) is used without its clip, as in the paper's code.
        base_lr: for a batch of 256; None: ``BASE_LR``.
        batch_size: images per update, accumulated over as many of ``batches`` as it takes; None: ``GLOBAL_BATCH``, or
            all images if there are fewer.
        on_batch: called with each batch's loss, on the device.

    Returns:
        The head, in evaluation mode.
    """
    batch_size = min(batch_size or GLOBAL_BATCH[optimizer], images)
    head = create_head(dim, num_classes).to(device)
    kind = _lars() if optimizer == "lars" else torch.optim.SGD
    update = kind(head.parameters(), lr=0.0, momentum=0.9, weight_decay=0.0)
    seen, pending = 0, 0
    schedule = {"epochs": epochs, "warmup_epochs": warmup_epochs, "batch_size": batch_size}
    schedule["base_lr"] = BASE_LR[optimizer] if base_lr is None else base_lr
    while seen < epochs * images:
        features, labels = next(batches)
        loss = F.cross_entropy(head(features), labels)
        (loss * (len(labels) / batch_size)).backward()
        seen, pending = seen + len(labels), pending + len(labels)
        if pending >= batch_size:
            update.param_groups[0]["lr"] = learning_rate(seen / images, **schedule)
            update.step()
            update.zero_grad(set_to_none=True)
            pending = 0
        on_batch(loss.detach())
    return head.eval()


def _lars() -> type[torch.optim.Optimizer]:
    try:
        from timm.optim import Lars
    except ImportError as error:
        raise ValueError("--solver lars needs timm: pip install 'fastmae[eval]'") from error
    return Lars
