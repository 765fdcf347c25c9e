"""Weights as facebookresearch/mae stores them, and its models in plain PyTorch, which a file is checked with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmae import reference
from fastmae.model import MaskedAutoencoderViT
from fastmae.model.image_model import NORM_EPS, ImageModel

ARGS = ("norm_pix_loss", "num_heads", "decoder_num_heads", "mean", "std")
"""What a file says under ``args`` and shapes do not: facebookresearch's files the first, fastmae's exports all."""


class PlainEncoder(nn.Module):
    """The encoder without masking, or a classifier, on the reference's modules: what ``models_vit.py`` computes.

    Has no op of fastmae's, so it runs, compiles and exports anywhere.
    """

    def __init__(self, architecture: Mapping[str, Any], norm_eps: float = NORM_EPS):
        super().__init__()
        dim, heads, ratio = (architecture[name] for name in ("embed_dim", "num_heads", "mlp_ratio"))
        patch_size, classes = tuple(architecture["patch_size"]), architecture.get("num_classes")
        grid = [size // patch for size, patch in zip(architecture["img_size"], patch_size, strict=True)]
        self.average = architecture.get("pool") == "avg"
        self.patch_embed = reference.PatchEmbed(patch_size, architecture["in_chans"], dim)
        self.prefix = int(architecture.get("class_token", True))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if self.prefix else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        self.blocks = nn.ModuleList(reference.Block(dim, heads, ratio) for _ in range(architecture["depth"]))
        self.norm = nn.Identity() if self.average else nn.LayerNorm(dim)
        self.fc_norm = nn.LayerNorm(dim) if self.average else nn.Identity()
        self.head = nn.Linear(dim, classes) if classes else nn.Identity()
        self.classifies = bool(classes)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps

    def tokens(self, images: Tensor) -> Tensor:
        """All tokens (N, 1 + L, D) of normalised images (N, C, H, W), as ``encode`` of fastmae's models."""
        x = self.patch_embed(images)
        if self.cls_token is not None:  # shape[0], since torch.export makes a constant of len()
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.pos_embed[:, 1 - self.prefix :]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of a classifier, else all tokens (N, 1 + L, D)."""
        x = self.tokens(images)
        if not self.classifies:
            return x
        return self.head(self.fc_norm(x[:, self.prefix :].mean(1)) if self.average else x[:, 0])


def weights_of(model: ImageModel) -> dict[str, Tensor]:
    """A model's weights under facebookresearch's names, without a decoder that was never loaded."""
    if getattr(model, "has_decoder", True):
        return model.state_dict()
    return {n: t for n, t in model.state_dict().items() if not is_decoder(n)}


def is_decoder(name: str) -> bool:
    """Whether a parameter is of pretraining alone: of the decoder, or a mask token, wherever it enters."""
    return name.startswith("decoder_") or name.endswith("mask_token")


def write(model: ImageModel, path: Path) -> None:
    """Write a ``.pth`` file: the weights under ``model``, and under ``args`` what their shapes do not say.

    Raises:
        ValueError: facebookresearch's code does not take such images; names the size.
    """
    _check_square(model)
    decodes = getattr(model, "has_decoder", False)
    if decodes and model.in_chans != 3:
        raise ValueError(f"facebookresearch's decoder takes images of 3 channels, these weights {model.in_chans}")
    args = {name: model.architecture[name] for name in ARGS if name in model.architecture}
    if not decodes:
        args = {name: value for name, value in args.items() if name not in ("norm_pix_loss", "decoder_num_heads")}
    torch.save({"model": weights_of(model), "args": args}, path)


def outputs(path: Path, model: ImageModel, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """What facebookresearch's model computes from the file, loaded with ``strict=True``."""
    weights = torch.load(path, weights_only=True)["model"]
    encoder = PlainEncoder(model.architecture)
    if not getattr(model, "has_decoder", False):
        encoder.load_state_dict(weights, strict=True)
        found = {"encoder tokens": encoder.tokens(images)}
        return found if isinstance(model, MaskedAutoencoderViT) else found | {"logits": encoder(images)}
    known = {n: v for n, v in model.architecture.items() if n not in ("mean", "std", "norm_eps")}
    sizes = {name: tuple(known.pop(name)) for name in ("img_size", "patch_size")}
    peer = reference.MaskedAutoencoder(**sizes, **known)
    peer.load_state_dict(weights, strict=True)
    in_order = torch.arange(noise.shape[1], dtype=noise.dtype).expand_as(noise)
    loss, predictions, _ = peer(images, noise=noise)
    tokens = peer.forward_encoder(images, 0.0, in_order)[0]
    return {"encoder tokens": tokens, "predictions": predictions, "loss": loss}


def _check_square(model: ImageModel) -> None:
    for name in ("img_size", "patch_size"):
        height, width = getattr(model, name)
        if height != width:
            raise ValueError(f"facebookresearch's code takes square images and patches, {name} is {height} x {width}")
