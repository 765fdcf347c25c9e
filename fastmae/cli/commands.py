"""The commands and their flags; those of ``fastmae pretrain`` stand in ``fastmae.train.config``.

No module that does the work is imported here, so that ``--help`` does not wait for PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastmae.train.config import DataConfig, ModelConfig, RecipeName, TrainConfig

_SOURCE = tyro.conf.arg(metavar="PATH")


@dataclass(frozen=True)
class ReconstructConfig:
    """Draw masked, reconstructed and original images side by side. Images are read, and masks drawn, as in the run that
    trained the model."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """Run folder, checkpoint folder or exported .safetensors file."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGES...")]
    """Image files, and folders of them."""
    out: Path = Path("reconstruction.png")
    """The figure to write."""
    show: int = 9
    """Images to draw, spread evenly over those given; errors are measured on more, at most 256."""
    visible: Literal["pasted", "predicted"] = "pasted"
    """Visible patches of the reconstruction: pasted from the image, or as the model predicts them (as in the paper's
    figures; blurred, since the loss does not train them)."""
    bands: tuple[int, ...] | None = None
    """Bands to draw as red, green and blue, or one to draw grey, counted from 0, of images with more than three.
    None: 0 1 2."""
    mask_ratio: float | None = None
    """Share of patches to hide, strictly between 0 and 1. None: the run's."""
    mask_strategy: Literal["random", "block", "grid"] | None = None
    """Which patches are hidden, as for fastmae pretrain. None: the run's."""
    seed: int = 0
    """Seed of the masks."""
    value_range: tuple[float, ...] | None = None
    """Lowest and highest value of 16-bit and floating-point images, or a pair for each channel. None: the run's."""
    channels_first: bool = False
    """.npy files are (channels, height, width). Also if the run's were."""


@dataclass(frozen=True)
class ConsolidateConfig:
    """Write a checkpoint, of however many processes, into one .safetensors file that every command here reads."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """Checkpoint folder, or run folder: then its newest undamaged checkpoint."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The file to write; replaced if it is there."""
    optimizer: bool = False
    """Also write the optimiser's state and all else, under the names that the checkpoint has for them. Only for other
    tools: such a file is no longer one of weights."""


@dataclass(frozen=True)
class EnvConfig:
    """Print versions, devices, kernels and attention backends: paste it into a bug report."""


@dataclass(frozen=True)
class ImagesConfig:
    """Which images count as good: as for fastmae pretrain, so that both mean the same data set."""

    channels: int = 3
    """Channels of the images; others count as bad."""
    value_range: tuple[float, ...] | None = None
    """Lowest and highest value of 16-bit and floating-point pixels, or a pair for each channel in turn."""
    channels_first: bool = False
    """.npy files are (channels, height, width)."""
    max_pixels: int = 178_956_970
    """Largest height x width; more is taken for a decompression bomb and counts as bad."""
    num_workers: int | None = None
    """Threads that read and decode. None: one a core."""


@dataclass(frozen=True)
class BenchConfig:
    """Measure the loader alone, the model alone and both together; say where the time of a step goes, which is the
    bottleneck and what would help. Flags are those of fastmae pretrain; one process, and each optimiser step has one
    micro-batch."""

    recipe: RecipeName = "photographs"
    """Where the defaults of all other flags come from."""
    seconds: float = 20.0
    """How long to measure, about; slow steps take longer. Starting and warming up are not counted."""
    json: Path | None = None
    """Also write everything that was found here."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class ShardConfig:
    """Pack images into WebDataset tar shards, verified and with an index beside each. A run that was cut off is
    continued by the same command, and ends in the same bytes."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder of images, list file, .tar file or folder of .tar shards. Only read."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder for the shards: new, empty, or of a run of this command to continue. Not inside FOLDER."""
    short_side: int | None = None
    """Shrink photographs to this short side in pixels and store them as JPEG, upright; smaller ones keep their bytes,
    and so do 16-bit, TIFF and NumPy files. 256 is usual for training at 224. None: every file's bytes as they are."""
    quality: int = 90
    """JPEG quality of what is encoded anew, 1 to 100 (chroma at half resolution, as cameras store it)."""
    reencode: bool = False
    """Encode all photographs anew as JPEG, also those that keep their size."""
    shard_bytes: int = 256 << 20
    """Size of a shard to aim at. Smaller ones are more parallel to read and to write, and less to repeat after a
    failure; larger ones are fewer files."""
    images_per_shard: int | None = None
    """Images in a shard, at most; overrides --shard-bytes."""
    shuffle_seed: int | None = 0
    """Seed of the order in which images are packed, so that a reader that goes from front to back meets no sorted
    classes. None: in the order of their names."""
    images: tyro.conf.OmitArgPrefixes[ImagesConfig] = field(default_factory=ImagesConfig)
    """How the images are read."""
    max_bad_fraction: float = 0.01
    """Stop if more than this share of the images cannot be used; up to it they are left out and listed in
    OUT/bad_files.jsonl."""


@dataclass(frozen=True)
class IndexConfig:
    """Read every image's header once and keep what it says: beside tar shards for every reader, of a folder in the
    cache."""

    path: Annotated[tyro.conf.Positional[Path], _SOURCE]
    """Folder of images, list file, .tar file or folder of .tar shards."""
    images: tyro.conf.OmitArgPrefixes[ImagesConfig] = field(default_factory=ImagesConfig)
    """How the images are read."""


@dataclass(frozen=True)
class VerifyConfig:
    """Decode every image in full, and remember the bad ones in the index, so that training replaces them from the
    start. Ctrl-C keeps what was found so far. Exit code 1 if there are more than --max-bad-fraction."""

    path: Annotated[tyro.conf.Positional[Path], _SOURCE]
    """Folder of images, list file, .tar file or folder of .tar shards."""
    out: Path | None = None
    """Also write the bad files here, a line of JSON each, as they are found."""
    max_bad_fraction: float = 0.01
    """Share of bad files up to which the exit code is 0."""
    start: int = 0
    """Number of the first image to decode: where an interrupted verification says that it was."""
    strict: bool = False
    """Count JPEGs as bad that decode with a warning: data is missing or wrong in the middle, and part of the image is
    grey or shifted. Without this they are listed only."""
    images: tyro.conf.OmitArgPrefixes[ImagesConfig] = field(default_factory=ImagesConfig)
    """How the images are read."""


@dataclass(frozen=True)
class StatsConfig:
    """Count, sizes, formats and modes of the images, those that cannot be used, and the channels' mean and standard
    deviation as flags of fastmae pretrain."""

    path: Annotated[tyro.conf.Positional[Path], _SOURCE]
    """Folder of images, list file, .tar file or folder of .tar shards."""
    sample: int = 2000
    """Images to decode for mean and standard deviation, drawn at random. 0: none."""
    seed: int = 0
    """Seed of the drawing."""
    json: bool = False
    """Print JSON in place of tables."""
    images: tyro.conf.OmitArgPrefixes[ImagesConfig] = field(default_factory=ImagesConfig)
    """How the images are read."""


DataCommand = (
    Annotated[ShardConfig, tyro.conf.subcommand("shard")]
    | Annotated[IndexConfig, tyro.conf.subcommand("index")]
    | Annotated[VerifyConfig, tyro.conf.subcommand("verify")]
    | Annotated[StatsConfig, tyro.conf.subcommand("stats")]
)


@dataclass(frozen=True)
class DataCommands:
    """Prepare a data set: pack it into shards, index it, check every image, describe it."""

    command: Annotated[tyro.conf.OmitSubcommandPrefixes[DataCommand], tyro.conf.arg(name="")]
    """What to do with the images."""
