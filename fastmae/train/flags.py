"""From flags to a configuration that holds together: what they imply for each other, and what values they take."""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any

from fastmae.train.config import DataConfig, PretrainConfig, TrainConfig
from fastmae.train.numerics.divergence import LEAST_FP16
from fastmae.train.resolution import progressive_sizes


def flag(section: str, name: str) -> str:
    """The command line's spelling of a field, as in ``--train.base-lr``."""
    return f"--{section}.{name}".replace("_", "-")


Require = Callable[[bool, str, str, str], None]
"""Raises unless a condition holds: section and field that it is about, what was expected."""

MOST_COMPILED_SIZES = 8
"""Graphs that torch.compile keeps of one function (its recompile_limit); further sizes would run uncompiled."""


def validate(config: PretrainConfig) -> None:
    """Check what can be checked without the data.

    Raises:
        ValueError: names the flag, the value that came and what was expected.
    """

    def require(condition: bool, section: str, name: str, expected: str) -> None:
        if not condition:
            value = getattr(getattr(config, section), name)
            raise ValueError(f"{flag(section, name)}: expected {expected}, got {value!r}")

    _refuse_object_stores(config)
    _validate_model(config, require)
    _validate_data(config, require)
    _validate_training(config, require)
    _validate_report(config, require)


def _refuse_object_stores(config: PretrainConfig) -> None:
    from fastmae.train.checkpoint import as_url

    paths = {"--out": config.out, "--data.path": config.data.path, "--train.init-from": config.train.init_from}
    for name, path in (paths | {"--report.probe-path": config.report.probe_path}).items():
        if path is not None and (url := as_url(path)):
            raise ValueError(
                f"{name}: expected a path of a mounted file system, got {url}: object stores are neither read nor "
                "written. Mount the bucket, or copy what is in it"
            )


def _validate_model(config: PretrainConfig, require: Require) -> None:
    from fastmae.model import PRESETS

    model = config.model
    require(model.name in PRESETS, "model", "name", f"one of {', '.join(PRESETS)}")
    require(0 < model.mask_ratio < 1, "model", "mask_ratio", "a number strictly between 0 and 1")
    for name in ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads"):
        require((getattr(model, name) or 1) > 0, "model", name, "a positive number")
    require(model.in_chans > 0, "model", "in_chans", "a positive number")
    colour = config.data.path is not None or model.in_chans == 3
    require(colour, "model", "in_chans", "3, as the embedded photographs have, or --data.path with other images")
    for name in ("mean", "std"):
        values = getattr(model, name)
        one_each = values is None or len(values) == model.in_chans
        require(one_each, "model", name, f"one number for each of the {model.in_chans} channels")
        finite = all(math.isfinite(value) and (name == "mean" or value > 0) for value in values or ())
        require(finite, "model", name, "finite numbers" if name == "mean" else "positive numbers")

    patch = model.patch_size or PRESETS[model.name]["patch_size"]
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    require(min(config.img_size) > 0, "model", "img_size", "positive numbers")
    require(min(patch) > 0, "model", "patch_size", "positive numbers")
    _validate_size(config, "--model.img-size", config.img_size, patch)
    try:
        sizes = progressive_sizes(config.data.progressive_sizes, config.img_size)
    except ValueError as error:
        raise ValueError(f"--data.progressive-sizes: {error}") from error
    for size in sizes[:-1]:
        _validate_size(config, "--data.progressive-sizes", size, patch)
    if config.train.compile != "none":
        most = f"at most {MOST_COMPILED_SIZES} different sizes with --train.compile, which makes a graph of each"
        require(len(set(sizes)) <= MOST_COMPILED_SIZES, "data", "progressive_sizes", most)


