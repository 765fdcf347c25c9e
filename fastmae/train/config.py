"""The configuration of a pretraining run: every flag of ``fastmae pretrain`` with its type, default, rule and help.

A field is defined here and nowhere else. Its annotation carries its rule (``rules.py`` checks it) and what a resumed
run may do with it: ``Free`` fields may differ without a word, ``Fixed`` ones must not, other differences are warnings.
Defaults come from a recipe, flags override them, and the result is saved as ``config.json`` in the run folder. This
module does not import PyTorch, so that ``--help`` is fast.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from fastmae.train.rules import (
    MAX_PIXELS,
    Area,
    Decays,
    Fixed,
    Free,
    MaskCount,
    NonNegativeFloat,
    NonNegativeInt,
    OpenShare,
    Ordered,
    Pixels,
    PositiveFloat,
    PositiveInt,
    Probability,
    Seed,
    Share,
    Strength,
    resume_policy,
)

try:
    from tyro.conf import Suppress
except ImportError:  # only the command line parses flags; training and benchmarks run without its parser
    Suppress = None

ParallelMode = Literal["none", "ddp", "fsdp", "hsdp"]
Precision = Literal["bf16", "fp16", "fp32"]
ActivationCheckpointing = Literal["none", "selective", "full"]
Compile = Literal["none", "blocks", "model"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
RecipeName = Literal[
    "photographs",
    "imagenet-vit-b",
    "imagenet-vit-l",
    "imagenet-vit-h",
    "imagenet-vit-b-1600",
    "imagenet-vit-l-1600",
    "imagenet-vit-h-1600",
    "imagenet-vit-b-100",
    "small-data",
    "adapt-vit-b",
]


@dataclass(frozen=True)
class ModelConfig:
    """The masked autoencoder. Widths and depths left at None are those of the named preset."""

    name: str = "mae_vit_base_patch16"
    """Preset: mae_vit_{tiny,small,base,large}_patch16 or mae_vit_huge_patch14."""
    img_size: int | tuple[int, int] = 224
    """Image size in pixels: one number for a square, or height and width."""
    patch_size: int | tuple[int, int] | None = None
    """Patch size in pixels, one number or height and width; must divide the image size. None: the preset's."""
    in_chans: PositiveInt = 3
    """Channels of the images: 3 for colour, 1 for grey, any number for TIFF and .npy files."""
    mean: tuple[float, ...] | None = None
    """Mean of the pixels in [0, 1] units, one number a channel, as fastmae data stats prints it. None: ImageNet's for
    three channels, else 0.5."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the pixels in [0, 1] units, one number a channel. None: ImageNet's for three channels, else
    0.5."""
    mask_ratio: OpenShare = 0.75
    """Share of patches that is hidden from the encoder, strictly between 0 and 1."""
    mask_strategy: Literal["random", "block", "grid"] = "random"
    """Which patches are masked (paper, table 1f). random: any. block: rectangles, as in BEiT; the paper finds it worse
    at a ratio of 0.75 than at 0.5. grid: all but one of every four, ratio 0.75 only."""
    norm_pix_loss: bool = False
    """Predict pixels normalised by each patch's own mean and standard deviation (paper, section 3)."""
    embed_dim: PositiveInt | None = None
    """Encoder width."""
    depth: PositiveInt | None = None
    """Encoder blocks."""
    num_heads: PositiveInt | None = None
    """Encoder attention heads."""
    decoder_embed_dim: PositiveInt | None = None
    """Decoder width."""
    decoder_depth: PositiveInt | None = None
    """Decoder blocks."""
    decoder_num_heads: PositiveInt | None = None
    """Decoder attention heads."""
    attention: Literal["auto", "plain", "sdpa", "xformers", "triton"] = "auto"
    """Attention backend. auto picks by shape, precision and device; a named one that is missing is an error."""
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    """Residual stream under bf16 autocast. float32: as in the paper's code. bfloat16: rounded after every add; less
    memory traffic, and not the same computation."""


