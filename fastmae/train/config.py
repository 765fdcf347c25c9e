"""The configuration of a pretraining run: what every flag of ``fastmae pretrain`` means, and what values it takes.

Defaults come from a recipe (``recipes.py``), flags override them, and the result is printed and saved as
``config.json`` in the run folder. This module does not import PyTorch, so that ``--help`` is fast.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

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


@dataclass(frozen=True)
class DataConfig:
    """Where images come from, and how they are cropped and changed."""

    path: Path | None = None
    """Folder of images (nested or flat), folder of .tar shards, one .tar, or a .txt or .tsv file with a path a line and
    perhaps a label behind a tab. None: the embedded photographs."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """Image loader. auto: DALI where it is installed and decodes the files' format, else torchvision."""
    value_range: tuple[float, float] | None = None
    """Values of 16-bit and floating-point images that become black and white; what lies beyond is clipped. TIFF and
    .npy files of these types need it. None: 16-bit PNG loses its lower byte."""
    max_bad_fraction: float = 0.01
    """Share of the files that may be damaged or refused before the run stops. Up to it they are listed with reasons in
    bad_files.jsonl and other images take their place. 0: stop at the first."""
    max_pixels: int = 178_956_970
    """Largest image, height x width, that is decoded; larger ones count as bad. The default, which is the most, is
    Pillow's limit against decompression bombs."""
    crop: Literal["random", "center", "fixed"] = "random"
    """Cropping (paper, table 1e). random: random resized crop, by scale and ratio. fixed: the short side resized to the
    image size, then a random crop. center: the same with the central crop, the paper's "none"."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop as a share of the image's, smallest and largest."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the random crop, smallest and largest."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    vflip: float = 0.0
    """Probability of a vertical flip, for pictures that have no up and down: satellite, microscopy."""
    color_jitter: float = 0.0
    """Strength of colour jitter: brightness, contrast and saturation change by factors up to 1 +- this. The paper finds
    that it does not help (table 1e)."""
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


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, and how the run is logged and saved. The defaults are Table 8 of the paper."""

    global_batch_size: int = 4096
    """Masked images that one optimiser step averages over, an image masked several times counted as many times. The
    learning rate follows it: base_lr * global_batch_size / 256."""
    batch_size: int | None = None
    """Masked images in one forward pass on one device, at most; gradients accumulate up to the global batch, which must
    be a multiple. With several processes it is the largest divisor of their share of the global batch that is not
    larger. None: no accumulation."""
    masks_per_image: int = 1
    """Masks for each decoded image, which is read in place for every one of them (repeated sampling, Feichtenhofer et
    al. 2022; there each with a crop of its own, here all of one crop). Batches and epochs count masked images, so that
    the steps, their size and the learning rate stay as they are and decoding is divided by this number."""
    epochs: float | None = None
    """Length of the run in passes over the data, an image masked several times counted as many times. Give this or
    steps, not both."""
    steps: int | None = None
    """Length of the run in optimiser steps. Give this or epochs, not both."""
    warmup_epochs: float | None = None
    """Linear warm-up, in passes over the data. Give this or warmup_steps, not both; with neither, the recipe's,
    but never a larger share of the run than the recipe's."""
    warmup_steps: int | None = None
    """Linear warm-up, in optimiser steps."""
    base_lr: float = 1.5e-4
    """Learning rate for a batch of 256; scaled linearly with the global batch."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine, not scaled."""
    weight_decay: float = 0.05
    """AdamW's weight decay; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moment."""
    optimizer: Literal["adamw", "apex"] = "adamw"
    """adamw: PyTorch's fused AdamW. apex: FusedAdam of NVIDIA's apex, if installed; the same computation on CUDA, not
    with fsdp or hsdp."""
    init_from: Path | None = None
    """Weights to start from: a .pth file of facebookresearch/mae, .safetensors under its names, a folder of a Hugging
    Face ViTMAE, a run folder or a checkpoint. All shapes must fit; a decoder that is not there is drawn anew. A resumed
    run goes on from its own checkpoint. None: random weights."""
    clip_grad: float | None = None
    """Largest global gradient norm. None: no clipping."""
    seed: int = 0
    """Seed of the initialisation, the sample order, the crops and the masks."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """bf16: autocast to bfloat16, weights and optimiser in float32. fp16: the same with float16 and a loss scale, for
    GPUs without bfloat16."""
    compile: bool = False
    """Compile with torch.compile: the whole model in one process, each block in several."""
    parallel: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    """What the processes that torchrun starts share. ddp: gradients; each has the whole model. fsdp: also weights and
    optimiser state, sharded over all. hsdp: sharded inside a node, replicated across nodes. auto: none for one process,
    ddp for several."""
    shard_size: int | None = None
    """Processes that share one copy of the model with hsdp. None: those of a node."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Memory for time: what is computed again in the backward. selective: the MLPs, which spares two fifths of the
    activations for about a fifth more time. full: the blocks, three quarters for a third."""
    reshard_after_forward: bool = True
    """With fsdp and hsdp, free a block's gathered weights after its forward and gather them again for its backward.
    Off: faster for small models, which then take their whole memory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: CUDA where there is a GPU."""
    num_threads: int | None = None
    """CPU threads of PyTorch. None: PyTorch's default. Exact resume needs the same number."""
    max_minutes: float | None = None
    """End the training after this many minutes even if steps are left. None: no limit."""
    log_every_steps: int = 20
    """Steps between two rows of metrics."""
    checkpoint_every_steps: int | None = None
    """Steps between two checkpoints. None: by time only. The end of the run is always saved."""
    checkpoint_every_seconds: float | None = 600.0
    """Seconds between two checkpoints. None: by steps only."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints to keep."""
    keep_every_steps: int | None = None
    """Checkpoints whose step is a multiple of this are kept for ever. None: none is."""
    background_save: bool | None = None
    """Write checkpoints while the training goes on, which waits for a copy in host memory only. None: on a GPU."""


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a masked autoencoder. Without arguments: a small model on the embedded photographs, minutes on a CPU."""

    out: Path | None = None
    """Run folder. None: runs/<recipe>-<date>-<time>."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, with its configuration; flags given here override it."""
    recipe: RecipeName = "photographs"
    """Where the defaults of all other flags come from."""
    recipe_version: Annotated[int, tyro.conf.Suppress] = 1
    """Version of the recipe; the recipe sets it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

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


def to_json(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as JSON-able nested dictionaries."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return plain(asdict(config))


def from_json(values: dict[str, Any]) -> PretrainConfig:
    """The configuration from what :func:`to_json` returned; fields it lacks take their default.

    Raises:
        ValueError: for a field that this version does not know.
    """

    def build(kind: type, values: dict[str, Any], prefix: str) -> Any:
        names = {f.name for f in fields(kind)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(f"config: unknown field {prefix}{unknown[0]}; expected one of {', '.join(sorted(names))}")
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    values = dict(values)
    sections = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    built = {name: build(kind, values.pop(name, {}), f"{name}.") for name, kind in sections.items()}
    config = build(PretrainConfig, values | built, "")
    paths = (config.out, config.data.path, config.train.init_from)
    out, path, init_from = (None if p is None else Path(p) for p in paths)
    data, train = replace(config.data, path=path), replace(config.train, init_from=init_from)
    return replace(config, out=out, data=data, train=train)


def read_config(run_folder: Path) -> PretrainConfig | None:
    """The configuration of the run in a folder; None where no run began.

    Raises:
        ValueError: if ``config.json`` is not a configuration of this version.
    """
    path = run_folder / "config.json"
    return from_json(json.loads(path.read_text())) if path.is_file() else None
