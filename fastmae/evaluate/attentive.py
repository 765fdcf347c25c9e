"""Attentive probing: a few learned queries attend to the frozen patch tokens, and a linear layer classifies.

The class token and the mean of the tokens are not what masked autoencoding trains, so a linear layer on them says less
about an encoder of this kind than about others. The pool is that of efficient probing (Psomas et al., "Attention,
Please! Revisiting Attentive Probing Through the Lens of Efficiency", 2025): queries are learned, keys are the tokens
themselves, and each query pools a slice of the values' channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmae.evaluate.frozen import Split, accuracies, choose

LEARNING_RATES = (1e-3, 3e-3, 1e-2)


class AttentivePool(nn.Module):
    """Tokens (N, L, D) to logits (N, K).

    Args:
        dim: D.
        num_classes: K.
        num_queries: Q, must divide D; query ``i`` pools the values' channels from ``i * D / Q`` on.

    Raises:
        ValueError: ``num_queries`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_classes: int, num_queries: int = 12):
        super().__init__()
        if num_queries < 1 or dim % num_queries:
            raise ValueError(f"num_queries: expected a divisor of the width {dim}, got {num_queries}")
        self.queries = nn.Parameter(torch.randn(num_queries, dim) * dim**-0.5)
        self.values = nn.Linear(dim, dim)
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, K) of tokens (N, L, D)."""
        weights = torch.einsum("qd,nld->nql", self.queries, tokens).mul(tokens.shape[-1] ** -0.5).softmax(-1)
        values = self.values(tokens).unflatten(-1, (len(self.queries), -1))
        return self.head(self.norm(torch.einsum("nql,nlqc->nqc", weights, values).flatten(1)))


def fit_attentive(
    tokens: Tensor, labels: Tensor, num_classes: int, *, lr: float, epochs: int, batch_size: int = 256,
    num_queries: int = 12, seed: int = 0,
) -> AttentivePool:  # fmt: skip
    """Train a pool on cached tokens, by AdamW with a cosine schedule.

    Args:
        tokens: (n, L, D), float16 or wider, on any device; batches go to the labels' device.
        labels: int64 (n,).
        lr: peak learning rate for a batch of 256.
        epochs: passes over the tokens.
        seed: of the initial values and of the order.
    """
    device, generator = labels.device, torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pool = AttentivePool(tokens.shape[-1], num_classes, num_queries).to(device)
    batch_size = min(batch_size, len(tokens))
    per_epoch = max(1, len(tokens) // batch_size)
    optimizer = torch.optim.AdamW(pool.parameters(), lr=lr * batch_size / 256, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    pinned = device.type == "cuda" and tokens.device.type == "cpu"
    memory = {"dtype": tokens.dtype, "device": tokens.device, "pin_memory": pinned}
    pool.train()
    for _ in range(epochs):
        order = torch.randperm(len(tokens), generator=generator)[: per_epoch * batch_size]
        parts = order.to(tokens.device).split(batch_size), labels[order.to(device)].split(batch_size)
        for rows, classes in zip(*parts, strict=True):
            # Gathered on the host while the device trains on the batch before, and copied in the tokens' own dtype.
            batch = torch.empty(batch_size, *tokens.shape[1:], **memory)
            torch.index_select(tokens, 0, rows, out=batch)
            loss = F.cross_entropy(pool(batch.to(device, non_blocking=True).float()), classes)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return pool.eval()


@torch.no_grad()
def attentive_scores(pool: AttentivePool, tokens: Tensor, *, batch_size: int = 1024) -> Tensor:
    """Logits, float32 (m, K), of tokens (m, L, D)."""
    device = pool.queries.device
    return torch.cat([pool(part.to(device).float()) for part in tokens.split(batch_size)])


def evaluate_attentive(
    split: Split, *, lr: float | None = None, epochs: int = 30, num_queries: int = 12, seed: int = 0
) -> dict[str, Any]:
    """Accuracy of attentive probing.

    Args:
        split: patch tokens (n, L, D) and (m, L, D).
        lr: peak learning rate for a batch of 256; None: chosen among ``LEARNING_RATES``.
        epochs, num_queries, seed: as for :func:`fit_attentive`.
    """
    options = {"epochs": epochs, "num_queries": num_queries, "seed": seed}

    def judge(split: Split, lr: float) -> dict[str, Any]:
        pool = fit_attentive(split.inputs, split.labels, split.num_classes, lr=lr, **options)
        return accuracies(attentive_scores(pool, split.tests), split)

    lr = choose(LEARNING_RATES if lr is None else [lr], judge, split, seed)
    return judge(split, lr) | {"lr": lr, **options}
