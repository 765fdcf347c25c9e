"""Floating-point operations of a training step, counted from the model's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmae.ops._check import num_kept


def step_flops(architecture: Mapping[str, Any], batch_size: int, mask_ratio: float) -> int:
    """FLOPs of the matrix products of one forward and backward on the training path (``full_pred=False``).

    A product of (m, k) and (k, n) counts 2 m k n, once forward and twice backward; the pixels need no gradient.
    Attention counts its two products, as if its scores were kept. What the model leaves out is not counted: patches
    that are hidden from the encoder, mask tokens' projections in the first decoder block but once a batch, and queries,
    MLP and pixels of visible patches in the last one. Norms, activations and the optimiser are not matrix products.

    Args:
        architecture: ``MaskedAutoencoderViT.architecture``.
        batch_size: masked images N; an image masked R times counts R times.
        mask_ratio: share of the patches that is masked.
    """
    a = architecture
    (height, width), (patch_h, patch_w) = a["img_size"], a["patch_size"]
    patches = (height // patch_h) * (width // patch_w)
    pixels = patch_h * patch_w * a["in_chans"]
    kept = num_kept(patches, mask_ratio)
    masked, encoder, decoder = patches - kept, a["embed_dim"], a["decoder_embed_dim"]

    def block(dim: int, rows: int, queries: int) -> int:
        """Products of a block for one image: keys and values of all rows, the rest of the queries' rows only."""
        hidden = int(dim * a["mlp_ratio"])
        projections = 2 * rows * dim * 2 * dim + 2 * 2 * queries * dim * dim
        return projections + 2 * 2 * queries * rows * dim + 2 * 2 * queries * dim * hidden

    embed = 2 * kept * pixels * encoder
    image = a["depth"] * block(encoder, 1 + kept, 1 + kept) + 2 * (1 + kept) * encoder * decoder
    image += (a["decoder_depth"] - 1) * block(decoder, 1 + patches, 1 + patches)
    image += block(decoder, 1 + patches, masked) + 2 * masked * decoder * pixels
    once = 0
    if a["decoder_depth"] > 1:
        mask_token = 2 * decoder * 3 * decoder  # queries, keys and values of one mask token
        image -= masked * mask_token
        once = patches * mask_token
    return batch_size * (3 * image + 2 * embed) + 3 * once
