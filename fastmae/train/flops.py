"""Floating-point operations of a training step, counted from the model's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmae.train.scaling.sizes import architecture_sizes
from fastmae.train.scaling.work import flops_per_batch, flops_per_image


def step_flops(architecture: Mapping[str, Any], batch_size: int, mask_ratio: float) -> int:
    """FLOPs of the matrix products of one forward and backward on the training path (``full_pred=False``).

    A product of (m, k) and (k, n) counts 2 m k n, once forward and twice backward; the pixels need no gradient.
    Attention counts its two products, as if its scores were kept. What the model leaves out is not counted: patches
    that are hidden from the encoder, mask tokens' projections in the first decoder block but once a batch, and queries,
    MLP and pixels of visible patches in the last one. Norms, activations, the optimiser and what activation
    checkpointing computes again are not counted.

    Args:
        architecture: ``MaskedAutoencoderViT.architecture``.
        batch_size: masked images N; an image masked R times counts R times.
        mask_ratio: share of the patches that is masked.
    """
    sizes = architecture_sizes(architecture)
    return batch_size * flops_per_image(sizes, mask_ratio).model + flops_per_batch(sizes)
