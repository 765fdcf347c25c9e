"""The configuration of a pretraining run: every flag of ``fastmae pretrain`` with its type, default, rule and help.

A field is defined here and nowhere else. Its annotation carries the rule for its value, which ``rules.py`` checks, and
what a resumed run may do with it: ``Free`` fields may differ, ``Fixed`` ones must not, other differences are warnings.
Defaults come from a recipe, flags override them, and the result is saved as ``config.json`` in the run folder. This
module does not import PyTorch, so that ``--help`` is fast.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

try:
    from tyro.conf import Suppress
except ImportError:  # only the command line parses flags; training and benchmarks run without its parser
    Suppress = None

SECTIONS = ("model", "data", "train", "report")

ParallelMode = Literal["none", "ddp", "fsdp", "hsdp"]
Precision = Literal["bf16", "fp16", "fp32"]
ActivationCheckpointing = Literal["none", "selective", "full"]
Compile = Literal["none", "blocks", "model"]
ReduceDtype = Literal["fp32", "bf16"]
AttentionBackend = Literal["auto", "plain", "sdpa", "xformers", "triton"]
ReduceEvery = Literal["step", "micro-batch"]
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

# ---------------------------------------------------------------------------------------------------------------------
# Annotations: what a resumed run may change, and what values a field takes

T = TypeVar("T")
FREE, FIXED = "may differ when a run is resumed", "must not differ when a run is resumed"
Free, Fixed = Annotated[T, FREE], Annotated[T, FIXED]


@dataclass(frozen=True)
class Rule:
    """What a value must be: in words for the error message, and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def between(low: float, high: float) -> Rule:
    """Both ends included."""
    return Rule(f"a number from {low} to {high}", lambda v: low <= v <= high)


_POSITIVE = Rule("a positive number", lambda v: 0 < v < math.inf)
_NON_NEGATIVE = Rule("a number of at least 0", lambda v: 0 <= v < math.inf)
_FINITE = Rule("finite numbers", lambda v: all(map(math.isfinite, v)))
PositiveInt, PositiveFloat = Annotated[int, _POSITIVE], Annotated[float, _POSITIVE]
NonNegativeInt, NonNegativeFloat = Annotated[int, _NON_NEGATIVE], Annotated[float, _NON_NEGATIVE]
Proportion = Annotated[float, between(0, 1)]
Decay = Annotated[float, Rule("numbers in [0, 1)", lambda v: 0 <= v < 1)]
Interval = Annotated[tuple[float, float], Rule("two numbers, 0 < smallest <= largest", lambda v: 0 < v[0] <= v[1])]
MAX_PIXELS = 178_956_970
"""Pillow's limit against decompression bombs."""

