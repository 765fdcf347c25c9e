"""What one image costs: operations, bytes kept for the backward, bytes moved. Of fastmae's path on CUDA tensors.

"Kept" follows what the ops save, tensor by tensor; a test counts the same on the ops themselves, exactly. "Moved"
leaves out what is small, and stays within a few per cent of the count in ``docs/step.md``. What a batch needs once
whatever its size (weights and their gradients, the projection of the mask tokens) is in none of the numbers an image.
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
    mlps = sum(2 * 2 * shape.queries * shape.width * shape.hidden for shape in shapes)
    blocks = mlps + sum(_attention_flops(shape) for shape in shapes)
    pixels = 2 * kept * sizes.patch_values * width
    rest = 2 * (1 + kept) * width * decoder + 2 * masked * decoder * sizes.patch_values
    forward = blocks + pixels + rest
    # Two products in the backward for each of the forward, but one for the pixels': they need no gradient.
    return Flops(
        forward, 2 * forward - pixels, {"none": 0, "selective": mlps, "full": blocks}[activation_checkpointing]
    )


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
        activation_checkpointing: what is kept: with "none" all, with "selective" all but the MLPs' hidden layers, with
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
    transient = max(_transient_of_block(shape, c, r) for shape in shapes)
    if activation_checkpointing == "none":
        return Kept(ends + sum(inside), transient)
    if activation_checkpointing == "selective":
        hidden = [_hidden_of_block(shape, c, r) for shape in shapes]
        spared = sum(h - _input_of_mlp(shape, c, r) for h, shape in zip(hidden, shapes, strict=True))
        return Kept(ends + sum(inside) - spared, transient + max(hidden))
    inputs = sum(_input_of_block(shape, c, r, first=number in (0, sizes.depth)) for number, shape in enumerate(shapes))
    return Kept(ends + inputs, transient + max(inside))


def _kept_by_block(b: BlockShape, c: int, r: int, attention: Attention) -> int:
    norm = r * b.width + 2 * WIDE  # a row of the stream, its mean and its standard deviation
    scores = b.heads * (b.keys * c if attention == "plain" else WIDE)  # of a row of queries
    row = c * b.width + scores + norm + c * b.hidden  # attended, scores, second norm, first layer of the MLP
    if b.kind == "queries":
        return b.keys * (norm + 2 * c * b.width) + b.queries * (norm + c * b.width + row)
    return b.projected * norm + b.keys * 3 * c * b.width + b.queries * row


def _hidden_of_block(b: BlockShape, c: int, r: int) -> int:
    """What the MLP keeps: the stream before its norm, statistics, its hidden layer."""
    return b.queries * (r * b.width + 2 * WIDE + c * b.hidden)


def _input_of_mlp(b: BlockShape, c: int, r: int) -> int:
    """Attention's branch; the stream is what the first norm keeps anyway, but not where that norm saw other rows."""
    return b.queries * (c + (r if b.kind == "shared" else 0)) * b.width


def _input_of_block(b: BlockShape, c: int, r: int, first: bool) -> int:
    if b.kind == "shared":
        return (b.keys + b.projected) * r * b.width
    return b.keys * (r if first else r + c) * b.width


def _transient_of_block(b: BlockShape, c: int, r: int) -> int:
    """In the backward of the MLP: gradients of the stream and of the branch, of what was activated and of what was
    not, and the activated values."""
    return b.queries * ((r + c) * b.width + 3 * c * b.hidden)


class Moved(NamedTuple):
    """Bytes through device memory, an image."""

    passes: int
    """Norms, activations, attention, gathers, loss: as long as these bytes take."""
    products: int
    """Operands and results of matrix products, whose time their operations decide."""

    @property
    def total(self) -> int:
        return self.passes + self.products


