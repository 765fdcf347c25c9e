"""The fast masked autoencoder; its parts are in :mod:`fastmae.model.blocks`."""

from fastmae.model.mae import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRESETS,
    RESIDUAL_DTYPES,
    MAEOutput,
    MaskedAutoencoderViT,
    create_model,
    mae_vit_base_patch16,
    mae_vit_huge_patch14,
    mae_vit_large_patch16,
    mae_vit_small_patch16,
    mae_vit_tiny_patch16,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PRESETS",
    "RESIDUAL_DTYPES",
    "MAEOutput",
    "MaskedAutoencoderViT",
    "create_model",
    "mae_vit_base_patch16",
    "mae_vit_huge_patch14",
    "mae_vit_large_patch16",
    "mae_vit_small_patch16",
    "mae_vit_tiny_patch16",
]
