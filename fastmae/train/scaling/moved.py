"""Bytes that one image moves through device memory on fastmae's path on CUDA tensors.

What is small is left out: the numbers stay within a few per cent of the count in ``docs/step.md``. What a batch moves
once whatever its size (weights and their gradients) is not in them.
"""

from __future__ import annotations

from typing import NamedTuple

from fastmae.train.scaling.sizes import BlockShape, Sizes, block_shapes
from fastmae.train.scaling.work import WIDE, Checkpointing, check_checkpointing


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
    """What an image moves forward and backward, with fused attention. Arguments as of :func:`~.kept.kept_per_image`."""
    c, r = compute_bytes, residual_bytes
    kept, masked = sizes.num_kept(mask_ratio), sizes.num_patches - sizes.num_kept(mask_ratio)
    width, decoder, pixels = sizes.embed_dim, sizes.decoder_embed_dim, sizes.patch_values
    check_checkpointing(activation_checkpointing)
    shapes = list(block_shapes(sizes, mask_ratio))
    blocks = Moved(*map(sum, zip(*(_moved_by_block(shape, c, r) for shape in shapes), strict=True)))
    again = {
        "none": Moved(0, 0),
        # The first half without its last product; all without activation and last product.
        "selective": Moved(
            blocks.passes - sum(b.queries * ((2 * r + 2 * c) * b.width + 2 * c * b.hidden) for b in shapes),
            blocks.products - sum(b.queries * 2 * c * (2 * b.width + b.hidden) for b in shapes),
        ),
        "full": Moved(
            blocks.passes - sum(b.queries * 2 * c * b.hidden for b in shapes),
            blocks.products - sum(b.queries * c * (b.width + b.hidden) for b in shapes),
        ),
    }[activation_checkpointing]
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
