"""Models by name, and from the architecture that a checkpoint describes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fastmae.model.ablations import OPTIONS, AblatedMAE
from fastmae.model.mae import MaskedAutoencoderViT

# The paper's encoders (section 4; ViT, table 1) and its default decoder (section 4.1). It has no tiny or small model:
# those encoders are DeiT's, and their decoders keep the paper's 32 channels per head.
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


def build_model(architecture: Mapping[str, Any]) -> MaskedAutoencoderViT:
    """The model of ``MaskedAutoencoderViT.architecture``, or of an :class:`AblatedMAE`'s."""
    options = {name: value for name, value in architecture.items() if name in OPTIONS and value != OPTIONS[name]}
    rest = {name: value for name, value in architecture.items() if name not in OPTIONS}
    if options or rest.get("decoder_depth") == 0:
        return AblatedMAE(**rest, **options)
    return MaskedAutoencoderViT(**rest)


def create_model(name: str, **overrides: Any) -> MaskedAutoencoderViT:
    """A preset by name, with any argument of :class:`MaskedAutoencoderViT` overridden; None keeps the preset's value.

    Arguments of :class:`AblatedMAE` that are not at their defaults give one of those.

    Raises:
        ValueError: an unknown name (the message lists the presets), or what the constructor raises.
    """
    if name not in PRESETS:
        raise ValueError(f"name: unknown model {name!r}; the presets are {', '.join(PRESETS)}")
    return build_model(PRESETS[name] | {key: v for key, v in overrides.items() if v is not None})


mae_vit_tiny_patch16 = partial(create_model, "mae_vit_tiny_patch16")
mae_vit_small_patch16 = partial(create_model, "mae_vit_small_patch16")
mae_vit_base_patch16 = partial(create_model, "mae_vit_base_patch16")
mae_vit_large_patch16 = partial(create_model, "mae_vit_large_patch16")
mae_vit_huge_patch14 = partial(create_model, "mae_vit_huge_patch14")
