"""The configuration of a run that trains a classifier: the flags of ``fastmae evaluate finetune``, ``partial`` and
``scratch``, and their recipes.

Sections are those of pretraining (:mod:`fastmae.train.config`) with what classifiers have beside. This module does not
import PyTorch, so that ``--help`` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from fastmae.train.config import (
    AttentionBackend,
    DataConfig,
    EncoderConfig,
    Fixed,
    Free,
    LogConfig,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Proportion,
    Rule,
    Suppress,
    TrainConfig,
    between,
)

try:
    from tyro.conf import Positional, arg
except ImportError:  # only the command line parses flags
    Positional, arg = None, lambda **options: None

RecipeName = Literal["vit-b", "vit-l", "vit-h"]
Probability = Annotated[float, Rule("a probability in [0, 1)", lambda v: 0 <= v < 1)]


@dataclass(frozen=True)
class HeadConfig:
    """What classifiers of every origin have."""

    pool: Literal["avg", "cls"] = "avg"
    """What the head takes: the mean of the patch tokens, as facebookresearch/mae does by default, or the class
    token."""
    drop_path: Probability = 0.1
    """Probability that a step leaves out a branch of the last block for an image; it rises linearly from 0 in the
    first."""


@dataclass(frozen=True)
class ClassifierModelConfig(HeadConfig):
    """The classifier. Its encoder is that of WEIGHTS."""

    img_size: int | tuple[int, int] | None = None
    """Image size in pixels: one number for a square, or height and width. None: that of the weights."""
    positions: Literal["recompute", "interpolate"] = "recompute"
    """Position tables of another image size. recompute: sine-cosine tables. interpolate: bicubic, for learnt ones."""
    attention: AttentionBackend = "auto"
    """Attention backend, as for fastmae pretrain."""


@dataclass(frozen=True)
class ScratchModelConfig(HeadConfig, EncoderConfig):
    """The classifier. Widths and depths left at None are those of the named preset."""

    name: str = "vit_base_patch16"
    """Preset: vit_{tiny,small,base,large}_patch16 or vit_huge_patch14."""


@dataclass(frozen=True)
class LabelledDataConfig(DataConfig):
    """Labelled images, and how they are read, cropped and augmented."""

    path: Free[Path | None] = None
    """Images to learn from: a folder per class, a list file with labels, or shards with .cls members."""
    val: Free[Path | None] = None
    """Images to test on, with the same classes. None: a tenth of the others, spread over all classes."""
    limit: Fixed[PositiveInt | None] = None
    """Most images to learn from and to test on, spread evenly over each data set. None: all."""
    crop_ratio: Free[Annotated[float, Rule("above 0, at most 1", lambda v: 0 < v <= 1)]] = 0.875
    """Side of the centred crop of test images relative to the largest of its aspect ratio; 0.875 is 224 of 256 pixels.
    1 for small images."""
    scale: Annotated[tuple[float, float], Rule("0 < smallest <= largest <= 1", lambda v: 0 < v[0] <= v[1] <= 1)] = (
        0.08,
        1.0,
    )
    """Smallest and largest area of the random crop, as a fraction of the image's."""
    randaugment: Annotated[float, between(0, 10)] = 9.0
    """RandAugment's magnitude: two operations, each applied with probability 0.5, by timm's increasing scales. 0:
    none."""
    randaugment_std: NonNegativeFloat = 0.5
    """Standard deviation of the magnitude."""
    erasing: Proportion = 0.25
    """Probability that a rectangle of an image is replaced by noise (facebookresearch/mae's commands; not in the
    paper)."""
    mixup: NonNegativeFloat = 0.8
    """alpha of mixup: images are blended in pairs. 0: none."""
    cutmix: NonNegativeFloat = 1.0
    """alpha of cutmix: a rectangle comes from the other image of the pair. With both, each pair gets one of them."""
    label_smoothing: Proportion = 0.1
    """Share of a target that is spread over all classes."""
    progressive_sizes: Annotated[tuple[int, ...], Suppress] = ()
    """Not for classifiers."""


@dataclass(frozen=True)
class ClassifierTrainConfig(TrainConfig):
    """Optimisation, and how the run is logged and saved."""

    layer_decay: Annotated[float, Rule("above 0, at most 1", lambda v: 0 < v <= 1)] = 0.75
    """Factor of the learning rate from one layer to the one before it; the head has the whole rate. 1: one rate."""
    average: Probability = 0.0
    """Decay of a moving average of the weights, which is what is tested and exported; min(decay, (1 + step) / (10 +
    step)), so that a short run's average follows. 0: none."""
    masks_per_image: Annotated[int, Suppress] = 1
    """Not for classifiers."""
    init_from: Annotated[Path | None, Suppress] = None
    """Not for classifiers."""
    init_positions: Annotated[str | None, Suppress] = None
    """Not for classifiers."""
    init_patches: Annotated[str | None, Suppress] = None
    """Not for classifiers."""
    init_channels: Annotated[str | None, Suppress] = None
    """Not for classifiers."""


@dataclass(frozen=True)
class ClassifierReportConfig(LogConfig):
    """What a run reports beside its rows of metrics. None of it changes the training."""

    test_every_epochs: PositiveFloat | None = 1.0
    """Epochs between two tests on the test images. None: at the end only."""