# ---------------------------------------------------------------------------------------------------------------------
# The fields


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder. Widths and depths left at None are those of the named preset."""

    name: str = "mae_vit_base_patch16"
    """Preset: mae_vit_{tiny,small,base,large}_patch16 or mae_vit_huge_patch14."""
    img_size: int | tuple[int, int] = 224
    """Image size in pixels: one number for a square, or height and width."""
    patch_size: int | tuple[int, int] | None = None
    """Patch size in pixels, one number or height and width; must divide the image size. None: the preset's."""
    in_chans: PositiveInt = 3
    """Channels of the images: 3 for colour, 1 for grey, any number for TIFF and .npy files."""
    mean: Annotated[tuple[float, ...], _FINITE] | None = None
    """Mean of the pixels in [0, 1] units, one number per channel, as fastmae data stats prints it. None: ImageNet's for
    three channels, else 0.5."""
    std: Annotated[tuple[float, ...], _FINITE] | None = None
    """Standard deviation of the pixels, likewise. None: ImageNet's for three channels, else 0.5."""
    embed_dim: PositiveInt | None = None
    """Encoder width."""
    depth: PositiveInt | None = None
    """Encoder blocks."""
    num_heads: PositiveInt | None = None
    """Encoder attention heads."""
    attention: AttentionBackend = "auto"
    """Attention backend. auto picks by shape, precision and device; a named one that is missing is an error."""


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """The masked autoencoder. Widths and depths left at None are those of the named preset."""

    mask_ratio: Annotated[float, Rule("a number strictly between 0 and 1", lambda v: 0 < v < 1)] = 0.75
    """Fraction of the patches that is hidden from the encoder."""
    mask_strategy: Literal["random", "block", "grid", "fixed-grid"] = "random"
    """Which patches are masked (paper, table 1f). random: any. block: rectangles, as in BEiT; the paper finds it worse
    at a ratio of 0.75 than at 0.5. grid: all but one of every four, ratio 0.75 only; which one is drawn for each image.
    fixed-grid: always the same one."""
    norm_pix_loss: bool = False
    """Predict pixels normalised by each patch's own mean and standard deviation (paper, section 3)."""
    decoder_embed_dim: PositiveInt | None = None
    """Decoder width."""
    decoder_depth: NonNegativeInt | None = None
    """Decoder blocks. 0, with encoder_mask_tokens: predict from the encoder (table 2's smallest)."""
    decoder_num_heads: PositiveInt | None = None
    """Decoder attention heads."""
    target: str = "pixels"
    """What is predicted (table 1d). pixels. mean-color, low-resolution-N: means of a patch, or of its N x N cells. A
    file of fastmae fit-target: PCA coefficients, or tokens of a codebook. package.module:name: tokens of a tokenizer
    that name() returns, a function of images with an attribute vocab_size."""
    encoder_mask_tokens: bool = False
    """Let the encoder see masked patches as mask tokens (table 1c): about 3.3 times its work, and less accurate."""
    class_token: bool = True
    """Give the encoder a class token. Without one, features are means of patch tokens."""
    loss_on_all_patches: bool = False
    """Let the error of visible patches count as well, half a per cent less accurate in the paper (section 3)."""
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    """Residual stream under bf16 autocast. float32: as in the paper's code. bfloat16: rounded after every add; less
    memory traffic, and not the same computation."""


