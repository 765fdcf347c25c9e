"""Flags of all commands but ``pretrain`` (:mod:`fastmae.train.config`) and ``plan``. Nothing here imports PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastmae.train.classification import FinetuneConfig, PartialConfig, ScratchConfig, shown_defaults
from fastmae.train.config import MAX_PIXELS, DataConfig, ModelConfig, RecipeName, TrainConfig


@dataclass(frozen=True)
class ReconstructConfig:
    """Draw masked, reconstructed and original images side by side, read and masked as in the run that trained the
    model."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """Run folder, checkpoint folder or exported .safetensors file."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGES...")]
    """Image files, and folders of them."""
    out: Path = Path("reconstruction.png")
    """The figure to write."""
    show: int = 9
    """Images to draw, spread evenly over those given. Errors are measured on up to 256."""
    draw_seed: int | None = None
    """Draw images at random by this seed instead."""
    visible: Literal["pasted", "predicted"] = "pasted"
    """Visible patches of the reconstruction: pasted from the image, or as the model predicts them (as in the paper's
    figures; blurred, since the loss does not train them)."""
    bands: tuple[int, ...] | None = None
    """Bands to draw as red, green and blue, or one to draw grey, counted from 0, of images with more than three.
    None: 0 1 2."""
    mask_ratio: tuple[float, ...] = ()
    """Share of patches to hide, strictly between 0 and 1; the run's if none is given. Several are drawn side by side,
    as in Figure 4 of the paper."""
    mask_strategy: tuple[Literal["random", "block", "grid", "fixed-grid"], ...] = ()
    """Which patches are hidden, as for fastmae pretrain; the run's if none is given. Several are drawn side by side, as
    in Figure 6."""
    seed: int = 0
    """Seed of the masks."""
    value_range: tuple[float, ...] | None = None
    """Lowest and highest value of 16-bit and floating-point images, or a pair for each channel. None: the run's."""
    channels_first: bool = False
    """.npy files are (channels, height, width). Also if the run's were."""
    device: str = "auto"
    """Device, such as cpu or cuda:0. auto: a GPU if there is one."""


@dataclass(frozen=True)
class ConsolidateConfig:
    """Write a checkpoint, saved by any number of processes, as one .safetensors file that every command reads."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """Checkpoint folder, or run folder: then its newest undamaged checkpoint."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The file to write; overwritten if it exists."""
    optimizer: bool = False
    """Also write the optimiser's state and everything else, under the checkpoint's names. For other tools: fastmae
    reads files of weights only."""


@dataclass(frozen=True)
class InspectConfig:
    """Report what weights are, and what they can be used for."""

    weights: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WEIGHTS")]
    """Run folder, checkpoint, .safetensors or .pth file, or a folder of transformers or timm."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class ConvertConfig:
    """Write weights for another library, load them there, and keep them only if it computes the same from them."""

    weights: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WEIGHTS")]
    """Run folder, checkpoint, .safetensors or .pth file, or a folder of transformers or timm."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """What to write, which must not exist: a folder (transformers, timm, hub), or a file .pth (facebook),
    .safetensors, .pt2 (torch-export) or .onnx."""
    to: Literal["facebook", "transformers", "timm", "hub", "safetensors", "torch-export", "onnx"] = field(kw_only=True)
    """Target. hub: weights of fastmae's with a model card. timm, torch-export and onnx take the encoder alone."""
    kind: Literal["auto", "pretraining", "encoder"] = "auto"
    """auto: all of the weights that the target takes. pretraining: with the decoder, or an error. encoder: without."""
    norm_pix_loss: bool | None = None
    """Whether the decoder predicts normalised pixels, where the weights do not say."""
    input: Literal["float", "uint8"] = "float"
    """Images that torch-export's or onnx's program takes. float: normalised. uint8: raw pixels, which it normalises."""
    images: Path | None = None
    """Folder of images to compare on, besides random ones. None: the embedded photographs."""
    data_license: str | None = None
    """Licence of the training images, in your words, for the model card of --to hub."""


