"""Floating-point operations of a training step, counted from the model's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

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


class StepFlops:
    """FLOPs of an optimiser step over all ranks, as :func:`step_flops` counts them, of images as large as they are now.

    Args:
        model: a ``MaskedAutoencoderViT``; its ``input_size`` may change.
        batch_size: masked images of one forward pass.
        passes: forward passes of a step, over all ranks.
        mask_ratio: share of the patches that is masked.
    """

    def __init__(self, model: nn.Module, batch_size: int, passes: int, mask_ratio: float) -> None:
        self._model, self._batch_size, self._passes, self._mask_ratio = model, batch_size, passes, mask_ratio
        self._counted: dict[tuple[int, int], int] = {}

    def __call__(self) -> int:
        size = self._model.input_size
        if size not in self._counted:
            architecture = self._model.architecture | {"img_size": size}
            self._counted[size] = self._passes * step_flops(architecture, self._batch_size, self._mask_ratio)
        return self._counted[size]