@dataclass(frozen=True)
class DataConfig:
    """Where images come from, and how they are read, cropped and augmented."""

    path: Free[Path | None] = None
    """Folder of images (nested or flat), folder of .tar shards, one .tar, Parquet files, or a .txt or .tsv file: one
    path per line, optionally followed by a tab and a label. Shards may be at a URL: s3://bucket/folder. None: the
    embedded photographs."""
    index: Free[Path | None] = None
    """Where the index of the images lies: an existing one is trusted, and the images are not listed; fastmae data
    index refreshes it. If there is none yet, rank 0 builds it. None: .fastmae in the images' folder, or beside it
    if it holds class folders, or, where that cannot be written, ~/.cache/fastmae; rank 0 then lists the images at
    each start and brings the index up to date."""
    window: Fixed[NonNegativeInt | None] = None
    """Shards whose images are shuffled together, so that reading stays near few shards at a time. 0: all, full
    randomness. None: 0 up to 4,096 shards, else 256."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """Image loader. auto: DALI where it is installed and decodes the files' format, else torchvision."""
    value_range: tuple[float, ...] | None = None
    """Lowest and highest value of 16-bit and floating-point images, or such a pair for each channel; fastmae data stats
    suggests them. Values in between keep their precision (images are float32), values outside are clipped. TIFF and
    .npy files of these types need it. None: 16-bit PNG loses its lower byte."""
    channels_first: bool = False
    """.npy files are (channels, height, width) instead of (height, width, channels)."""
    max_bad_fraction: Free[Proportion] = 0.01
    """Fraction of the files that may be damaged or refused before the run stops, counted over all ranks at each row of
    metrics and each checkpoint. bad_files.jsonl lists them with reasons, and other images take their place. 0: stop at
    the first."""
    max_pixels: Annotated[int, between(1, MAX_PIXELS)] = MAX_PIXELS
    """Largest image, height x width, that is decoded; larger ones count as bad. The default is Pillow's limit against
    decompression bombs."""
    crop: Literal["random", "center", "fixed"] = "random"
    """Cropping (paper, table 1e). random: random resized crop, by scale and ratio. fixed: the short side resized to the
    image size, then a random crop. center: the same with the central crop, the paper's "none"."""
    scale: Annotated[Interval, Rule("at most 1", lambda v: v[1] <= 1)] = (0.2, 1.0)
    """Smallest and largest area of the random crop, as a fraction of the image's; 0.2 to 1 in facebookresearch/mae."""
    ratio: Interval = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of the random crop."""
    hflip: Proportion = 0.5
    """Probability of a horizontal flip."""
    vflip: Proportion = 0.0
    """Probability of a vertical flip, for pictures that have no up and down: satellite, microscopy."""
    color_jitter: Proportion = 0.0
    """Strength of colour jitter: brightness, contrast and saturation change by factors up to 1 +- this, and hue turns
    by up to a quarter of this, as a fraction of the colour circle. The paper finds that it does not help (table 1e)."""
    progressive_sizes: tuple[int, ...] = ()
    """Image heights of successive equal parts of the run, each of whole epochs, widths in proportion; the last is the
    image size. Small images first shorten a run: 160 192 224 (DailyMAE, Wu et al. 2024). Empty: one size."""
    num_threads: Free[PositiveInt | None] = None
    """Threads that decode and resize. None: the loader's choice."""
    prefetch: Free[PositiveInt | None] = None
    """Batches prepared ahead. None: the loader's choice."""
    timeout: Free[PositiveFloat] = 600.0
    """Seconds to wait for a batch, for example from a file system that hangs, before the run ends with an error."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, and how the run is logged and saved. The defaults are Table 8 of the paper,
    except for length and warm-up, which the recipe sets."""

    global_batch_size: Fixed[PositiveInt] = 4096
    """Images per optimiser step; one that is masked several times counts as many times. The learning rate follows
    it: base_lr * global_batch_size / 256."""
    batch_size: PositiveInt | Literal["auto"] | None = None
    """Most images, so counted, per forward pass on one device; gradients accumulate up to the global batch. auto: the
    largest that fits the GPU, by a short trial. None: no accumulation."""
    masks_per_image: Fixed[Annotated[int, between(1, 256)]] = 1
    """Masks of each decoded image (repeated sampling, Feichtenhofer et al. 2022; there each with a crop of its own,
    here all of one crop). Batches and epochs count masked images: steps and learning rate stay as they are, and
    decoding is divided by this number."""
    epochs: PositiveFloat | None = None
    """Length of the run in passes over the data, with images counted so. Give this or steps, not both."""
    steps: PositiveInt | None = None
    """Length of the run in optimiser steps. Give this or epochs, not both."""
    warmup_epochs: NonNegativeFloat | None = None
    """Linear warm-up, in passes over the data. Give this or warmup_steps, not both; with neither, the recipe's, at most
    the recipe's fraction of the run."""
    warmup_steps: NonNegativeInt | None = None
    """Linear warm-up, in optimiser steps."""
    base_lr: PositiveFloat = 1.5e-4
    """Learning rate for a batch of 256; scaled linearly with the global batch."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the cosine, not scaled."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's weight decay; biases and norms have none."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moment; the first is also muon's momentum."""
    optimizer: Literal["adamw", "apex", "muon"] = "adamw"
    """adamw: PyTorch's fused AdamW. apex: FusedAdam of NVIDIA's apex, if installed; the same computation on CUDA. muon:
    orthogonalised momentum for the weight matrices of the blocks (Jordan et al. 2024), AdamW for the rest; not the
    paper's optimiser, and no resumed run may change to it or from it. fsdp, hsdp and --train.cuda-graph need adamw."""
    muon_lr: PositiveFloat | None = None
    """Learning rate of muon's matrices for a batch of 256, scaled, warmed up and annealed as base_lr. None: base_lr."""
    init_from: Fixed[Path | None] = None
    """Weights to start from: a .pth file of facebookresearch/mae, .safetensors under its names, a folder of a Hugging
    Face ViTMAE, a run folder or a checkpoint. Shapes must fit, or be made to by the rules below; a missing decoder is
    initialised at random. A resumed run continues from its own checkpoint. None: random weights."""
    init_positions: Fixed[Literal["recompute", "interpolate"] | None] = None
    """Rule for weights of another grid of patches. recompute: sine-cosine positions, in the old grid's coordinates.
    interpolate: learnt ones, bicubic."""
    init_patches: Fixed[Literal["pseudo-inverse"] | None] = None
    """Rule for weights of another patch size. pseudo-inverse: FlexiViT's, by which enlarged patches keep their
    embedding."""
    init_channels: Fixed[Literal["repeat", "average", "first-layer"] | None] = None
    """Rule for weights of another number of channels. repeat: the old ones in turn, which share their weights. average:
    the same weights for all. first-layer: the first channels keep their weights, new ones start at zero."""
    clip_grad: PositiveFloat | None = None
    """Largest global gradient norm. None: no clipping."""
    rollback_after: Free[PositiveInt] = 20
    """Non-finite steps in a row, each of them skipped, after which the run returns to the newest checkpoint before them
    and leaves out their images."""
    max_rollbacks: Free[NonNegativeInt] = 3
    """Rollbacks before the run ends with an error."""
    seed: Fixed[Annotated[int, Rule("an integer in [0, 2**63)", lambda v: 0 <= v < 1 << 63)]] = 0
    """Seed of the initialisation, the sample order, the crops and the masks."""
    precision: Literal["auto", Precision] = "auto"
    """bf16: autocast to bfloat16, weights and optimiser in float32. fp16: the same with float16 and a loss scale, for
    GPUs without bfloat16. auto: bf16, or fp16 there; on a CPU the faster of bf16 and fp32 in a matrix product,
    measured at the start. A resumed run keeps what was chosen."""
    compile: Compile = "none"
    """torch.compile. blocks: each block, in seconds, since blocks of one shape share their code. model: the whole
    model, in minutes; with several processes each block all the same."""
    compile_mode: CompileMode = "default"
    """Mode of torch.compile. reduce-overhead: CUDA graphs, on a GPU and not with fsdp or hsdp. max-autotune: these, and
    matrix products chosen by trial at the first step, which takes minutes. max-autotune-no-cudagraphs: trial only."""
    cuda_graph: bool = False
    """Capture the whole step (forward, backward, clipping, update) in a CUDA graph after three ordinary steps, so that
    the host launches it at once. The same computation. On one GPU, with images of one size."""
    parallel: Literal["auto", ParallelMode] = "auto"
    """How the processes of torchrun share the work. ddp: each has the whole model, gradients are averaged. fsdp:
    weights, gradients and optimiser state are sharded over all. hsdp: sharded inside a node, replicated across nodes.
    auto: none for one process, ddp for several."""
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
    Off: faster for small models, but each GPU holds all weights."""
    reduce_dtype: ReduceDtype = "fp32"
    """Precision in which several processes sum gradients. bf16: half the bytes, and not the same sum. With fsdp and
    hsdp the gradients of micro-batches then accumulate in bf16 as well, unless each is reduced."""
    reduce_every: ReduceEvery = "step"
    """When fsdp and hsdp reduce gradients that accumulate. step: once; until then each process keeps whole gradients.
    micro-batch: each time, so that it keeps only its shard and sends as many times more."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: CUDA where there is a GPU."""
    num_threads: PositiveInt | None = None
    """CPU threads of PyTorch. None: PyTorch's default. Exact resume needs the same number."""
    max_minutes: Free[PositiveFloat | None] = None
    """End the training after this many minutes even if steps are left. None: no limit."""
    fit_steps: bool = False
    """Fit the run into max_minutes: time the first steps, then set the number of steps once, at most the one given, so
    that the learning rate's cosine ends in time. A resumed run keeps the number. --train.steps or --train.epochs turns
    a recipe's fit_steps off."""
    log_every_steps: Free[PositiveInt] = 20
    """Steps between two rows of metrics."""
    checkpoint_every_steps: Free[PositiveInt | None] = None
    """Steps between two checkpoints. None: by time only. The end of the run is always saved."""
    checkpoint_every_seconds: Free[PositiveFloat | None] = 600.0
    """Seconds between two checkpoints. None: by steps only."""
    keep_checkpoints: Free[PositiveInt] = 3
    """Number of newest checkpoints to keep."""
    keep_every_steps: Free[PositiveInt | None] = None
    """Also keep every checkpoint whose step is a multiple of this. None: none."""
    background_save: Free[bool | None] = None
    """Write checkpoints while the training continues, which waits only for a copy in host memory. None: on a GPU."""

    @property
    def init_rules(self) -> dict[str, str | None]:
        """How weights of ``init_from`` are fitted; see :func:`fastmae.interop.adapt.adapt`."""
        return {"positions": self.init_positions, "patches": self.init_patches, "channels": self.init_channels}