@dataclass(frozen=True)
class DataConfig:
    """Where images come from, and how they are cropped and changed."""

    path: Free[Path | None] = None
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
    max_bad_fraction: Free[Share] = 0.01
    """Share of the files that may be damaged or refused before the run stops, counted over all ranks whenever a row is
    logged or a checkpoint saved. Up to it they are listed with reasons in bad_files.jsonl and other images take their
    place. 0: stop at the first."""
    max_pixels: Pixels = MAX_PIXELS
    """Largest image, height x width, that is decoded; larger ones count as bad. The default, which is the most, is
    Pillow's limit against decompression bombs."""
    crop: Literal["random", "center", "fixed"] = "random"
    """Cropping (paper, table 1e). random: random resized crop, by scale and ratio. fixed: the short side resized to the
    image size, then a random crop. center: the same with the central crop, the paper's "none"."""
    scale: Area = (0.2, 1.0)
    """Area of the random crop as a share of the image's, smallest and largest. 0.2 to 1: facebookresearch/mae's."""
    ratio: Ordered = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the random crop, smallest and largest."""
    hflip: Probability = 0.5
    """Probability of a horizontal flip."""
    vflip: Probability = 0.0
    """Probability of a vertical flip, for pictures that have no up and down: satellite, microscopy."""
    color_jitter: Strength = 0.0
    """Strength of colour jitter: brightness, contrast and saturation change by factors up to 1 +- this, and hue turns
    by up to a quarter of this, as a share of the colour circle. The paper finds that it does not help (table 1e)."""
    progressive_sizes: tuple[int, ...] = ()
    """Image heights of successive equal shares of the run, each of whole passes over the images, widths in proportion;
    the last is the image size. Small images first make a run shorter: 160 192 224 (DailyMAE, Wu et al. 2024). Empty:
    the image size all along."""
    num_threads: Free[PositiveInt | None] = None
    """Threads that decode and resize. None: the loader's choice."""
    prefetch: Free[PositiveInt | None] = None
    """Batches made ahead. None: the loader's choice."""
    timeout: Free[PositiveFloat] = 600.0
    """Seconds to wait for a batch before the run ends with an error, as a file system that hangs gives none."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, and how the run is logged and saved. The defaults are Table 8 of the paper,
    except for length and warm-up, which the recipe sets."""

    global_batch_size: Fixed[PositiveInt] = 4096
    """Masked images that one optimiser step averages over, an image masked several times counted as many times. The
    learning rate follows it: base_lr * global_batch_size / 256."""
    batch_size: PositiveInt | Literal["auto"] | None = None
    """Masked images in one forward pass on one device, at most; gradients accumulate up to the global batch, which must
    be a multiple. With several processes it is the largest divisor of their share of the global batch that is not
    larger. auto: the largest that fits the GPU, by a short trial. None: no accumulation."""
    masks_per_image: Fixed[MaskCount] = 1
    """Masks for each decoded image, which is read in place for every one of them (repeated sampling, Feichtenhofer et
    al. 2022; there each with a crop of its own, here all of one crop). Batches and epochs count masked images, so that
    the steps, their size and the learning rate stay as they are and decoding is divided by this number."""
    epochs: PositiveFloat | None = None
    """Length of the run in passes over the data, an image masked several times counted as many times. Give this or
    steps, not both."""
    steps: PositiveInt | None = None
    """Length of the run in optimiser steps. Give this or epochs, not both."""
    warmup_epochs: NonNegativeFloat | None = None
    """Linear warm-up, in passes over the data. Give this or warmup_steps, not both; with neither, the recipe's,
    but never a larger share of the run than the recipe's."""
    warmup_steps: NonNegativeInt | None = None
    """Linear warm-up, in optimiser steps."""
    base_lr: PositiveFloat = 1.5e-4
    """Learning rate for a batch of 256; scaled linearly with the global batch."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the cosine, not scaled."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's weight decay; biases and norms have none."""
    betas: Decays = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moment."""
    optimizer: Literal["adamw", "apex"] = "adamw"
    """adamw: PyTorch's fused AdamW. apex: FusedAdam of NVIDIA's apex, if installed; the same computation on CUDA, not
    with fsdp or hsdp."""
    init_from: Fixed[Path | None] = None
    """Weights to start from: a .pth file of facebookresearch/mae, .safetensors under its names, a folder of a Hugging
    Face ViTMAE, a run folder or a checkpoint. All shapes must fit; a decoder that is not there is drawn anew. A resumed
    run goes on from its own checkpoint. None: random weights."""
    clip_grad: PositiveFloat | None = None
    """Largest global gradient norm. None: no clipping."""
    rollback_after: Free[PositiveInt] = 20
    """Steps in a row without a finite gradient, each of them skipped, after which the run goes back to the newest
    checkpoint before them and on with other images."""
    max_rollbacks: Free[NonNegativeInt] = 3
    """Times that a run goes back before it ends with an error."""
    seed: Fixed[Seed] = 0
    """Seed of the initialisation, the sample order, the crops and the masks."""
    precision: Literal["auto", Precision] = "auto"
    """bf16: autocast to bfloat16, weights and optimiser in float32. fp16: the same with float16 and a loss scale, for
    GPUs without bfloat16. auto: bf16 on CUDA, on a CPU whichever of bf16 and fp32 multiplies matrices faster, measured
    at the start; a resumed run keeps what was chosen."""
    compile: Compile = "none"
    """Compile with torch.compile. blocks: each block, which takes seconds, since blocks of one shape share their code.
    model: the whole model, which takes minutes; in several processes each block all the same."""
    compile_mode: CompileMode = "default"
    """Mode of torch.compile. reduce-overhead: CUDA graphs, on a GPU and not with fsdp or hsdp. max-autotune: these, and
    matrix products chosen by trial at the first step, which takes minutes. max-autotune-no-cudagraphs: trial only."""
    cuda_graph: bool = False
    """Capture the whole step (forward, backward, clipping, update) in a CUDA graph after three ordinary ones, so that
    the host launches it at once. The same computation. On one GPU, with images of one size."""
    parallel: Literal["auto", ParallelMode] = "auto"
    """What the processes that torchrun starts share. ddp: gradients; each has the whole model. fsdp: also weights and
    optimiser state, sharded over all. hsdp: sharded inside a node, replicated across nodes. auto: none for one process,
    ddp for several."""
    shard_size: PositiveInt | None = None
    """Processes that share one copy of the model with hsdp. None: those of a node."""
    timeout: Free[PositiveFloat] = 1200.0
    """Seconds after which a collective that some process does not reach ends the run. More than --data.timeout, so that
    a process that gets no images reports that first."""
    activation_checkpointing: Free[ActivationCheckpointing] = "none"
    """Recompute activations in the backward to save memory. selective: the blocks' attention, two fifths fewer
    activations for about a tenth more operations. full: the blocks, three quarters fewer for about a quarter more."""
    reshard_after_forward: Free[bool] = True
    """With fsdp and hsdp, free a block's gathered weights after its forward and gather them again for its backward.
    Off: faster for small models, which then take their whole memory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: CUDA where there is a GPU."""
    num_threads: PositiveInt | None = None
    """CPU threads of PyTorch. None: PyTorch's default. Exact resume needs the same number."""
    max_minutes: Free[PositiveFloat | None] = None
    """End the training after this many minutes even if steps are left. None: no limit."""
    fit_steps: bool = False
    """Fit the run into max_minutes: time the first steps, then set the number of steps once, at most the one given, so
    that the learning rate's cosine ends in time. A resumed run keeps the number. Naming --train.steps or --train.epochs
    turns a recipe's fit_steps off."""
    log_every_steps: Free[PositiveInt] = 20
    """Steps between two rows of metrics."""
    checkpoint_every_steps: Free[PositiveInt | None] = None
    """Steps between two checkpoints. None: by time only. The end of the run is always saved."""
    checkpoint_every_seconds: Free[PositiveFloat | None] = 600.0
    """Seconds between two checkpoints. None: by steps only."""
    keep_checkpoints: Free[PositiveInt] = 3
    """Number of newest checkpoints to keep."""
    keep_every_steps: Free[PositiveInt | None] = None
    """Checkpoints whose step is a multiple of this are kept for ever. None: none is."""
    background_save: Free[bool | None] = None
    """Write checkpoints while the training goes on, which waits for a copy in host memory only. None: on a GPU."""