@dataclass(frozen=True)
class EncodingConfig:
    """How an encoder looks at images."""

    batch_size: int = 64
    """Images per forward pass."""
    crop_ratio: float = 0.875
    """Side of the centred crop relative to the largest of its aspect ratio; 0.875 is 224 of 256 pixels. 1 for small
    images."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the encoder. auto: bf16 on a GPU that has it, else fp32."""
    device: str = "auto"
    """Device, such as cpu or cuda:0. auto: a GPU if there is one."""
    num_workers: int | None = None
    """Threads that decode. None: the loader's choice."""


@dataclass(frozen=True)
class FeaturesConfig:
    """Write the encoder's features of images to a file, in the order of their paths."""

    weights: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WEIGHTS")]
    """Run folder, checkpoint, .safetensors or .pth file, or a folder of transformers or timm."""
    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGES")]
    """Folder of images, list file, .tar file or folder of .tar shards, URL of shards, or Parquet files."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """.npy: float32 (n, D), with the paths in OUT.paths.txt beside it. .parquet: path, label and feature."""
    pool: Literal["avg", "cls"] = "avg"
    """Mean of the patch tokens, or the class token."""
    encoding: tyro.conf.OmitArgPrefixes[EncodingConfig] = field(default_factory=EncodingConfig, kw_only=True)


@dataclass(frozen=True)
class LabelledConfig:
    """Labelled images."""

    path: Path
    """Images to learn from: a folder per class, a list file with labels, or shards with .cls members."""
    val: Path | None = None
    """Images to test on, with the same classes. None: a tenth of the others, spread over all classes."""
    limit: int | None = None
    """Most images to learn from and to test on, spread evenly over each data set. None: all."""


@dataclass(frozen=True)
class ProbeConfig:
    """What the protocols on a frozen encoder share."""

    weights: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WEIGHTS")]
    """Run folder, checkpoint, .safetensors or .pth file, or a folder of transformers or timm."""
    data: LabelledConfig
    out: Path | None = None
    """Also write the result here, as one JSON object."""
    seed: int = 0
    """Seed of initial values, orders, and of the images held out to choose settings."""
    encoding: tyro.conf.OmitArgPrefixes[EncodingConfig] = field(default_factory=EncodingConfig, kw_only=True)


@dataclass(frozen=True)
class KnnConfig(ProbeConfig):
    """k nearest neighbours on features; settings that are not given are chosen on a tenth of the images to learn
    from."""

    pool: Literal["avg", "cls"] = "avg"
    """Mean of the patch tokens, or the class token."""
    k: int | None = None
    """Neighbours that vote. None: chosen among 5 to 200."""
    temperature: float | None = None
    """Temperature of the votes. None: chosen among 0.02, 0.07 and 0.2."""


@dataclass(frozen=True)
class LinearConfig(ProbeConfig):
    """Linear probe: logistic regression on cached features, or the paper's training on random crops (Table 10)."""

    pool: Literal["avg", "cls"] = "avg"
    """Mean of the patch tokens, or the class token."""
    solver: Literal["logistic", "lars", "sgd"] = "logistic"
    """logistic: full-batch optimum, its penalty chosen on a tenth of the images to learn from. lars: Table 10, batch
    16,384. sgd: the same with batch 4,096."""
    l2: float | None = None
    """Penalty of the squared weights (logistic). None: chosen among 1e-6 to 10."""
    epochs: int = 90
    """Passes over the images (lars, sgd)."""
    warmup_epochs: int = 10
    """Passes with a rising learning rate (lars, sgd)."""
    base_lr: float = 0.1
    """Learning rate for a batch of 256 (lars, sgd)."""


@dataclass(frozen=True)
class AttentiveConfig(ProbeConfig):
    """Attentive probe: learned queries attend to the cached patch tokens; the learning rate is chosen on a tenth of the
    images to learn from."""

    queries: int = 12
    """Learned queries; must divide the encoder's width."""
    lr: float | None = None
    """Peak learning rate for a batch of 256. None: chosen among 0.001, 0.003 and 0.01."""
    epochs: int = 30
    """Passes over the images."""


