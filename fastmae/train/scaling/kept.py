"""Bytes that one image keeps in memory on fastmae's path on CUDA tensors, and what activation checkpointing spares.

They follow what the ops save, tensor by tensor; a test counts the same on the ops themselves, exactly. What a batch
keeps once whatever its size (weights, the table of mask tokens) is not in them.
"""

from __future__ import annotations

from typing import NamedTuple

from fastmae.train.scaling.sizes import BlockShape, Sizes, block_shapes
from fastmae.train.scaling.work import INDEX, WIDE, Attention, Checkpointing, check_checkpointing


class Kept(NamedTuple):
    """Bytes an image."""

    activations: int
    """From the forward to the backward."""
    transient: int
    """More, at the worst moment of the backward: an estimate."""


def kept_per_image(
    sizes: Sizes,
    mask_ratio: float = 0.75,
    *,
    compute_bytes: int = 2,
    residual_bytes: int = 4,
    attention: Attention = "fused",
    activation_checkpointing: Checkpointing = "none",
) -> Kept:
    """What an image more in the batch keeps in memory.

    Args:
        sizes: of the model.
        mask_ratio: share of masked patches.
        compute_bytes: of a value in matrix products: 2 in bf16 and fp16, 4 in fp32.
        residual_bytes: of a value of the residual stream.
        attention: "fused" keeps a number a row, "plain" the matrix of scores.
        activation_checkpointing: what is kept: with "none" all, with "selective" all but what attention needs, with
            "full" what goes into each block.
    """
    check_checkpointing(activation_checkpointing)
    c, r = compute_bytes, residual_bytes
    kept, masked = sizes.num_kept(mask_ratio), sizes.num_patches - sizes.num_kept(mask_ratio)
    width, decoder = sizes.embed_dim, sizes.decoder_embed_dim
    shapes = list(block_shapes(sizes, mask_ratio))
    inside = [_kept_by_block(shape, c, r, attention) for shape in shapes]
    # Patches; the encoder's last norm, the decoder's, with statistics; predictions and their indices.
    ends = kept * c * sizes.patch_values
    ends += (1 + kept) * (r * width + 2 * WIDE) + masked * (r * decoder + 2 * WIDE)
    ends += masked * (c * sizes.patch_values + INDEX) + sizes.num_patches * INDEX
    ends += masked * INDEX  # where the decoder's last block looks for its rows
    transient = max(_transient_of_mlp(shape, c, r) for shape in shapes)
    if activation_checkpointing == "none":
        return Kept(ends + sum(inside), transient)
    first = [number in (0, sizes.depth) for number in range(len(shapes))]
    if activation_checkpointing == "selective":
        spared = [
            kept_by_attention(b, c, r, attention) - input_of_attention(b, c, r, f)
            for b, f in zip(shapes, first, strict=True)
        ]
        # When a block's attention is computed again, what its MLP kept is free.
        again = (
            s - kept_by_mlp(b, c, r) + _transient_of_attention(b, c, r) for s, b in zip(spared, shapes, strict=True)
        )
        return Kept(ends + sum(inside) - sum(spared), max(transient, *again))
    inputs = sum(_input_of_block(b, c, r, f) for b, f in zip(shapes, first, strict=True))
    return Kept(ends + inputs, transient + max(inside))


def _kept_by_block(b: BlockShape, c: int, r: int, attention: Attention) -> int:
    return kept_by_attention(b, c, r, attention) + kept_by_mlp(b, c, r)


def kept_by_attention(b: BlockShape, c: int, r: int, attention: Attention) -> int:
    """By the block's first half."""
    norm = r * b.width + 2 * WIDE  # a row of the stream, its mean and its standard deviation
    scores = b.heads * (b.keys * c if attention == "plain" else WIDE)  # of a row of queries
    attended = b.queries * (c * b.width + scores)
    if b.kind == "queries":
        return b.keys * (norm + 2 * c * b.width) + b.queries * (norm + c * b.width) + attended
    return b.projected * norm + b.keys * 3 * c * b.width + attended


def kept_by_mlp(b: BlockShape, c: int, r: int) -> int:
    """The stream before its norm, statistics, its hidden layer."""
    return b.queries * (r * b.width + 2 * WIDE + c * b.hidden)


def input_of_attention(b: BlockShape, c: int, r: int, first: bool) -> int:
    """The branch of the block before; the stream is what that block's second norm keeps anyway. Of the decoder's first
    block the visible tokens."""
    if b.kind == "shared":
        return b.projected * r * b.width
    return b.keys * (r if first else c) * b.width


def _input_of_block(b: BlockShape, c: int, r: int, first: bool) -> int:
    if b.kind == "shared":
        return (b.keys + b.projected) * r * b.width
    return b.keys * (r if first else r + c) * b.width


def _transient_of_mlp(b: BlockShape, c: int, r: int) -> int:
    """In the backward of the MLP: gradients of the stream and of the branch, of what was activated and of what was
    not, and the activated values."""
    return b.queries * ((r + c) * b.width + 3 * c * b.hidden)


def _transient_of_attention(b: BlockShape, c: int, r: int) -> int:
    """In the backward of queries, keys and values: their gradients, those of the normalised rows, the normalised rows
    and the gradients of the stream before and after."""
    return b.keys * (2 * r + 5 * c) * b.width
