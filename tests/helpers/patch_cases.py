"""Images, masks and the paper's arithmetic for the tests of the patch ops, written without any of the ops' code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """An image batch cut into patches, of which some are chosen."""

    n: int
    channels: int
    image: tuple[int, int]
    patch: tuple[int, int]
    ratio: float

    @property
    def num_patches(self) -> int:
        return (self.image[0] // self.patch[0]) * (self.image[1] // self.patch[1])

    @property
    def pixels(self) -> int:
        return self.patch[0] * self.patch[1] * self.channels


CASES = {
    "p16": Case(2, 3, (64, 48), (16, 16), 0.75),
    "p14": Case(1, 3, (42, 70), (14, 14), 0.5),
    "one-channel": Case(3, 1, (24, 40), (8, 8), 0.95),
    "five-channels": Case(2, 5, (32, 24), (8, 8), 0.1),
    "wide-patch": Case(2, 3, (24, 64), (8, 16), 0.75),
    "tall-patch-two-channels": Case(2, 2, (36, 15), (12, 5), 0.6),
}
LAYOUTS = ("channels_last", "nchw", "cropped", "strided")


def make_images(case: Case, layout: str, dtype: torch.dtype) -> Tensor:
    """(N, C, H, W) with the given memory layout; bytes, or normal values of a floating dtype."""
    (h, w), (n, c) = case.image, (case.n, case.channels)
    shape = {"cropped": (n, h + 7, w + 5, c), "strided": (n, c, 2 * h, 2 * w + 1)}.get(layout, (n, h, w, c))
    values = torch.randint(0, 256, shape, dtype=torch.uint8) if dtype == torch.uint8 else torch.randn(shape).to(dtype)
    if layout == "strided":
        return values[:, :, ::2, 1::2]
    if layout == "nchw":
        return values.permute(0, 3, 1, 2).contiguous()
    return values[:, -h:, 2 : 2 + w].permute(0, 3, 1, 2) if layout == "cropped" else values.permute(0, 3, 1, 2)


def make_ids(case: Case, ratio: float | None = None) -> Tensor:
    """Distinct patches of each image, unsorted: int64 (N, M), M at least 1 and less than L where L > 1."""
    count = min(max(1, int(case.num_patches * (ratio or case.ratio))), max(1, case.num_patches - 1))
    return torch.rand(case.n, case.num_patches).argsort(1)[:, :count]


def make_mean_std(channels: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(0.4, 0.5, channels), torch.linspace(0.22, 0.3, channels)


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """facebookresearch/mae's order: (N, L, ph * pw * C), channel innermost."""
    (n, c, h, w), (ph, pw) = images.shape, patch
    x = images.reshape(n, c, h // ph, ph, w // pw, pw)
    return torch.einsum("nchpwq->nhwpqc", x).reshape(n, (h // ph) * (w // pw), ph * pw * c)


def normalised(images: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Bytes to ``(x / 255 - mean) / std`` in the given dtype; floating images only change dtype."""
    if images.dtype != torch.uint8:
        return images.to(dtype)
    x = images.to(dtype) / 255
    if mean is None:
        return x
    return (x - mean.to(dtype).view(-1, 1, 1)) / std.to(dtype).view(-1, 1, 1)


def take(patches: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(patches, 1, ids[..., None].expand(-1, -1, patches.shape[-1]))