@dataclass(frozen=True)
class ReportConfig:
    """What a run tells while it trains, beside the rows of metrics. None of it changes the training."""

    picture_every_steps: PositiveInt | None = None
    """Steps between two reconstruction pictures of the same images. None: one at the end."""
    probe_every_epochs: PositiveFloat | None = None
    """Epochs between two probes of the features, by nearest neighbours and a linear classifier, for images that have
    labels. None: no probe."""
    probe_images: PositiveInt = 10_000
    """Labelled images that the probe looks at, at most."""
    probe_path: Path | None = None
    """Labelled images to test the probe on. None: a tenth of those it looks at."""
    profile_at_step: PositiveInt | None = None
    """Step from which on a trace is recorded, in traces/. None: no trace."""
    profile_steps: PositiveInt = 3
    """Steps that the trace holds."""
    wandb_project: str | None = None
    """Project of Weights & Biases that gets the metrics too; needs the package wandb. None: none."""
    stall_seconds: PositiveFloat = 300.0
    """Seconds without a step after which the processes that lag are named."""


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a masked autoencoder. Without arguments: a small model on the embedded photographs, minutes on a CPU."""

    out: Free[Path | None] = None
    """Run folder. None: runs/<recipe>-<date>-<time>."""
    resume: Free[bool] = False
    """Continue the run in --out from its newest checkpoint, with its configuration; flags given here override it."""
    recipe: Free[RecipeName] = "photographs"
    """Where the defaults of all other flags come from. With --data.path and no recipe: small-data."""
    recipe_version: Annotated[int, Suppress] = 1
    """Version of the recipe; the recipe sets it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    report: Free[ReportConfig] = field(default_factory=ReportConfig)

    @property
    def img_size(self) -> tuple[int, int]:
        """Image size as (height, width)."""
        size = self.model.img_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def model_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``fastmae.create_model``."""
        arguments = asdict(self.model)
        del arguments["mask_ratio"], arguments["mask_strategy"]
        return arguments | {"img_size": self.img_size, "seed": self.train.seed}

    def dataset_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``fastmae.data.open_dataset``."""
        names = ("value_range", "channels_first", "max_bad_fraction", "max_pixels")
        return {"channels": self.model.in_chans} | {name: getattr(self.data, name) for name in names}