@dataclass(frozen=True)
class RobustnessConfig:
    """Accuracy of a classifier on other images of its classes (as ImageNet-A, -R and -Sketch), and its mean corruption
    error (as ImageNet-C)."""

    weights: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WEIGHTS")]
    """Weights with a classifier's head: a fine-tuned run, or a file or folder of another library."""
    images: tuple[Path, ...] = ()
    """Folders of images by class, each with all classes of the classifier or some of them."""
    corruptions: Path | None = None
    """Folder of corruption/severity/class/image. These images are not cropped, except to the model's aspect ratio."""
    reference: Path | None = None
    """JSON object of another classifier's error, a share from 0 to 1, by corruption. None: no mean corruption error,
    only the mean of the errors."""
    classes: Path | None = None
    """Names of the classifier's outputs in their order: a file with one per line, or the training folder. None: those
    of the fine-tuned run."""
    out: Path | None = None
    """Also write the result here, as one JSON object."""
    encoding: tyro.conf.OmitArgPrefixes[EncodingConfig] = field(default_factory=EncodingConfig, kw_only=True)


Protocol = (
    Annotated[KnnConfig, tyro.conf.subcommand("knn")]
    | Annotated[LinearConfig, tyro.conf.subcommand("linear")]
    | Annotated[AttentiveConfig, tyro.conf.subcommand("attentive")]
    | Annotated[RobustnessConfig, tyro.conf.subcommand("robustness")]
    | Annotated[FinetuneConfig, tyro.conf.subcommand("finetune", default=shown_defaults(FinetuneConfig))]
    | Annotated[PartialConfig, tyro.conf.subcommand("partial", default=shown_defaults(PartialConfig))]
    | Annotated[ScratchConfig, tyro.conf.subcommand("scratch", default=shown_defaults(ScratchConfig))]
)


@dataclass(frozen=True)
class EvaluateCommands:
    """Measure the representation that weights give, on labelled images."""

    command: Annotated[tyro.conf.OmitSubcommandPrefixes[Protocol], tyro.conf.arg(name="")]
    """The protocol."""


@dataclass(frozen=True)
class AblateConfig:
    """Pretrain and evaluate variants of a run, each with several seeds, and write a table. Run it again to continue.

    The specification is a TOML file. [pretrain]: flags of fastmae pretrain for all variants. [variants]: a name for
    each, with the flags that it changes. [evaluate]: a protocol of fastmae evaluate for each entry, with its flags.
    seeds: a list, [0] if it is missing. command: what starts fastmae, such as "torchrun --nproc-per-node 8 -m fastmae".
    """

    spec: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SPEC.toml")]
    """The specification."""
    out: Path = field(kw_only=True)
    """Folder of the runs, of results.csv (a row per run and protocol) and of table.md."""


@dataclass(frozen=True)
class FitTargetConfig:
    """Fit what --model.target can name: principal components of patches, or a codebook of patches."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGES")]
    """Folder of images, list file, .tar file or folder of .tar shards."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT.safetensors")]
    """What to write."""
    kind: Literal["pca", "codebook"] = field(kw_only=True)
    """pca: coefficients in patch space (paper, table 1d). codebook: tokens, by k-means."""
    size: int = 96
    """Coefficients (96 in the paper), or tokens."""
    images: int = 2_048
    """Images whose patches are used, one random crop of each."""
    img_size: int = 224
    """Image size in pixels."""
    patch_size: int = 16
    """Patch size in pixels."""
    in_chans: int = 3
    """Channels of the images."""
    mean: tuple[float, ...] | None = None
    """As --model.mean."""
    std: tuple[float, ...] | None = None
    """As --model.std."""
    seed: int = 0
    """Seed of the images and crops."""


@dataclass(frozen=True)
class PlotConfig:
    """Draw the losses of runs and the accuracies measured during them, or those in a table of fastmae ablate."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Run folders, finished or still training; or one results.csv of fastmae ablate or the folder that holds it, for
    accuracies over the value of the flag that varies, or by variant."""
    out: Path = Path("curves.png")
    """The figure to write: .png, .pdf or .svg."""
    x: Literal["epoch", "step", "samples"] = "epoch"
    """Abscissa: passes over the images, optimiser steps, or images."""


@dataclass(frozen=True)
class EnvConfig:
    """Print versions, devices, kernels and attention backends: paste it into a bug report."""


