"""The configuration of a pretraining run: what every flag of ``fastmae pretrain`` means, and what values it takes.

Defaults come from a recipe (``recipes.py``), flags override them, and the result is printed and saved as
``config.json`` in the run folder. This module does not import PyTorch, so that ``--help`` is fast.
"""

from __future__ import annotations

import json
import math
from collections.abc import Set
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

RecipeName = Literal["photographs", "imagenet-vit-b", "imagenet-vit-l", "imagenet-vit-h"]


@dataclass(frozen=True)
class ModelConfig:
    """The masked autoencoder. Widths and depths left at None are those of the named preset."""

    name: str = "mae_vit_base_patch16"
    """Preset: mae_vit_{tiny,small,base,large}_patch16 or mae_vit_huge_patch14."""
    img_size: int | tuple[int, int] = 224
    """Image size in pixels: one number for a square, or height and width."""
    patch_size: int | tuple[int, int] | None = None
    """Patch size in pixels, one number or height and width; must divide the image size. None: the preset's."""
    mask_ratio: float = 0.75
    """Share of patches that is hidden from the encoder, strictly between 0 and 1."""
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
    attention: Literal["auto", "plain", "sdpa", "xformers"] = "auto"
    """Attention backend. auto picks by shape, precision and device; a named one that is missing is an error."""


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are cropped."""

    path: Path | None = None
    """Folder of JPEG, PNG or WebP images, nested or flat. None: the embedded photographs."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """Image loader. auto: DALI where it is installed, else torchvision."""
    on_bad: Literal["skip", "stop"] = "skip"
    """What to do about damaged images: skip and count them with their paths, or stop."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop as a share of the image's, smallest and largest."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the random crop, smallest and largest."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    num_threads: int | None = None
    """Threads that decode and resize. None: the loader's choice."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, and how the run is logged and saved. The defaults are Table 8 of the paper."""

    global_batch_size: int = 4096
    """Images that one optimiser step sees. The learning rate follows it: base_lr * global_batch_size / 256."""
    batch_size: int | None = None
    """Images in one forward pass on one device; gradients accumulate up to the global batch, which must be a multiple.
    None: the whole global batch at once."""
    epochs: float | None = None
    """Length of the run in passes over the data. Give this or steps, not both."""
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
    """AdamW's weight decay; biases, norms and tokens have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moment."""
    clip_grad: float | None = None
    """Largest global gradient norm. None: no clipping."""
    seed: int = 0
    """Seed of the initialisation, the sample order, the crops and the masks."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast to bfloat16, weights and optimiser in float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
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


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a masked autoencoder. Without arguments: a small model on the embedded photographs, minutes on a CPU."""

    out: Path | None = None
    """Run folder. None: runs/<recipe>-<date>-<time>."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, with its configuration; flags given here override it."""
    recipe: RecipeName = "photographs"
    """Where the defaults of all other flags come from."""
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
        arguments.pop("mask_ratio")
        return arguments | {"img_size": self.img_size, "seed": self.train.seed}


def flag(section: str, name: str) -> str:
    """The command line's spelling of a field, as in ``--train.base-lr``."""
    return f"--{section}.{name}".replace("_", "-")