def to_json(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as JSON-able nested dictionaries."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return plain(asdict(config))


def updated(values: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with what earlier versions wrote otherwise: ``train.compile`` was a bool."""
    train = dict(values.get("train", {}))
    if isinstance(train.get("compile"), bool):
        train["compile"] = "model" if train["compile"] else "none"
    return values | {"train": train}


def from_json(values: dict[str, Any]) -> PretrainConfig:
    """The configuration from what :func:`to_json` returned, now or in an earlier version; fields that it lacks take
    their default.

    Raises:
        ValueError: for a field that this version does not know.
    """

    def build(kind: type, values: dict[str, Any], prefix: str) -> Any:
        hints, names = get_type_hints(kind), {f.name for f in fields(kind)}
        if unknown := sorted(values.keys() - names):
            raise ValueError(f"config: unknown field {prefix}{unknown[0]}; expected one of {', '.join(sorted(names))}")
        return kind(**{name: read(hints[name], value, f"{prefix}{name}.") for name, value in values.items()})

    def read(hint: Any, value: Any, prefix: str) -> Any:
        if is_dataclass(hint):
            return build(hint, value, prefix)
        if isinstance(value, str) and hint in (Path, Path | None):
            return Path(value)
        return tuple(value) if isinstance(value, list) else value

    return build(PretrainConfig, updated(values), "")


def read_config(run_folder: Path) -> PretrainConfig | None:
    """The configuration of the run in a folder; None where no run began.

    Raises:
        ValueError: if ``config.json`` is not a configuration of this version.
    """
    path = run_folder / "config.json"
    return from_json(json.loads(path.read_text())) if path.is_file() else None


def compare(saved: dict[str, Any], here: dict[str, Any]) -> Iterator[tuple[str, Any, Any, str | None]]:
    """How a resumed run's configuration differs from the saved one, both as :func:`to_json` returns them.

    A configuration of an earlier version lacks fields, which then had what is their default now.

    Yields:
        Name, such as "train.seed"; value there; value here; ``FREE``, ``FIXED`` or None.
    """
    defaults = dict(_flat(to_json(PretrainConfig())))
    saved, here = defaults | dict(_flat(updated(saved))), defaults | dict(_flat(here))
    policies = dict(_policies(PretrainConfig))
    for name in sorted(saved.keys() | here.keys()):
        if saved.get(name) != here.get(name):
            yield name, saved.get(name), here.get(name), policies.get(name)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _policies(kind: type, prefix: str = "", inherited: Any = None) -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(kind, include_extras=True).items():
        policy, bare = resume_policy(hint) or inherited, get_type_hints(kind)[name]
        if is_dataclass(bare):
            yield from _policies(bare, f"{prefix}{name}.", policy)
        else:
            yield f"{prefix}{name}", policy
