"""Dense tasks (appendix A.3 and A.4): a pretrained encoder as the backbone of Mask R-CNN and of segmentation heads.

torchvision has the detector and the pyramid network. Here is what lies between it and a plain Vision Transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fastmae.model.blocks import Attention, Stream
from fastmae.model.classifier import VisionTransformer
from fastmae.ops._check import check

_BINS = (1, 2, 3, 6)
"""Grids over which a UperNet pools (Zhao et al. 2017)."""


class Scales(nn.Module):
    """Four maps of a plain encoder, as a hierarchical network has them (A.3).

    The blocks are divided into four equal subsets. The last map of each is brought to a stride of a quarter, half, once
    and twice the patch size, the first two by transposed convolutions.

    Args:
        encoder: its blocks are at least four; ``img_size`` is that of the largest images.
    """

    def __init__(self, encoder: VisionTransformer):
        super().__init__()
        depth = len(encoder.blocks)
        check(depth >= 4, "encoder", "at least 4 blocks, one for each scale", depth)
        self.encoder, dim = encoder, encoder.pos_embed.shape[-1]
        self.indices = [depth * (i + 1) // 4 - 1 for i in range(4)]
        self.scales = nn.ModuleList(
            [
                nn.Sequential(_double(dim), nn.GroupNorm(1, dim), nn.GELU(), _double(dim)),
                _double(dim),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (N, D, rows, columns) of images (N, C, H, W), from the finest to the coarsest.

        Smaller images are filled up below and on the right, with the mean; H and W are multiples of twice the patch.
        """
        (height, width), (ph, pw) = images.shape[-2:], self.encoder.patch_size
        fits = height % (2 * ph) == width % (2 * pw) == 0
        fits = fits and height <= self.encoder.img_size[0] and width <= self.encoder.img_size[1]
        expected = f"heights and widths that {2 * ph} and {2 * pw} divide, at most {self.encoder.img_size}"
        check(fits, "images", expected, (height, width))
        images = F.pad(images, (0, self.encoder.img_size[1] - width, 0, self.encoder.img_size[0] - height))
        maps = self.encoder.forward_intermediates(images, self.indices)
        maps = [m[..., : height // ph, : width // pw] for m in maps]
        return [scale(m) for scale, m in zip(self.scales, maps, strict=True)]


def _double(dim: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(dim, dim, 2, stride=2)


class Pyramid(nn.Module):
    """:class:`Scales` with a feature pyramid network on top: a backbone for torchvision's detectors."""

    def __init__(self, encoder: VisionTransformer, out_channels: int):
        super().__init__()
        self.scales, self.out_channels = Scales(encoder), out_channels
        dims = [encoder.pos_embed.shape[-1]] * 4
        self.network = FeaturePyramidNetwork(dims, out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> Mapping[str, Tensor]:
        """Maps (N, ``out_channels``, rows, columns) named "0" to "3", and "pool", of half the resolution of "3"."""
        return self.network({str(i): m for i, m in enumerate(self.scales(images))})


def feature_pyramid(encoder: VisionTransformer, out_channels: int = 256) -> Pyramid:
    """A backbone of four scales, strides 4 to 32 for patches of 16 pixels, from equally spaced blocks (A.3).

    Args:
        encoder: of ``fastmae.create_classifier(None, 0, checkpoint=..., img_size=...)``, whose size is that of the
            largest images.
        out_channels: of all maps.

    Raises:
        ValueError: an encoder of fewer than four blocks.
    """
    return Pyramid(encoder, out_channels)


def mask_rcnn(encoder: VisionTransformer, num_classes: int, *, out_channels: int = 256, **options: Any) -> MaskRCNN:
    """torchvision's Mask R-CNN on a pretrained encoder (A.3).

    It takes lists of images (C, H, W) in [0, 1], of any sizes, and targets as torchvision describes them. Images are
    resized to fit the encoder's size. Anchors keep the proportions that they have in the paper's 1,024 pixels.

    Args:
        encoder: as for :func:`feature_pyramid`, for square images, so that upright and wide ones fit.
        num_classes: with the background, which is class 0.
        out_channels: of the maps.
        options: further arguments of torchvision's ``MaskRCNN``, such as ``box_detections_per_img``.

    Raises:
        ValueError: an encoder of other images, or of fewer than four blocks.
    """
    side, width = encoder.img_size
    check(side == width, "encoder", "square images", encoder.img_size)
    sizes = tuple((max(1, side * size // 1024),) for size in (32, 64, 128, 256, 512))
    names = ["0", "1", "2", "3"]
    return MaskRCNN(
        feature_pyramid(encoder, out_channels),
        num_classes,
        min_size=side,
        max_size=side,
        image_mean=encoder.mean.tolist(),
        image_std=encoder.std.tolist(),
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
        size_divisible=2 * max(encoder.patch_size),
        **options,
    )


class LinearSegmenter(nn.Module):
    """A class for every pixel, by a linear layer on the last block's tokens.

    Args:
        encoder: of the images' size.
        num_classes: classes K.
    """

    def __init__(self, encoder: VisionTransformer, num_classes: int):
        super().__init__()
        dim = encoder.pos_embed.shape[-1]
        self.encoder = encoder
        self.head = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, num_classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K, H, W)."""
        (tokens,) = self.encoder.forward_intermediates(images, [-1])
        return _resize(self.head(tokens), images.shape[-2:])


class UperNet(nn.Module):
    """A class for every pixel, in the manner of UperNet (Xiao et al. 2018; A.4).

    The coarsest map is pooled over grids of 1, 2, 3 and 6 cells, a feature pyramid network joins it with the finer
    ones, and all of its maps together give the classes at a quarter of the patch size.

    Args:
        encoder: of the images' size; at least four blocks.
        num_classes: classes K.
        channels: width of the head, 512 in the paper's ADE20K runs.
    """

    def __init__(self, encoder: VisionTransformer, num_classes: int, channels: int = 512):
        super().__init__()
        dim = encoder.pos_embed.shape[-1]
        self.scales = Scales(encoder)
        self.pooled = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), nn.Conv2d(dim, channels, 1), nn.ReLU()) for bins in _BINS
        )
        self.joined = _convolution(dim + len(_BINS) * channels, channels)
        self.network = FeaturePyramidNetwork([dim, dim, dim, channels], channels)
        self.fused = _convolution(4 * channels, channels)
        self.head = nn.Conv2d(channels, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K, H, W)."""
        *finer, coarsest = self.scales(images)
        pooled = [_resize(pool(coarsest), coarsest.shape[-2:]) for pool in self.pooled]
        maps = [*finer, self.joined(torch.cat([coarsest, *pooled], 1))]
        maps = list(self.network({str(i): m for i, m in enumerate(maps)}).values())
        fused = self.fused(torch.cat([_resize(m, maps[0].shape[-2:]) for m in maps], 1))
        return _resize(self.head(fused), images.shape[-2:])


def _convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class RelativeAttention(Attention):
    """Attention with a bias for each head and each offset between two tokens, as in BEiT; zero at first."""

    def __init__(self, attention: Attention, grid_size: tuple[int, int], num_prefix_tokens: int):
        dim = attention.qkv.in_features
        super().__init__(dim, attention.num_heads, attention.backend)
        self.load_state_dict(attention.state_dict())
        rows, columns = grid_size
        offsets = (2 * rows - 1) * (2 * columns - 1)
        # After the offsets between patches: from a prefix token to a patch, back, and between prefix tokens.
        self.table = nn.Parameter(torch.zeros(self.num_heads, offsets + 3))
        row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
        index = (row[:, None] - row + rows - 1) * (2 * columns - 1) + column[:, None] - column + columns - 1
        whole = torch.full((num_prefix_tokens + rows * columns,) * 2, offsets + 2)
        whole[:num_prefix_tokens, num_prefix_tokens:] = offsets
        whole[num_prefix_tokens:, :num_prefix_tokens] = offsets + 1
        whole[num_prefix_tokens:, num_prefix_tokens:] = index
        self.register_buffer("index", whole, persistent=False)

    def forward(self, stream: Stream, norm: nn.LayerNorm) -> Stream:
        """Attention among all tokens, in PyTorch's own implementation, which takes a bias."""
        x = stream.sum()
        q, k, v = self._heads(self.qkv(norm(x)), 3).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.table[:, self.index].to(q.dtype))
        return Stream(x, self.proj(attended.transpose(1, 2).flatten(2)))


def add_relative_positions(encoder: VisionTransformer) -> VisionTransformer:
    """Give every block relative positions, which leave its output as it is until they are trained (A.4); in place.

    The paper turns them on for segmentation only, not in pretraining. A bias excludes fastmae's own attention.
    """
    for block in encoder.blocks:
        block.attn = RelativeAttention(block.attn, encoder.grid_size, encoder.num_prefix_tokens)
    return encoder