@dataclass(frozen=True)
class ClassifierConfig:
    """What the commands share."""

    protocol: Annotated[str, Suppress] = ""
    """Which of the commands it is of."""
    run_folder: Free[Path | None] = None
    """Run folder: configuration, metrics, checkpoints and final weights. None: runs/<protocol>-<date>-<time>."""
    resume: Free[bool] = False
    """Continue the run in --run-folder from its newest checkpoint, with its configuration; flags given here override
    it."""
    out: Free[Path | None] = None
    """Also write the result here, as one JSON object."""
    recipe: Free[RecipeName | None] = None
    """Where the defaults of all other flags come from; those shown here are vit-b's. None: by the width of the
    model."""
    model: HeadConfig = field(default_factory=HeadConfig)
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    train: ClassifierTrainConfig = field(default_factory=ClassifierTrainConfig)
    report: Free[ClassifierReportConfig] = field(default_factory=ClassifierReportConfig)

    folder_flag: ClassVar[str] = "run_folder"
    """Which field is the run folder."""

    @property
    def command(self) -> str:
        """The command that trains it."""
        return f"fastmae evaluate {self.protocol}"


Weights = Annotated[Path | None, Positional, arg(metavar="WEIGHTS")]


@dataclass(frozen=True)
class FinetuneConfig(ClassifierConfig):
    """Fine-tune a classifier end to end (paper, Table 9). Starts, logs, saves and resumes as fastmae pretrain does."""

    protocol: Annotated[str, Suppress] = "finetune"
    """The command."""
    model: ClassifierModelConfig = field(default_factory=ClassifierModelConfig)
    weights: Fixed[Weights] = None
    """Run folder, checkpoint, .safetensors or .pth file, or a folder of transformers or timm."""


@dataclass(frozen=True)
class PartialConfig(FinetuneConfig):
    """Fine-tune the last blocks only (paper, Figure 9). Starts, logs, saves and resumes as fastmae pretrain does."""

    protocol: Annotated[str, Suppress] = "partial"
    """The command."""
    blocks: Fixed[float] = 1.0
    """Last blocks that are trained, with the norm behind them and the head. 0: the head only, a linear probe. 0.5: the
    MLP of the last block. All of them: everything, as finetune does."""


@dataclass(frozen=True)
class ScratchConfig(ClassifierConfig):
    """Train a classifier from random weights (paper, Table 11), to compare with. Starts, logs, saves and resumes as
    fastmae pretrain does."""

    protocol: Annotated[str, Suppress] = "scratch"
    """The command."""
    model: ScratchModelConfig = field(default_factory=ScratchModelConfig)

    @property
    def weights(self) -> None:
        """There are none to start from."""


# ---------------------------------------------------------------------------------------------------------------------
# Recipes

_WIDTHS = {"vit-b": 0, "vit-l": 1024, "vit-h": 1280}
"""Smallest widths."""


def recipe_name(width: int) -> RecipeName:
    """The recipe for an encoder of a width: smaller ones than ViT-B take its recipe."""
    return max((name for name, least in _WIDTHS.items() if least <= width), key=_WIDTHS.__getitem__)


def classifier_recipe(kind: type[ClassifierConfig], name: RecipeName = "vit-b") -> Any:
    """The paper's settings for a protocol and an encoder.

    Table 9 has one rate (1e-3), layer decay (0.75) and drop path (0.1, ViT-H 0.2). For ViT-B, rate and layer decay are
    those of facebookresearch/mae's command, 5e-4 and 0.65; its drop path for ViT-L and ViT-H, 0.2 and 0.3, is not used.
    Random erasing, the smallest rate and the crop's scale come from there too.
    """
    base, huge = name == "vit-b", name == "vit-h"
    if kind is ScratchConfig:
        model = {"vit-b": "vit_base_patch16", "vit-l": "vit_large_patch16", "vit-h": "vit_huge_patch14"}[name]
        train = ClassifierTrainConfig(
            global_batch_size=4096,
            batch_size="auto",
            epochs=300 if base else 200,
            warmup_epochs=20,
            base_lr=1e-4,
            weight_decay=0.3,
            betas=(0.9, 0.95),
            layer_decay=1.0,
            average=0.9999,
        )
        # The paper has no random erasing here.
        data = LabelledDataConfig(erasing=0.0)
        drop_path = 0.1 if base else 0.2
        return kind(recipe=name, model=ScratchModelConfig(name=model, drop_path=drop_path), data=data, train=train)
    train = ClassifierTrainConfig(
        global_batch_size=1024,
        batch_size="auto",
        epochs=100 if base else 50,
        warmup_epochs=5,
        base_lr=5e-4 if base else 1e-3,
        min_lr=1e-6,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        layer_decay=0.65 if base else 0.75,
    )
    return kind(recipe=name, model=ClassifierModelConfig(drop_path=0.2 if huge else 0.1), train=train)


def shown_defaults(kind: type[ClassifierConfig]) -> Any:
    """What ``--help`` shows, before it is known how wide the model is."""
    return replace(classifier_recipe(kind), recipe=None)


def settled(parsed: ClassifierConfig, base: Any, given: set[str]) -> Any:
    """``base``, a recipe or a resumed run's configuration, with the fields of ``parsed`` that were ``given``, such as
    "train.base_lr", and what the command says of this run alone."""
    for section in ("model", "data", "train", "report"):
        names = {name.partition(".")[2] for name in given if name.startswith(f"{section}.")}
        values = {name: getattr(getattr(parsed, section), name) for name in names}
        base = replace(base, **{section: replace(getattr(base, section), **values)})
    own = {name for name in given if "." not in name and name != "recipe"}
    return replace(base, **{name: getattr(parsed, name) for name in own | {"run_folder", "resume", "out"}})