@dataclass(frozen=True)
class ImagesConfig:
    """Which images count as good: as for fastmae pretrain, so that both mean the same data set."""

    channels: int = 3
    """Channels of the images; images with others count as bad."""
    value_range: tuple[float, ...] | None = None
    """Lowest and highest value of 16-bit and floating-point pixels, or a pair for each channel in turn."""
    channels_first: bool = False
    """.npy files are (channels, height, width)."""
    max_pixels: int = MAX_PIXELS
    """Largest height x width; a larger image counts as bad, as a possible decompression bomb."""
    num_workers: Annotated[int | None, tyro.conf.arg(aliases=("--workers",))] = None
    """Threads, or processes of data index and shard, that read and decode. None: one per core."""
    index: Path | None = None
    """Where the index lies, as for fastmae pretrain."""


@dataclass(frozen=True)
class SourceConfig:
    """Images of a data set."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """Folder of images, list file, .tar file or folder of .tar shards, URL of shards, or Parquet files."""
    images: tyro.conf.OmitArgPrefixes[ImagesConfig] = field(default_factory=ImagesConfig, kw_only=True)
    """How the images are read."""


@dataclass(frozen=True)
class BenchConfig:
    """Measure the loader alone, the model alone and both together; report where a step's time goes, what the bottleneck
    is and what would help. Takes the flags of fastmae pretrain; one process, one micro-batch per optimiser step."""

    recipe: RecipeName = "photographs"
    """Where the defaults of all other flags come from."""
    seconds: float = 20.0
    """Approximate duration of the measurement, without start and warm-up; slow steps take longer."""
    json: Path | None = None
    """Also write all results to this file."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class ShardConfig(SourceConfig):
    """Pack images into verified WebDataset tar shards, each with an index. If interrupted, the same command resumes and
    ends with the same bytes."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder for the shards: new, empty, or left by this command when interrupted. Not inside PATH."""
    short_side: int | None = None
    """Shrink photographs to this short side in pixels and store them as JPEG, upright; smaller ones keep their bytes,
    and so do 16-bit, TIFF and NumPy files. 256 is usual for training at 224. None: every file's bytes as they are."""
    quality: int = 90
    """JPEG quality of re-encoded images, 1 to 100 (chroma at half resolution, as cameras store it)."""
    reencode: bool = False
    """Re-encode all photographs as JPEG, also those that keep their size."""
    shard_bytes: int = 256 << 20
    """Target size of a shard. Smaller shards give more parallelism and less to repeat after a failure; larger ones,
    fewer files."""
    images_per_shard: int | None = None
    """Most images in a shard; overrides --shard-bytes."""
    shuffle_seed: int | None = 0
    """Seed of the packing order, so that a sequential reader does not see classes one after the other. None: by
    name."""
    part: str = "1/1"
    """Pack one part of n, for several machines that share OUT: 1/4 here, 2/4 there, and so on, at the same time or one
    after the other. The last one to end completes OUT."""
    max_bad_fraction: float = 0.01
    """Stop if more than this share of the images is bad. Otherwise bad images are skipped and listed in
    OUT/bad_files.jsonl."""


@dataclass(frozen=True)
class IndexConfig(SourceConfig):
    """Build the index, or bring it up to date: read the header of every image that is new or has changed. Runs whose
    --data.index is this --index then open it and list no images. If interrupted, the same command continues. Tar shards
    also get an index each, beside them."""


@dataclass(frozen=True)
class VerifyConfig(SourceConfig):
    """Decode every image in full and store the bad ones in the index, so that training replaces them from the start.
    Ctrl-C keeps what was found so far. Exit code 1 if more than --max-bad-fraction are bad."""

    out: Path | None = None
    """Also write the bad files here as they are found, one JSON object per line."""
    max_bad_fraction: float = 0.01
    """Share of bad files up to which the exit code is 0."""
    start: int = 0
    """Number of the first image to decode, as an interrupted verification prints it."""
    strict: bool = False
    """Also count JPEGs as bad that decode with a warning, because data in the middle is missing or wrong and part of
    the image is grey or shifted. By default they are only listed."""


@dataclass(frozen=True)
class StatsConfig(SourceConfig):
    """Report count, sizes, formats and modes of the images, the bad ones, and each channel's mean and standard
    deviation as flags of fastmae pretrain."""

    sample: int = 2000
    """Images to decode for mean and standard deviation, drawn at random. 0: none."""
    seed: int = 0
    """Seed of the sample."""
    json: bool = False
    """Print JSON instead of tables."""


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
