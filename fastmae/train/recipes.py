"""Recipes: complete configurations that give the flags of ``fastmae pretrain`` their defaults."""

from __future__ import annotations

from fastmae.train.config import DataConfig, ModelConfig, PretrainConfig, RecipeName, TrainConfig

PHOTOGRAPHS = PretrainConfig(
    recipe="photographs",
    model=ModelConfig(
        name="mae_vit_tiny_patch16",
        img_size=64,
        patch_size=8,
        embed_dim=128,
        depth=3,
        num_heads=4,
        decoder_embed_dim=192,
        decoder_depth=1,
        decoder_num_heads=6,
    ),
    # Fourteen photographs are soon known by heart: smaller crops and vertical flips make more of them.
    data=DataConfig(scale=(0.1, 1.0), vflip=0.25),
    train=TrainConfig(
        global_batch_size=32,
        steps=4200,
        warmup_steps=200,
        base_lr=1.2e-2,
        # Two threads on two cores are a quarter faster alone, and tens of times slower as soon as anything else runs:
        # each waits for the other at every operation.
        num_threads=1,
        max_minutes=3.9,
        log_every_steps=50,
        checkpoint_every_seconds=30.0,
        keep_checkpoints=2,
    ),
)
"""A small model on the embedded photographs: minutes on two CPU cores. The time limit keeps that true on slow ones."""


def _imagenet(recipe: RecipeName, name: str, batch_size: int) -> PretrainConfig:
    """Table 8 of the paper, with the normalised pixels of its best models and of facebookresearch/mae's command."""
    return PretrainConfig(
        recipe=recipe,
        model=ModelConfig(name=name, norm_pix_loss=True),
        train=TrainConfig(
            global_batch_size=4096,
            batch_size=batch_size,
            epochs=800,
            warmup_epochs=40,
            base_lr=1.5e-4,
            weight_decay=0.05,
            betas=(0.9, 0.95),
        ),
    )


RECIPES: dict[str, PretrainConfig] = {
    "photographs": PHOTOGRAPHS,
    "imagenet-vit-b": _imagenet("imagenet-vit-b", "mae_vit_base_patch16", 256),
    "imagenet-vit-l": _imagenet("imagenet-vit-l", "mae_vit_large_patch16", 256),
    "imagenet-vit-h": _imagenet("imagenet-vit-h", "mae_vit_huge_patch14", 128),
}
