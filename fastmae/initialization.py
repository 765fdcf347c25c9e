"""The paper's initialisation, each parameter on its own: the same weights whoever draws them, and in whatever order."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int) -> None:
    """The paper's initialisation (appendix A.1), each parameter drawn on its own by :func:`draw_parameter`.

    Parameters that are not trained (position tables) are left alone; those on the meta device are skipped.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_meta:
            parameter.copy_(draw_parameter(name, parameter.shape, seed))


def draw_parameter(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The initial value of a parameter, float32 on the CPU.

    Matrices (the patch projection flattened to one) are Xavier-uniform, biases zero, LayerNorm scales one, tokens
    normal with a standard deviation of 0.02. This is facebookresearch/mae's initialisation except for one vector: it
    leaves the bias of the patch projection at ``nn.Conv2d``'s default, uniform within 1 / sqrt(patch values), because
    its initialiser only visits linear layers. Here it is zero, as in ViT's official code, which the paper follows.

    The generator is keyed by ``(seed, parameter name)``, so that a parameter's value does not depend on the order of
    construction, on the device, or on which process draws it.
    """
    value = torch.empty(shape, device="cpu")
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if name.endswith("token"):
        return value.normal_(std=0.02, generator=generator)
    if value.ndim > 1:
        nn.init.xavier_uniform_(value.flatten(1), generator=generator)
        return value
    return value.fill_(1.0 if "norm" in name.split(".")[-2] and name.endswith("weight") else 0.0)
