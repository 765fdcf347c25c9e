"""What values the fields of a configuration take: rules in their annotations, and those that join several fields.

``PositiveInt`` and the like are ``Annotated`` types that :func:`check_fields` understands and tyro ignores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from fractions import Fraction
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        expected: for the message, such as "a positive number".
        holds: whether a value is that.
    """

    expected: str
    holds: Callable[[Any], bool]


_TYPES = {
    int: (int, "an integer"),
    float: (int | float, "a number"),
    bool: (bool, "True or False"),
    str: (str, "a string"),
}

FREE, FIXED = "may differ when a run is resumed", "must not differ when a run is resumed"
Free, Fixed = Annotated[T, FREE], Annotated[T, FIXED]

_POSITIVE = Rule("a positive number", lambda v: 0 < v < math.inf)
_NON_NEGATIVE = Rule("a number of at least 0", lambda v: 0 <= v < math.inf)
PositiveInt, PositiveFloat = Annotated[int, _POSITIVE], Annotated[float, _POSITIVE]
NonNegativeInt, NonNegativeFloat = Annotated[int, _NON_NEGATIVE], Annotated[float, _NON_NEGATIVE]
Probability = Annotated[float, Rule("a probability between 0 and 1", lambda v: 0 <= v <= 1)]
Share = Annotated[float, Rule("a share between 0 and 1", lambda v: 0 <= v <= 1)]
OpenShare = Annotated[float, Rule("a number strictly between 0 and 1", lambda v: 0 < v < 1)]
Strength = Annotated[float, Rule("a number between 0 and 1", lambda v: 0 <= v <= 1)]
Area = Annotated[
    tuple[float, float], Rule("two numbers, 0 < smallest <= largest <= 1", lambda v: 0 < v[0] <= v[1] <= 1)
]
Ordered = Annotated[tuple[float, float], Rule("two numbers, 0 < smallest <= largest", lambda v: 0 < v[0] <= v[1])]
Decays = Annotated[tuple[float, float], Rule("two numbers in [0, 1)", lambda v: all(0 <= decay < 1 for decay in v))]
MaskCount = Annotated[PositiveInt, Rule("at most 256", lambda v: v <= 256)]
Seed = Annotated[int, Rule("an integer in [0, 2**63)", lambda v: 0 <= v < 1 << 63)]
MAX_PIXELS = 178_956_970
"""Pillow's limit against decompression bombs."""
Pixels = Annotated[int, Rule(f"a number from 1 to {MAX_PIXELS:_}, Pillow's limit", lambda v: 0 < v <= MAX_PIXELS)]

MAX_COMPILED_SIZES = 8
"""Graphs that torch.compile keeps of one function (its recompile_limit); further sizes would run uncompiled."""
LEAST_FP16 = 17
"""Least ``rollback_after`` for fp16: halved 17 times in a row, the loss scale falls from its first 2**16 below 1."""


def flag(section: str, name: str) -> str:
    """The command line's spelling of a field, as in ``--train.base-lr``."""
    return f"--{section}.{name}".replace("_", "-")


def resume_policy(hint: Any) -> str | None:
    """``FREE`` or ``FIXED`` of a field's annotation; None for neither."""
    return next((m for m in getattr(hint, "__metadata__", ()) if m in (FREE, FIXED)), None)


def check_fields(section: Any, prefix: str) -> None:
    """Check every field of a dataclass against its annotation.

    Raises:
        ValueError: names the flag, what was expected and what came.
    """
    hints = get_type_hints(type(section), include_extras=True)
    for field in fields(section):
        value = getattr(section, field.name)
        if not is_dataclass(value):
            for expected in _broken(hints[field.name], value):
                raise ValueError(f"{flag(prefix, field.name)}: expected {expected}, got {value!r}")


