"""The masked autoencoder and its presets; see :mod:`fastmae.model.blocks` for its parts."""

from fastmae.model.ablations import AblatedMAE
from fastmae.model.image_model import ACTIVATION_CHECKPOINTING, IMAGENET_MEAN, IMAGENET_STD
from fastmae.model.mae import RESIDUAL_DTYPES, MAEOutput, MaskedAutoencoderViT
from fastmae.model.presets import (
    PRESETS,
    build_model,
    create_model,
    mae_vit_base_patch16,
    mae_vit_huge_patch14,
    mae_vit_large_patch16,
    mae_vit_small_patch16,
    mae_vit_tiny_patch16,
)

__all__ = [
    "ACTIVATION_CHECKPOINTING",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PRESETS",
    "RESIDUAL_DTYPES",
    "AblatedMAE",
    "MAEOutput",
    "MaskedAutoencoderViT",
    "build_model",
    "create_model",
    "mae_vit_base_patch16",
    "mae_vit_huge_patch14",
    "mae_vit_large_patch16",
    "mae_vit_small_patch16",
    "mae_vit_tiny_patch16",
]