def moved_per_image(
    sizes: Sizes,
    mask_ratio: float = 0.75,
    *,
    compute_bytes: int = 2,
    residual_bytes: int = 4,
    activation_checkpointing: Checkpointing = "none",
) -> Moved:
    """What an image moves forward and backward, with fused attention. Arguments as of :func:`kept_per_image`."""
    c, r = compute_bytes, residual_bytes
    kept, masked = sizes.num_kept(mask_ratio), sizes.num_patches - sizes.num_kept(mask_ratio)
    width, decoder, pixels = sizes.embed_dim, sizes.decoder_embed_dim, sizes.patch_values
    check_checkpointing(activation_checkpointing)
    shapes = list(block_shapes(sizes, mask_ratio))
    mlps = Moved(
        sum(b.queries * ((2 * r + 2 * c) * b.width + 2 * c * b.hidden) for b in shapes),
        sum(b.queries * 2 * c * (b.width + b.hidden) for b in shapes),
    )
    blocks = Moved(*map(sum, zip(*(_moved_by_block(shape, c, r) for shape in shapes), strict=True)))
    again = {"none": Moved(0, 0), "selective": mlps, "full": blocks}[activation_checkpointing]
    passes = blocks.passes + sum(_moved_back_by_block(shape, c, r) for shape in shapes) + again.passes
    products = 3 * blocks.products + again.products
    # uint8 pixels to patches; positions and the class token; the two last norms, forward and backward.
    passes += kept * (1 + c) * pixels + kept * width * (c + WIDE + 4 * r + c)
    passes += ((1 + kept) * width + masked * decoder) * ((2 * r + 2 * c) + (3 * r + 3 * c))
    # The loss reads predictions and pixels twice and writes a gradient, which the head's bias sums.
    passes += masked * pixels * (2 * (c + 1) + 2 * c)
    products += 2 * kept * (c * pixels + c * width)
    products += 3 * (1 + kept) * c * (width + decoder) + 3 * masked * c * (decoder + pixels)
    return Moved(passes, products)


def _moved_by_block(b: BlockShape, c: int, r: int) -> Moved:
    """Forward."""
    norm = (2 * r + 2 * c) * b.width  # stream and branch in, stream and normed out
    tail = b.queries * (norm + 2 * c * b.hidden)  # second norm, activation
    products = b.queries * c * (4 * b.width + 2 * b.hidden)
    if b.kind == "queries":
        passes = b.keys * norm + b.queries * (3 * r + c) * b.width + (2 * b.queries + 2 * b.keys) * c * b.width
        return Moved(passes + tail, products + c * b.width * (3 * b.keys + 2 * b.queries))
    passes = 4 * c * b.width * b.keys + b.projected * (norm if b.kind == "full" else (r + c) * b.width)
    if b.kind == "shared":
        # The stream restored, its visible tokens with their positions, and queries, keys and values restored.
        passes += (b.keys * r + b.projected * (c + 4 * r)) * b.width + 3 * c * b.width * (b.projected + b.keys)
    return Moved(passes + tail, products + b.projected * 4 * c * b.width)


def _moved_back_by_block(b: BlockShape, c: int, r: int) -> int:
    """Passes alone."""
    norm = (3 * r + 3 * c) * b.width  # gradients of normed and stream, stream in; two gradients and normed out
    tail = b.queries * (norm + 4 * c * b.hidden)
    if b.kind == "queries":
        attention = c * b.width * (3 * b.queries + 4 * b.keys) + c * b.width * (2 * b.keys + b.queries)
        rows = b.queries * (2 * r + 2 * c + r) * b.width + b.keys * r * b.width
        return tail + b.keys * norm + attention + rows
    attention = 7 * c * b.width * b.keys
    if b.kind == "full":
        return tail + attention + b.keys * (norm + 3 * c * b.width)
    restored = b.keys * (r + 3 * c) * b.width + b.projected * (3 * c * 2 + 2 * r + 2 * c + 4 * r) * b.width
    return tail + attention + restored
