"""The paper's linear probe (Table 10): a linear layer behind a batch norm without parameters, on random crops of the
training images, trained by LARS in large batches while the encoder stays frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    on_batch: Callable[[float], None] = lambda loss: None,
) -> nn.Sequential:
    """Train a head on features of random crops.

    Args:
        batches: endless, features (N, D) and labels (N,): a new crop of each image in every pass.
        images: in one pass.
        optimizer: momentum 0.9, no weight decay. LARS (timm's) is used without its clip, as in the paper's code.
        base_lr: for a batch of 256; None: ``BASE_LR``.
        batch_size: images per update, accumulated over as many of ``batches`` as it takes; None: ``GLOBAL_BATCH``, or
            all images if there are fewer.
        on_batch: called with each batch's loss.

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
        on_batch(float(loss.detach()))
    return head.eval()


def _lars() -> type[torch.optim.Optimizer]:
    try:
        from timm.optim import Lars
    except ImportError as error:
        raise ValueError("--solver lars needs timm: pip install 'fastmae[eval]'") from error
    return Lars