def _validate_size(config: PretrainConfig, name: str, size: tuple[int, int], patch: tuple[int, int]) -> None:
    """That a size divides into patches, of which the masking leaves some and hides some."""
    from fastmae.ops._check import num_kept
    from fastmae.ops.masking import check_strategy

    model, where = config.model, "" if size == config.img_size else f" with images of {size[0]}x{size[1]}"
    if any(side % p for side, p in zip(size, patch, strict=True)):
        raise ValueError(
            f"{name}: expected a size divisible by the patch size {patch[0]}x{patch[1]}, got {size[0]}x{size[1]}; "
            "change it or --model.patch-size"
        )
    grid = tuple(side // p for side, p in zip(size, patch, strict=True))
    try:
        num_kept(math.prod(grid), model.mask_ratio)
    except ValueError as error:
        raise ValueError(f"--model.mask-ratio{where}: {error}") from error
    try:
        check_strategy(model.mask_strategy, grid, math.prod(grid), model.mask_ratio)
    except ValueError as error:
        raise ValueError(f"--model.mask-strategy{where}: {error}") from error


def _validate_data(config: PretrainConfig, require: Require) -> None:
    from fastmae.data.create import check_value_range

    data = config.data
    require(0 < data.scale[0] <= data.scale[1] <= 1, "data", "scale", "two numbers, 0 < smallest <= largest <= 1")
    require(0 < data.ratio[0] <= data.ratio[1], "data", "ratio", "two numbers, 0 < smallest <= largest")
    for name in ("hflip", "vflip"):
        require(0 <= getattr(data, name) <= 1, "data", name, "a probability between 0 and 1")
    require(0 <= data.max_bad_fraction <= 1, "data", "max_bad_fraction", "a share between 0 and 1")
    require(0 <= data.color_jitter <= 1, "data", "color_jitter", "a number between 0 and 1")
    color = data.color_jitter == 0 or config.model.in_chans == 3
    require(
        color, "data", "color_jitter", f"0 for images of {config.model.in_chans} channels, whose colours it changes"
    )
    if data.value_range is not None:
        try:
            check_value_range(data.value_range, config.model.in_chans)
        except ValueError as error:
            raise ValueError(str(error).replace("value_range", flag("data", "value_range"), 1)) from error
        require(data.color_jitter == 0, "data", "color_jitter", "0 with --data.value-range, whose images are not 8-bit")
    most = DataConfig.max_pixels
    require(0 < data.max_pixels <= most, "data", "max_pixels", f"a number from 1 to {most:_}, Pillow's limit")
    for name in ("num_threads", "prefetch", "timeout"):
        value = getattr(data, name)
        require(value is None or value > 0, "data", name, "a positive number")


def _validate_training(config: PretrainConfig, require: Require) -> None:
    train = config.train
    positive = (
        "global_batch_size batch_size masks_per_image epochs steps base_lr clip_grad num_threads max_minutes "
        "log_every_steps checkpoint_every_steps checkpoint_every_seconds keep_checkpoints keep_every_steps shard_size "
        "rollback_after"
    )
    for name in positive.split():
        value = getattr(train, name)
        require(value in (None, "auto") or 0 < value < math.inf, "train", name, "a positive number")
    require(train.max_rollbacks >= 0, "train", "max_rollbacks", "a number of at least 0")
    steps = train.precision != "fp16" or train.rollback_after >= LEAST_FP16
    require(
        steps, "train", "rollback_after", f"at least {LEAST_FP16} with fp16, whose loss scale has to be found first"
    )
    timed = not train.fit_steps or train.max_minutes is not None
    require(timed, "train", "max_minutes", "a time for --train.fit-steps, or --train.no-fit-steps with it")
    steady = not train.fit_steps or not config.data.progressive_sizes
    require(steady, "train", "fit_steps", "False with --data.progressive-sizes, whose steps get longer")
    compiled = train.compile != "none" or train.compile_mode == "default"
    require(compiled, "train", "compile_mode", "default without --train.compile blocks or model")
    for holds, without in (
        (not config.data.progressive_sizes, "--data.progressive-sizes, since a graph has images of one size"),
        (train.compile_mode not in ("reduce-overhead", "max-autotune"), f"--train.compile-mode {train.compile_mode}, "
         "which makes graphs of its own; default and max-autotune-no-cudagraphs do not"),
        (train.optimizer != "apex", "--train.optimizer apex, which reads its learning rate on the host"),
    ):  # fmt: skip
        require(holds or not train.cuda_graph, "train", "cuda_graph", f"no CUDA graph with {without}")
    for name in ("warmup_epochs", "warmup_steps", "min_lr", "weight_decay"):
        value = getattr(train, name)
        require(value is None or (value >= 0 and math.isfinite(value)), "train", name, "a number of at least 0")
    require(0 <= train.seed < 1 << 63, "train", "seed", "an integer in [0, 2**63)")
    whole = train.optimizer != "apex" or train.parallel not in ("fsdp", "hsdp")
    require(whole, "train", "optimizer", f"adamw with --train.parallel {train.parallel}; apex knows no shards")
    require(train.optimizer != "apex" or train.device != "cpu", "train", "optimizer", "adamw on the CPU")
    takes = train.shard_size is None or train.parallel == "hsdp"
    require(takes, "train", "shard_size", "none without --train.parallel hsdp")
    require(all(0 <= beta < 1 for beta in train.betas), "train", "betas", "two numbers in [0, 1)")
    require(train.masks_per_image <= 256, "train", "masks_per_image", "at most 256")
    name = "batch_size" if isinstance(train.batch_size, int) else "global_batch_size"
    fits = getattr(train, name) % train.masks_per_image == 0
    require(fits, "train", name, f"a multiple of --train.masks-per-image {train.masks_per_image}")
    if isinstance(train.batch_size, int) and train.global_batch_size % train.batch_size:
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


def _validate_report(config: PretrainConfig, require: Require) -> None:
    report = config.report
    positive = "picture_every_steps probe_every_epochs probe_images profile_at_step profile_steps stall_seconds"
    for name in positive.split():
        value = getattr(report, name)
        require(value is None or 0 < value < math.inf, "report", name, "a positive number")
    probes = config.resume or report.probe_path is None or report.probe_every_epochs is not None
    require(probes, "report", "probe_path", "none without --report.probe-every-epochs")
    if report.wandb_project is not None:
        from fastmae.train.telemetry.wandb_sink import require_wandb

        require_wandb()


def apply_flags(config: PretrainConfig, defaults: PretrainConfig, given: Set[str]) -> PretrainConfig:
    """Settle what flags imply for the defaults that they did not name.

    A length in steps replaces a recipe's length in epochs, and the other way round, and turns fit_steps off; a
    warm-up that was not given keeps at most its share of the run; a micro-batch that was not given becomes a divisor of
    the global batch, if possible one of whole images.

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
    if given & {"epochs", "steps"} and "fit_steps" not in given:
        train = replace(train, fit_steps=False)
    if given & {"epochs", "steps"} and not given & {"warmup_epochs", "warmup_steps"}:
        train = replace(train, **scaled_warmup(train, base))
    if (
        given & {"global_batch_size", "masks_per_image"}
        and "batch_size" not in given
        and isinstance(train.batch_size, int)
    ):
        masks = max(train.masks_per_image, 1)
        multiples = range(masks, min(train.batch_size, train.global_batch_size) + 1, masks)
        divisors = [size for size in multiples if train.global_batch_size % size == 0]
        train = replace(train, batch_size=divisors[-1] if divisors else train.batch_size)
    return replace(config, train=train)


def scaled_warmup(train: TrainConfig, base: TrainConfig) -> dict[str, Any]:
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
