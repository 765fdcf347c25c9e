"""``--data``: the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Where images come from, and how they are cropped and changed."""

    path: Path | None = None
    """Folder of images (nested or flat), folder of .tar shards, one .tar, or a .txt or .tsv file with a path a line and
    perhaps a label behind a tab. None: the embedded photographs."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """Image loader. auto: DALI where it is installed and decodes the files' format, else torchvision."""
    value_range: tuple[float, ...] | None = None
    """Lowest and highest value of 16-bit and floating-point images, or a pair for each channel in turn; fastmae data
    stats suggests them. Values between keep their precision (images are float32), those beyond are clipped. TIFF and
    .npy files of these types need it. None: 16-bit PNG loses its lower byte."""
    channels_first: bool = False
    """.npy files are (channels, height, width) instead of (height, width, channels)."""
    max_bad_fraction: float = 0.01
    """Share of the files that may be damaged or refused before the run stops, counted over all ranks whenever a row is
    logged or a checkpoint saved. Up to it they are listed with reasons in bad_files.jsonl and other images take their
    place. 0: stop at the first."""
    max_pixels: int = 178_956_970
    """Largest image, height x width, that is decoded; larger ones count as bad. The default, which is the most, is
    Pillow's limit against decompression bombs."""
    crop: Literal["random", "center", "fixed"] = "random"
    """Cropping (paper, table 1e). random: random resized crop, by scale and ratio. fixed: the short side resized to the
    image size, then a random crop. center: the same with the central crop, the paper's "none"."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop as a share of the image's, smallest and largest. 0.2 to 1: facebookresearch/mae's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the random crop, smallest and largest."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    vflip: float = 0.0
    """Probability of a vertical flip, for pictures that have no up and down: satellite, microscopy."""
    color_jitter: float = 0.0
    """Strength of colour jitter: brightness, contrast and saturation change by factors up to 1 +- this, and hue turns
    by up to a quarter of this, as a share of the colour circle. The paper finds that it does not help (table 1e)."""
    progressive_sizes: tuple[int, ...] = ()
    """Image heights of successive equal shares of the run, each of whole passes over the images, widths in proportion;
    the last is the image size. Small images first make a run shorter: 160 192 224 (DailyMAE, Wu et al. 2024). Empty:
    the image size all along."""
    num_threads: int | None = None
    """Threads that decode and resize. None: the loader's choice."""
    prefetch: int | None = None
    """Batches made ahead. None: the loader's choice."""
    timeout: float = 600.0
    """Seconds to wait for a batch before the run ends with an error, as a file system that hangs gives none."""
