"""A masked autoencoder as numbers: its sizes, its parameters, and the blocks that an image passes through.

Nothing here imports PyTorch. A test holds the parameters against those of the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from fastmae.presets import PRESETS


def expect(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise ``ValueError`` naming the argument unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a :class:`fastmae.model.MaskedAutoencoderViT`; the fields are its arguments."""

    img_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    in_chans: int = 3
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0

    def __post_init__(self):
        for name in ("in_chans", "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth"):
            expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name, heads in (("embed_dim", self.num_heads), ("decoder_embed_dim", self.decoder_num_heads)):
            width = getattr(self, name)
            expect(heads >= 1 and width % heads == 0 and width % 4 == 0, name, f"a multiple of 4 and {heads}", width)
        divides = all(i >= p > 0 and i % p == 0 for i, p in zip(self.img_size, self.patch_size, strict=True))
        expect(divides, "img_size", f"a multiple of the patch size {self.patch_size}", self.img_size)

    @property
    def num_patches(self) -> int:
        """L."""
        return (self.img_size[0] // self.patch_size[0]) * (self.img_size[1] // self.patch_size[1])

    @property
    def patch_values(self) -> int:
        """P = ph * pw * C."""
        return self.patch_size[0] * self.patch_size[1] * self.in_chans

    @property
    def image_bytes(self) -> int:
        """Of one uint8 image as the model takes it."""
        return math.prod(self.img_size) * self.in_chans

    def num_kept(self, mask_ratio: float) -> int:
        """K, the visible patches.

        Raises:
            ValueError: if none would stay visible, or none be masked.
        """
        expect(0 < mask_ratio < 1, "mask_ratio", "a number strictly between 0 and 1", mask_ratio)
        kept = int(self.num_patches * (1 - mask_ratio))
        message = f"at least one of {self.num_patches} patches visible and one masked"
        expect(0 < kept < self.num_patches, "mask_ratio", message, mask_ratio)
        return kept


def preset_sizes(name: str, **overrides: Any) -> Sizes:
    """Sizes of a preset of :func:`fastmae.create_model`; overrides that are None keep the preset's.

    Raises:
        ValueError: for an unknown name or sizes that make no model.
    """
    expect(name in PRESETS, "model", f"one of {', '.join(PRESETS)}", name)
    values = PRESETS[name] | {key: value for key, value in overrides.items() if value is not None}
    for key in ("img_size", "patch_size"):
        if isinstance(values.get(key), int):
            values[key] = (values[key], values[key])
    return Sizes(**values)


def architecture_sizes(architecture: Mapping[str, Any]) -> Sizes:
    """Sizes of a model from its ``MaskedAutoencoderViT.architecture``, or from what a checkpoint says of it."""
    values = {field.name: architecture[field.name] for field in fields(Sizes)}
    return Sizes(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


class Parameter(NamedTuple):
    """One parameter of the model."""

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    """False for the position tables."""
    has_copy: bool = False
    """A low-precision copy of it is kept while mixed precision runs on whole parameters."""

    @property
    def count(self) -> int:
        """Of values."""
        return math.prod(self.shape)

    @property
    def unit(self) -> str:
        """What is sharded together: a block by its name, or "" for all that is in no block."""
        parts = self.name.split(".")
        return ".".join(parts[:2]) if parts[0] in ("blocks", "decoder_blocks") else ""


def parameters(sizes: Sizes) -> list[Parameter]:
    """All parameters, in no particular order."""
    width, decoder, positions = sizes.embed_dim, sizes.decoder_embed_dim, 1 + sizes.num_patches
    found = [
        Parameter("cls_token", (1, 1, width)),
        Parameter("pos_embed", (1, positions, width), trainable=False),
        Parameter("mask_token", (1, 1, decoder)),
        Parameter("decoder_pos_embed", (1, positions, decoder), trainable=False),
        Parameter("patch_embed.proj.weight", (width, sizes.in_chans, *sizes.patch_size)),
        Parameter("patch_embed.proj.bias", (width,)),
        *_norm("norm", width),
        *_norm("decoder_norm", decoder),
        *_linear("decoder_embed", width, decoder),
        *_linear("decoder_pred", decoder, sizes.patch_values),
    ]
    for stack, depth, dim in (("blocks", sizes.depth, width), ("decoder_blocks", sizes.decoder_depth, decoder)):
        hidden = int(dim * sizes.mlp_ratio)
        for number in range(depth):
            block = f"{stack}.{number}"
            found += [
                *_norm(f"{block}.norm1", dim),
                *_linear(f"{block}.attn.qkv", dim, 3 * dim),
                *_linear(f"{block}.attn.proj", dim, dim),
                *_norm(f"{block}.norm2", dim),
                *_linear(f"{block}.mlp.fc1", dim, hidden),
                *_linear(f"{block}.mlp.fc2", hidden, dim),
            ]
    return found


def _linear(name: str, inputs: int, outputs: int) -> list[Parameter]:
    return [Parameter(f"{name}.weight", (outputs, inputs), has_copy=True), Parameter(f"{name}.bias", (outputs,))]


def _norm(name: str, dim: int) -> list[Parameter]:
    return [Parameter(f"{name}.weight", (dim,)), Parameter(f"{name}.bias", (dim,))]


class BlockShape(NamedTuple):
    """What one image makes of one Transformer block on the training path."""

    kind: Literal["full", "shared", "queries"]
    """full: all rows. shared: the decoder's first block, whose projection of the masked tokens is made once a batch.
    queries: the decoder's last block, of which only the masked rows are wanted."""
    width: int
    hidden: int
    heads: int
    keys: int
    """Rows that come in and are attended to."""
    queries: int
    """Rows that go out."""
    projected: int
    """Rows whose queries, keys and values (keys and values in a block of kind "queries") are computed."""


def block_shapes(sizes: Sizes, mask_ratio: float) -> Iterator[BlockShape]:
    """The blocks in order: the encoder's, then the decoder's."""
    kept, length = sizes.num_kept(mask_ratio), sizes.num_patches
    width, hidden = sizes.embed_dim, int(sizes.embed_dim * sizes.mlp_ratio)
    for _ in range(sizes.depth):
        yield BlockShape("full", width, hidden, sizes.num_heads, 1 + kept, 1 + kept, 1 + kept)
    width, hidden = sizes.decoder_embed_dim, int(sizes.decoder_embed_dim * sizes.mlp_ratio)
    common, rows = (width, hidden, sizes.decoder_num_heads), 1 + length
    for number in range(sizes.decoder_depth):
        if number == sizes.decoder_depth - 1:
            yield BlockShape("queries", *common, rows, length - kept, rows)
        elif number == 0:
            yield BlockShape("shared", *common, rows, rows, 1 + kept)
        else:
            yield BlockShape("full", *common, rows, rows, rows)