@dataclass(frozen=True)
class LogConfig:
    """What runs of every kind report beside their rows of metrics."""

    profile_at_step: PositiveInt | None = None
    """Step from which a trace is recorded, in traces/. None: no trace."""
    profile_steps: PositiveInt = 3
    """Steps in the trace."""
    wandb_project: str | None = None
    """Project of Weights & Biases that also gets the metrics; needs the package wandb. None: none."""
    stall_seconds: PositiveFloat = 300.0
    """Seconds without a step after which the ranks that lag are named."""


@dataclass(frozen=True)
class ReportConfig(LogConfig):
    """What a run reports beside its rows of metrics. None of it changes the training."""

    picture_every_steps: PositiveInt | None = None
    """Steps between two reconstruction pictures of the same images, if pixels are predicted. None: one at the end."""
    probe_every_epochs: PositiveFloat | None = None
    """Epochs between two probes of the features, by nearest neighbours and a linear classifier, for images that have
    labels. None: no probe."""
    probe_images: PositiveInt = 10_000
    """Most labelled images that the probe uses."""
    probe_path: Path | None = None
    """Labelled images to test the probe on. None: a tenth of those that it uses."""


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

    command: ClassVar[str] = "fastmae pretrain"
    """The command that trains it."""
    folder_flag: ClassVar[str] = "out"
    """Which field is the run folder."""

    @property
    def img_size(self) -> tuple[int, int]:
        """Image size as (height, width)."""
        size = self.model.img_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def model_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``fastmae.create_model``."""
        arguments = asdict(self.model)
        for name in ("mask_ratio", "mask_strategy", "target"):
            del arguments[name]
        target = self.target()
        more = {"num_outputs": target.size if target else None, "seed": self.train.seed}
        return arguments | {"img_size": self.img_size} | more

    def target(self) -> Any:
        """What is predicted, as ``fastmae.train.targets.Target``; None for pixels. Raises ValueError."""
        if self.model.target == "pixels":
            return None
        from fastmae.model import PRESETS
        from fastmae.train.targets import create_target

        patch_size = self.model.patch_size or PRESETS.get(self.model.name, {}).get("patch_size", 16)
        sides = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        return create_target(self.model.target, sides, self.model.in_chans)

    def dataset_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``fastmae.data.open_dataset``."""
        names = ("value_range", "channels_first", "max_bad_fraction", "max_pixels")
        return {"channels": self.model.in_chans} | {name: getattr(self.data, name) for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# config.json

Config = TypeVar("Config")


def to_json(config: Any) -> dict[str, Any]:
    """The configuration as nested dictionaries: paths are strings, tuples are lists."""
    return json.loads(json.dumps(asdict(config), default=str))


def updated(values: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration in this version's terms: ``train.compile`` was a bool."""
    train = dict(values.get("train", {}))
    if isinstance(train.get("compile"), bool):
        train["compile"] = "model" if train["compile"] else "none"
    return values | {"train": train}


def from_json(values: dict[str, Any], kind: type[Config] = PretrainConfig) -> Config:
    """The inverse of :func:`to_json` for a ``kind`` of configuration, also of an earlier version's; fields that are
    missing take their default.

    Raises:
        ValueError: for a field that this version does not know.
    """

    def read(hint: Any, value: Any, name: str) -> Any:
        if is_dataclass(hint):
            hints = get_type_hints(hint)
            if unknown := sorted(value.keys() - hints.keys()):
                expected = ", ".join(sorted(hints))
                raise ValueError(f"config: unknown field {name}{unknown[0]}; expected one of {expected}")
            return hint(**{key: read(hints[key], one, f"{name}{key}.") for key, one in value.items()})
        if isinstance(value, str) and hint in (Path, Path | None):
            return Path(value)
        return tuple(value) if isinstance(value, list) else value

    return read(kind, updated(values), "")


def read_config(run_folder: Path, kind: type[Config] = PretrainConfig) -> Config | None:
    """The configuration of the run in a folder; None where no run began.

    Raises:
        ValueError: if ``config.json`` is not a configuration of this version.
    """
    path = run_folder / "config.json"
    return from_json(json.loads(path.read_text()), kind) if path.is_file() else None


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train": {"seed": 0}}`` as ``{"train.seed": 0}``."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def policies(kind: type, inherited: str | None = None) -> dict[str, Any]:
    """What a resumed run may do with each field, ``FREE``, ``FIXED`` or None, nested as the configuration is."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        own = next((m for m in getattr(hint, "__metadata__", ()) if m in (FREE, FIXED)), inherited)
        bare = getattr(hint, "__origin__", hint)
        found[name] = policies(bare, own) if is_dataclass(bare) else own
    return found
