"""Sizes of the named models, and the statistics of ImageNet's pixels."""

from __future__ import annotations

from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Encoders of the paper (section 4; ViT, table 1) and its default decoder (section 4.1). The paper has no tiny and no
# small model: their encoders are DeiT's, their decoders keep the paper's head width of 32.
_PAPER_DECODER = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
PRESETS: dict[str, dict[str, Any]] = {
    "mae_vit_tiny_patch16": {
        "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3,
        "decoder_embed_dim": 128, "decoder_depth": 4, "decoder_num_heads": 4,
    },
    "mae_vit_small_patch16": {
        "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6,
        "decoder_embed_dim": 256, "decoder_depth": 4, "decoder_num_heads": 8,
    },
    "mae_vit_base_patch16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **_PAPER_DECODER},
    "mae_vit_large_patch16": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, **_PAPER_DECODER},
    "mae_vit_huge_patch14": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16, **_PAPER_DECODER},
}  # fmt: skip