def validate(config: PretrainConfig) -> None:
    """Check what can be checked without the data.

    Raises:
        ValueError: names the flag, the value that came and what was expected.
    """
    from fastmae.model import PRESETS
    from fastmae.ops._check import num_kept

    model, data, train = config.model, config.data, config.train

    def require(condition: bool, section: str, name: str, expected: str) -> None:
        if not condition:
            value = getattr(getattr(config, section), name)
            raise ValueError(f"{flag(section, name)}: expected {expected}, got {value!r}")

    require(model.name in PRESETS, "model", "name", f"one of {', '.join(PRESETS)}")
    require(0 < model.mask_ratio < 1, "model", "mask_ratio", "a number strictly between 0 and 1")
    patch = model.patch_size or PRESETS[model.name]["patch_size"]
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    require(min(config.img_size) > 0, "model", "img_size", "positive numbers")
    require(min(patch) > 0, "model", "patch_size", "positive numbers")
    if any(size % p for size, p in zip(config.img_size, patch, strict=True)):
        size = "x".join(map(str, config.img_size))
        raise ValueError(
            f"--model.img-size: expected a size divisible by the patch size {patch[0]}x{patch[1]}, got {size}; "
            "change it or --model.patch-size"
        )
    try:
        num_kept(math.prod(size // p for size, p in zip(config.img_size, patch, strict=True)), model.mask_ratio)
    except ValueError as error:
        raise ValueError(f"--model.mask-ratio: {error}") from error
    for name in ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads"):
        require((getattr(model, name) or 1) > 0, "model", name, "a positive number")

    require(0 < data.scale[0] <= data.scale[1] <= 1, "data", "scale", "two numbers, 0 < smallest <= largest <= 1")
    require(0 < data.ratio[0] <= data.ratio[1], "data", "ratio", "two numbers, 0 < smallest <= largest")
    require(0 <= data.hflip <= 1, "data", "hflip", "a probability between 0 and 1")

    positive = (
        "global_batch_size batch_size epochs steps base_lr clip_grad num_threads max_minutes log_every_steps "
        "checkpoint_every_steps checkpoint_every_seconds keep_checkpoints"
    )
    for name in positive.split():
        value = getattr(train, name)
        require(value is None or value > 0, "train", name, "a positive number")
    for name in ("warmup_epochs", "warmup_steps", "min_lr", "weight_decay"):
        value = getattr(train, name)
        require(value is None or (value >= 0 and math.isfinite(value)), "train", name, "a number of at least 0")
    require(0 <= train.seed < 1 << 63, "train", "seed", "an integer in [0, 2**63)")
    require(all(0 <= beta < 1 for beta in train.betas), "train", "betas", "two numbers in [0, 1)")
    if train.batch_size is not None and train.global_batch_size % train.batch_size:
        raise ValueError(
            f"--train.global-batch-size: expected a multiple of --train.batch-size {train.batch_size}, "
            f"got {train.global_batch_size}"
        )
    for one, other in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
        if getattr(train, one) is not None and getattr(train, other) is not None:
            raise ValueError(
                f"{flag('train', one)} and {flag('train', other)}: expected one of them, "
                f"got {getattr(train, one)} and {getattr(train, other)}"
            )
    if train.epochs is None and train.steps is None:
        raise ValueError("--train.epochs or --train.steps: expected one of them, got neither")


def apply_flags(config: PretrainConfig, defaults: PretrainConfig, given: Set[str]) -> PretrainConfig:
    """Settle what flags imply for the defaults that they did not name.

    A length in steps replaces a recipe's length in epochs, and the other way round; a warm-up that was not given keeps
    at most its share of the run; a micro-batch that was not given becomes a divisor of the global batch.

    Args:
        config: the defaults with the flags applied.
        defaults: the recipe, or the saved configuration of the run to continue.
        given: the fields of ``train`` that the user named.

    Returns:
        The configuration to validate.
    """
    train, base = config.train, defaults.train
    for one, other in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
        if one in given and other not in given:
            train = replace(train, **{other: None})
        elif other in given and one not in given:
            train = replace(train, **{one: None})
    if given & {"epochs", "steps"} and not given & {"warmup_epochs", "warmup_steps"}:
        train = replace(train, **_scaled_warmup(train, base))
    if "global_batch_size" in given and "batch_size" not in given and train.batch_size is not None:
        micro = min(train.batch_size, train.global_batch_size)
        if micro > 0:
            train = replace(train, batch_size=max(d for d in range(1, micro + 1) if train.global_batch_size % d == 0))
    return replace(config, train=train)


def _scaled_warmup(train: TrainConfig, base: TrainConfig) -> dict[str, Any]:
    """The base's warm-up for a run of another length: unchanged, but never a larger share of the run."""
    warmup = {"warmup_epochs": base.warmup_epochs, "warmup_steps": base.warmup_steps}
    if (base.epochs is None) == (base.warmup_epochs is None):
        length, width = (base.epochs, base.warmup_epochs) if base.epochs else (base.steps, base.warmup_steps)
        share = (width or 0) / length if length else 0
        if train.steps is not None:
            most = round(share * train.steps)
            warmup = {"warmup_epochs": None, "warmup_steps": most if base.epochs else min(width or 0, most)}
        elif train.epochs is not None:
            most = share * train.epochs
            warmup = {"warmup_steps": None, "warmup_epochs": min(width or 0, most) if base.epochs else most}
    return warmup


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
    out, path = (None if p is None else Path(p) for p in (config.out, config.data.path))
    return replace(config, out=out, data=replace(config.data, path=path))


def read_config(run_folder: Path) -> PretrainConfig | None:
    """The configuration of the run in a folder; None where no run began.

    Raises:
        ValueError: if ``config.json`` is not a configuration of this version.
    """
    path = run_folder / "config.json"
    return from_json(json.loads(path.read_text())) if path.is_file() else None
