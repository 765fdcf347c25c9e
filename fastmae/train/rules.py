"""Checks of a configuration: each field against its annotation, then the rules that join several fields."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from fractions import Fraction
from itertools import chain
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fastmae.train.classification import ClassifierConfig
from fastmae.train.config import SECTIONS, PretrainConfig, Rule

MAX_COMPILED_SIZES = 8
"""Graphs that torch.compile keeps of one function (its recompile_limit); further sizes would run uncompiled."""
LEAST_FP16 = 17
"""Least ``rollback_after`` for fp16: halved 17 times in a row, the loss scale falls from its first 2**16 below 1."""


def flag(name: str) -> str:
    """The command line's spelling of a field: ``--train.base-lr`` for "train.base_lr"."""
    return f"--{name}".replace("_", "-")


def validate(config: PretrainConfig | ClassifierConfig) -> None:
    """Check everything that can be checked without data.

    Raises:
        ValueError: names the flag, what was expected and the value that came.
    """
    from fastmae.train.checkpoint.format import refuse_url

    folder = config.folder_flag
    for name, path in {flag(folder): getattr(config, folder), "--train.init-from": config.train.init_from}.items():
        if path is not None:
            refuse_url(path, name)
    for section in SECTIONS:
        check_fields(getattr(config, section), section)
    own = _classifier_rules if isinstance(config, ClassifierConfig) else _pretraining_rules
    for name, holds, expected in chain(own(config), _training_rules(config)):
        if not holds:
            section, _, field = name.partition(".")
            value = getattr(getattr(config, section), field) if field else getattr(config, section)
            raise ValueError(f"{flag(name)}: expected {expected}, got {value!r}")
    if config.report.wandb_project is not None:
        from fastmae.train.loggers import require_wandb

        require_wandb()


# ---------------------------------------------------------------------------------------------------------------------
# One field: its annotation


def check_fields(section: Any, name: str) -> None:
    """Check every field of a section against its annotation.

    Raises:
        ValueError: names the flag, what was expected and what came.
    """
    hints = get_type_hints(type(section), include_extras=True)
    for field in fields(section):
        value = getattr(section, field.name)
        for expected in _broken(hints[field.name], value):
            raise ValueError(f"{flag(f'{name}.{field.name}')}: expected {expected}, got {value!r}")


_TYPES = {
    int: (int, "an integer"),
    float: (int | float, "a number"),
    bool: (bool, "True or False"),
    str: (str, "a string"),
}


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
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis and isinstance(value, tuple) else args
        if not isinstance(value, tuple) or len(value) != len(kinds):
            yield "numbers" if args[-1] is Ellipsis else f"{len(args)} numbers"
            return
        for kind, one in zip(kinds, value, strict=True):
            yield from _broken(kind, one)
    elif hint in _TYPES:  # tyro gives the right type, Python code perhaps not; True is an int, but not meant as one
        types, name = _TYPES[hint]
        if not isinstance(value, types) or (isinstance(value, bool) and hint is not bool):
            yield name


# ---------------------------------------------------------------------------------------------------------------------
# Several fields together


def _classifier_rules(config: ClassifierConfig) -> Iterator[tuple[str, bool, str]]:
    """(field to name, whether its value fits, what was expected)."""
    yield "data.path", config.data.path is not None, "labelled images, a folder per class for example"
    yield "train.optimizer", config.train.optimizer != "muon", "adamw or apex for a classifier"
    if config.protocol != "scratch":
        yield "weights", config.weights is not None, "WEIGHTS to start from, before the flags"
    if config.protocol == "partial":
        halves = config.blocks >= 0 and 2 * config.blocks == int(2 * config.blocks)
        yield "blocks", halves, "a number of blocks from 0 on, whole or with a half"


def _pretraining_rules(config: PretrainConfig) -> Iterator[tuple[str, bool, str]]:
    """As :func:`_classifier_rules`; later rules rely on the earlier ones."""
    model, data, train, report = config.model, config.data, config.train, config.report
    embedded = data.path is None and model.in_chans != 3
    yield "model.in_chans", not embedded, "3, as the embedded photographs have, or --data.path with other images"
    _check_sizes(config, _patch_size(config))
    few = train.compile == "none" or len(set(data.progressive_sizes)) <= MAX_COMPILED_SIZES
    expected = f"at most {MAX_COMPILED_SIZES} different sizes with --train.compile, which makes a graph of each"
    yield "data.progressive_sizes", few, expected
    plain = data.color_jitter == 0
    expected = f"0 for images of {model.in_chans} channels, whose colours it changes"
    yield "data.color_jitter", plain or model.in_chans == 3, expected
    if data.value_range is not None:
        from fastmae.data.index import check_value_range

        with _named("--data.value-range", "value_range: "):
            check_value_range(data.value_range, model.in_chans)
    probes = config.resume or report.probe_path is None or report.probe_every_epochs is not None
    yield "report.probe_path", probes, "none without --report.probe-every-epochs"
    pixels = model.target == "pixels" or not model.norm_pix_loss
    yield "model.norm_pix_loss", pixels, "False with another --model.target than pixels"
    masks = train.masks_per_image
    expected = f"a multiple of --train.masks-per-image {masks}"
    yield "train.batch_size", not isinstance(train.batch_size, int) or train.batch_size % masks == 0, expected
    yield "train.global_batch_size", train.global_batch_size % masks == 0, expected


