"""Progressive resolution: the image size of each epoch, small ones first."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from fastmae.train.config import PretrainConfig


@dataclass(frozen=True)
class Resolution:
    """Image sizes of a run: a pure function of the epoch, so that resuming needs no state.

    DailyMAE (Wu et al., arXiv 2404.00509; public code FastSSL) trains with 160, 192 and 224 pixels in turn, the mask
    ratio unchanged, over a ramp of epochs that is given by hand. Here each size gets an equal share of the run.

    Attributes:
        sizes: (height, width) of each share.
        starts: the epoch, from 0, that each share begins with.
    """

    sizes: tuple[tuple[int, int], ...]
    starts: tuple[int, ...] = (0,)

    def __call__(self, epoch: int) -> tuple[int, int]:
        """The size of an epoch's images; epochs are passes over the images, counted from 0."""
        return self.sizes[bisect_right(self.starts, epoch) - 1]

    def __str__(self) -> str:
        parts = (f"{h}x{w} from pass {start}" for (h, w), start in zip(self.sizes, self.starts, strict=True))
        return ", ".join(parts)


def progressive_sizes(heights: Sequence[int], img_size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Heights with the widths that belong to them in the proportions of ``img_size``.

    Raises:
        ValueError: a height whose width is not whole, or a last one that is not the image's.
    """
    height, width = img_size
    sizes = []
    for value in heights:
        across = Fraction(value * width, height)
        if value < 1 or across.denominator != 1:
            raise ValueError(f"expected heights whose widths in proportion to {height}x{width} are whole, got {value}")
        sizes.append((value, int(across)))
    if sizes and sizes[-1] != img_size:
        raise ValueError(f"expected the image size {height}x{width} last, got {sizes[-1][0]}x{sizes[-1][1]}")
    return tuple(sizes)


def create_resolution(config: PretrainConfig, total_steps: int, num_samples: int) -> Resolution:
    """The sizes of a run over a data set of ``num_samples`` images.

    Raises:
        ValueError: if there are more sizes than passes over the images.
    """
    sizes = progressive_sizes(config.data.progressive_sizes, config.img_size) or (config.img_size,)
    decoded = total_steps * (config.train.global_batch_size // config.train.masks_per_image)
    share = Fraction(decoded, num_samples * len(sizes))
    if len(sizes) > 1 and share < 1:
        raise ValueError(
            f"--data.progressive-sizes: expected at least one pass over the {num_samples:,} images for each size, got "
            f"{len(sizes)} sizes for a run of {decoded / num_samples:.3g} passes"
        )
    return Resolution(sizes, tuple(int(share * i + Fraction(1, 2)) for i in range(len(sizes))))
