"""Operations that one image costs on fastmae's path, and what activation checkpointing repeats of them.

What a batch needs once whatever its size (the projection of the mask tokens) is not in the numbers an image.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from fastmae.train.scaling.sizes import BlockShape, Sizes, block_shapes, expect

Attention = Literal["fused", "plain"]
Checkpointing = Literal["none", "selective", "full"]

WIDE = 4
"""Bytes of a float32: statistics, logarithms of sums, weights, gradients, optimiser states."""
INDEX = 8
"""Bytes of an index."""


class Flops(NamedTuple):
    """Of matrix products, two for a multiply-add."""

    forward: int
    backward: int
    recomputed: int
    """What activation checkpointing computes again."""

    @property
    def model(self) -> int:
        """What the mathematics needs, as MFU counts it."""
        return self.forward + self.backward

    @property
    def executed(self) -> int:
        """What the device computes. Scores that fused attention makes again are its own affair and not counted."""
        return self.forward + self.backward + self.recomputed


def flops_per_image(sizes: Sizes, mask_ratio: float = 0.75, activation_checkpointing: Checkpointing = "none") -> Flops:
    """Of the training path (``full_pred=False``), for one image more in the batch."""
    check_checkpointing(activation_checkpointing)
    kept, masked = sizes.num_kept(mask_ratio), sizes.num_patches - sizes.num_kept(mask_ratio)
    width, decoder = sizes.embed_dim, sizes.decoder_embed_dim
    shapes = list(block_shapes(sizes, mask_ratio))
    blocks = sum(_attention_flops(b) + 2 * 2 * b.queries * b.width * b.hidden for b in shapes)
    # The last product of what is repeated is left out.
    again = {
        "none": 0,
        "selective": sum(_attention_flops(b) - 2 * b.queries * b.width**2 for b in shapes),
        "full": blocks - sum(2 * b.queries * b.width * b.hidden for b in shapes),
    }
    pixels = 2 * kept * sizes.patch_values * width
    rest = 2 * (1 + kept) * width * decoder + 2 * masked * decoder * sizes.patch_values
    forward = blocks + pixels + rest
    # Two products in the backward for each of the forward, but one for the pixels': they need no gradient.
    return Flops(forward, 2 * forward - pixels, again[activation_checkpointing])


def check_checkpointing(activation_checkpointing: str) -> None:
    """Raise ``ValueError`` unless it is one of the three."""
    expect(
        activation_checkpointing in ("none", "selective", "full"),
        "activation_checkpointing",
        "none, selective or full",
        activation_checkpointing,
    )


def flops_per_batch(sizes: Sizes) -> int:
    """What a batch costs once: queries, keys and values of the mask tokens, forward and backward."""
    return 0 if sizes.decoder_depth == 1 else 3 * 2 * sizes.num_patches * 3 * sizes.decoder_embed_dim**2


def _attention_flops(b: BlockShape) -> int:
    """Of a block's first half, the projections included."""
    if b.kind == "queries":
        projections = 2 * b.projected * 2 * b.width**2 + 2 * b.queries * b.width**2
    else:
        projections = 2 * b.projected * 3 * b.width**2
    attention = 2 * 2 * b.queries * b.keys * b.width
    return projections + attention + 2 * b.queries * b.width**2
