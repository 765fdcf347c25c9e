"""``--model``: the masked autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The masked autoencoder. Widths and depths left at None are those of the named preset."""

    name: str = "mae_vit_base_patch16"
    """Preset: mae_vit_{tiny,small,base,large}_patch16 or mae_vit_huge_patch14."""
    img_size: int | tuple[int, int] = 224
    """Image size in pixels: one number for a square, or height and width."""
    patch_size: int | tuple[int, int] | None = None
    """Patch size in pixels, one number or height and width; must divide the image size. None: the preset's."""
    in_chans: int = 3
    """Channels of the images: 3 for colour, 1 for grey, any number for TIFF and .npy files."""
    mean: tuple[float, ...] | None = None
    """Mean of the pixels in [0, 1] units, one number a channel, as fastmae data stats prints it. None: ImageNet's for
    three channels, else 0.5."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the pixels in [0, 1] units, one number a channel. None: ImageNet's for three channels, else
    0.5."""
    mask_ratio: float = 0.75
    """Share of patches that is hidden from the encoder, strictly between 0 and 1."""
    mask_strategy: Literal["random", "block", "grid"] = "random"
    """Which patches are masked (paper, table 1f). random: any. block: rectangles, as in BEiT; the paper finds it worse
    at a ratio of 0.75 than at 0.5. grid: all but one of every four, ratio 0.75 only."""
    norm_pix_loss: bool = False
    """Predict pixels normalised by each patch's own mean and standard deviation (paper, section 3)."""
    embed_dim: int | None = None
    """Encoder width."""
    depth: int | None = None
    """Encoder blocks."""
    num_heads: int | None = None
    """Encoder attention heads."""
    decoder_embed_dim: int | None = None
    """Decoder width."""
    decoder_depth: int | None = None
    """Decoder blocks."""
    decoder_num_heads: int | None = None
    """Decoder attention heads."""
    attention: Literal["auto", "plain", "sdpa", "xformers", "triton"] = "auto"
    """Attention backend. auto picks by shape, precision and device; a named one that is missing is an error."""
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    """Residual stream under bf16 autocast. float32: as in the paper's code. bfloat16: rounded after every add; less
    memory traffic, and not the same computation."""
