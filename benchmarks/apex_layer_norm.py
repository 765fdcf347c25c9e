"""The LayerNorm of NVIDIA's apex, where it is built. The package of that name on PyPI is another one."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def missing(device: torch.device) -> str | None:
    """Why it cannot run here, or None."""
    if device.type != "cuda":
        return "apex's LayerNorm is for CUDA"
    if find_spec("apex") is None:
        return "NVIDIA's apex is not installed"
    try:
        import fused_layer_norm_cuda  # noqa: F401
        from apex.normalization import FusedLayerNorm  # noqa: F401
    except Exception as error:  # an unrelated package, or extensions that were built for another torch
        return f"NVIDIA's apex does not load: {error}"
    return None


def apply(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last axis of ``x`` (..., D)."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return fused_layer_norm_affine(x, weight, bias, (x.shape[-1],), eps)


class LayerNorm(torch.nn.LayerNorm):
    """``nn.LayerNorm`` through apex."""

    def forward(self, x: Tensor) -> Tensor:
        return apply(x, self.weight, self.bias, self.eps)