def _training_rules(config: PretrainConfig | ClassifierConfig) -> Iterator[tuple[str, bool, str]]:
    """As :func:`_classifier_rules`, for runs of every kind."""
    data, train = config.data, config.train
    plain = data.value_range is None or data.color_jitter == 0
    yield "data.color_jitter", plain, "0 with --data.value-range, whose images are not 8-bit"
    for names in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
        one, other = (getattr(train, name) for name in names)
        if one is not None and other is not None:
            one_of = " and ".join(flag(f"train.{name}") for name in names)
            raise ValueError(f"{one_of}: expected one of them, got {one} and {other}")
    if train.epochs is None and train.steps is None:
        raise ValueError("--train.epochs or --train.steps: expected one of them, got neither")
    found = train.precision != "fp16" or train.rollback_after >= LEAST_FP16
    yield "train.rollback_after", found, f"at least {LEAST_FP16} with fp16, whose loss scale has to be found first"
    timed = not train.fit_steps or train.max_minutes is not None
    yield "train.max_minutes", timed, "a time for --train.fit-steps, or --train.no-fit-steps with it"
    steady = not train.fit_steps or not data.progressive_sizes
    yield "train.fit_steps", steady, "False with --data.progressive-sizes, whose steps get longer"
    expected = f"more than --data.timeout {data.timeout:g}, whose error names the cause"
    yield "train.timeout", data.timeout < train.timeout, expected

    compiled = train.compile != "none" or train.compile_mode == "default"
    yield "train.compile_mode", compiled, "default without --train.compile blocks or model"
    adamw = train.optimizer == "adamw"
    if train.cuda_graph:
        own_graphs = train.compile_mode in ("reduce-overhead", "max-autotune")
        for conflict, reason in (
            (data.progressive_sizes, "--data.progressive-sizes, since a graph has images of one size"),
            (own_graphs, f"--train.compile-mode {train.compile_mode}, which makes graphs of its own"),
            (not adamw, f"--train.optimizer {train.optimizer}, which reads its learning rate on the host"),
        ):
            yield "train.cuda_graph", not conflict, f"no CUDA graph with {reason}"
    if not adamw:
        expected = f"adamw with --train.parallel {train.parallel}; {train.optimizer} knows no shards"
        yield "train.optimizer", train.parallel not in ("fsdp", "hsdp"), expected
    yield "train.optimizer", train.optimizer != "apex" or train.device != "cpu", "adamw on the CPU"
    sharded = train.shard_size is None or train.parallel == "hsdp"
    yield "train.shard_size", sharded, "none without --train.parallel hsdp"
    shards = train.reduce_every == "step" or train.parallel in ("fsdp", "hsdp")
    yield "train.reduce_every", shards, "step without --train.parallel fsdp or hsdp, where it saves no memory"


def _patch_size(config: PretrainConfig) -> tuple[int, int]:
    """The patch size as (height, width), from a model without memory, which checks its own arguments."""
    import torch

    from fastmae.model import create_model

    try:
        with torch.device("meta"):
            return create_model(**config.model_arguments()).patch_size
    except ValueError as error:
        name, _, text = str(error).partition(":")
        raise ValueError(f"{flag(f'model.{name}')}:{text}") from error


def _check_sizes(config: PretrainConfig, patch_size: tuple[int, int]) -> None:
    """Check that every image size divides into patches, of which the masking leaves some and hides some."""
    from fastmae.ops._check import grid_of, num_kept
    from fastmae.ops.masking import check_strategy

    model = config.model
    with _named("--data.progressive-sizes"):
        sizes = progressive_sizes(config.data.progressive_sizes, config.img_size)
    for size in (*sizes[:-1], config.img_size):
        where = "" if size == config.img_size else f" with images of {size[0]}x{size[1]}"
        grid = grid_of(size, patch_size, "--data.progressive-sizes")
        with _named(f"--model.mask-ratio{where}"):
            kept = num_kept(math.prod(grid), model.mask_ratio)
        with _named(f"--model.mask-strategy{where}"):
            check_strategy(model.mask_strategy, grid, math.prod(grid), kept)


@contextmanager
def _named(name: str, instead_of: str = "") -> Iterator[None]:
    """Put the flag in front of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix(instead_of)}") from error


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