def _broken(hint: Any, value: Any) -> Iterator[str]:
    """What a value was expected to be and is not."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        wrong = list(_broken(args[0], value))
        yield from wrong or (m.expected for m in args[1:] if isinstance(m, Rule) and not m.holds(value))
    elif origin in (Union, UnionType):
        literals = [one for arg in args if get_origin(arg) is Literal for one in get_args(arg)]
        if value is None or value in literals:
            return
        others = [arg for arg in args if arg is not type(None) and get_origin(arg) is not Literal]
        fitting = [arg for arg in others if isinstance(value, tuple) == (get_origin(arg) is tuple)] or others
        yield from min((list(_broken(arg, value)) for arg in fitting), key=len)
    elif origin is Literal:
        if value not in args:
            yield f"one of {', '.join(map(str, args))}"
    elif origin is tuple:
        if not isinstance(value, tuple) or (args[-1] is not Ellipsis and len(value) != len(args)):
            yield "numbers" if args[-1] is Ellipsis else f"{len(args)} numbers"
            return
        for index, one in enumerate(value):
            yield from _broken(args[0] if args[-1] is Ellipsis else args[min(index, len(args) - 1)], one)
    elif hint in _TYPES:  # tyro gives the right type, Python code perhaps not; True is an int, but not meant as one
        types, name = _TYPES[hint]
        if not isinstance(value, types) or (isinstance(value, bool) and hint is not bool):
            yield name


def validate(config: Any) -> None:
    """Check a ``PretrainConfig`` as far as that takes no data.

    Raises:
        ValueError: names the flag, what was expected and the value that came.
    """

    def require(condition: bool, section: str, name: str, expected: str) -> None:
        if not condition:
            value = getattr(getattr(config, section), name)
            raise ValueError(f"{flag(section, name)}: expected {expected}, got {value!r}")

    _refuse_object_stores(config)
    for section in ("model", "data", "train", "report"):
        check_fields(getattr(config, section), section)
    _validate_model(config, require)
    _validate_data(config, require)
    _validate_training(config, require)
    probes = config.resume or config.report.probe_path is None or config.report.probe_every_epochs is not None
    require(probes, "report", "probe_path", "none without --report.probe-every-epochs")
    if config.report.wandb_project is not None:
        from fastmae.train.loggers import require_wandb

        require_wandb()


def _refuse_object_stores(config: Any) -> None:
    from fastmae.train.checkpoint import as_url

    paths = {"--out": config.out, "--data.path": config.data.path, "--train.init-from": config.train.init_from}
    for name, path in (paths | {"--report.probe-path": config.report.probe_path}).items():
        if path is not None and (url := as_url(path)):
            raise ValueError(
                f"{name}: expected a path of a mounted file system, got {url}: object stores are neither read nor "
                "written. Mount the bucket, or copy what is in it"
            )


def progressive_sizes(heights: Sequence[int], img_size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Heights with widths in the proportions of ``img_size``.

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


def _validate_model(config: Any, require: Callable[..., None]) -> None:
    from fastmae.model import PRESETS

    model = config.model
    require(model.name in PRESETS, "model", "name", f"one of {', '.join(PRESETS)}")
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
        most = f"at most {MAX_COMPILED_SIZES} different sizes with --train.compile, which makes a graph of each"
        require(len(set(sizes)) <= MAX_COMPILED_SIZES, "data", "progressive_sizes", most)


def _validate_size(config: Any, name: str, size: tuple[int, int], patch: tuple[int, int]) -> None:
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


def _validate_data(config: Any, require: Callable[..., None]) -> None:
    from fastmae.data.create import check_value_range

    data = config.data
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


def _validate_training(config: Any, require: Callable[..., None]) -> None:
    train = config.train
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
    whole = train.optimizer != "apex" or train.parallel not in ("fsdp", "hsdp")
    require(whole, "train", "optimizer", f"adamw with --train.parallel {train.parallel}; apex knows no shards")
    require(train.optimizer != "apex" or train.device != "cpu", "train", "optimizer", "adamw on the CPU")
    takes = train.shard_size is None or train.parallel == "hsdp"
    require(takes, "train", "shard_size", "none without --train.parallel hsdp")
    waits = config.data.timeout < train.timeout
    require(waits, "train", "timeout", f"more than --data.timeout {config.data.timeout:g}, whose error names the cause")
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
