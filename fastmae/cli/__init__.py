"""The command line: ``fastmae pretrain``, ``data``, ``reconstruct``, ``evaluate``, ``features`` and others.

This file parses and dispatches. The modules that do the work import PyTorch and are imported when a command runs, so
that ``--help`` does not wait for it.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro

import fastmae
from fastmae.cli.arguments import parse
from fastmae.cli.commands import (
    AblateConfig,
    BenchConfig,
    ConsolidateConfig,
    ConvertConfig,
    DataCommands,
    EnvConfig,
    EvaluateCommands,
    FeaturesConfig,
    FitTargetConfig,
    InspectConfig,
    PlotConfig,
    ReconstructConfig,
)
from fastmae.cli.output import flush_output, forgiving_output, print_error
from fastmae.errors import UsageError, usage_errors
from fastmae.train.classification import ClassifierConfig
from fastmae.train.config import PretrainConfig
from fastmae.train.launcher import rank_and_size, read_slurm
from fastmae.train.liveness import EXIT_PREEMPTED, StopRequest
from fastmae.train.plan import PlanConfig, make_plans, show_plans
from fastmae.train.recipes import DESCRIPTIONS, OWN_IMAGES_RECIPE, RECIPES, apply_flags, starting_config

PLAN_RECIPE = "imagenet-vit-l"
_TRAINING = ["finetune"], ["partial"], ["scratch"]
"""Protocols of ``fastmae evaluate`` that are training runs."""
EXIT_USAGE, EXIT_INTERRUPTED = 2, 130
"""Exit codes: what the user can fix, and Ctrl-C outside the training loop."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code. What the user can fix is one line on stderr, a bug keeps its traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    trains = words[:1] == ["pretrain"] or (words[:1] == ["evaluate"] and words[1:2] in _TRAINING)
    if trains or words[:1] in (["evaluate"], ["features"]):
        read_slurm(os.environ)
    # Before PyTorch is imported, which takes seconds. Without arguments this is the process's command, and it ends.
    stop = StopRequest(quiet=rank_and_size()[0] != 0, process_ends=argv is None)
    try:
        # A run does not end because | tee did, and no command ends in a traceback because | head did.
        with forgiving_output(), stop if trains else nullcontext():
            return _main(words, stop)
    finally:
        flush_output()


def _main(argv: list[str], stop: StopRequest) -> int:
    if argv == ["--version"]:
        print(f"fastmae {fastmae.__version__}")
        return 0
    given = {}  # flags with their values, roughly: tyro, which reads them in earnest, wants the defaults first
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        name, _, value = word.partition("=")
        given[name.replace("_", "-")] = value or following
    try:
        defaults = _defaults(argv[:1], given)
        return _run(parse(_commands(defaults), argv), defaults, given, stop)
    except KeyboardInterrupt:
        if rank_and_size()[0] == 0:
            print("fastmae: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if not is_expected(error):
            raise
        print_error(str(error))
        return EXIT_USAGE


def is_expected(error: Exception) -> bool:
    """Whether the user can fix an error that ended a command, so that no traceback is needed."""
    from fastmae.data import DataError
    from fastmae.train.checkpoint import CheckpointError

    full_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full_disk or isinstance(error, UsageError | DataError | CheckpointError | FloatingPointError)


def _commands(defaults: PretrainConfig) -> dict[str, Any]:
    classes = {
        "pretrain": (PretrainConfig, {"default": defaults}),
        "data": (DataCommands, {}),
        "reconstruct": (ReconstructConfig, {}),
        "inspect": (InspectConfig, {}),
        "features": (FeaturesConfig, {}),
        "evaluate": (EvaluateCommands, {}),
        "plot": (PlotConfig, {}),
        "ablate": (AblateConfig, {}),
        "fit-target": (FitTargetConfig, {}),
        "consolidate": (ConsolidateConfig, {}),
        "convert": (ConvertConfig, {}),
        "bench": (BenchConfig, {"default": BenchConfig(**_shared(defaults, BenchConfig))}),
        "plan": (PlanConfig, {"default": PlanConfig(**_shared(defaults, PlanConfig))}),
        "env": (EnvConfig, {}),
    }
    return {name: Annotated[kind, tyro.conf.subcommand(name, **more)] for name, (kind, more) in classes.items()}


def _shared(source: Any, kind: type) -> dict[str, Any]:
    """The values of the fields that a configuration shares with another kind."""
    return {field.name: getattr(source, field.name) for field in fields(kind) if hasattr(source, field.name)}


def _run(command: Any, defaults: PretrainConfig, given: Mapping[str, str], stop: StopRequest) -> int:
    if isinstance(command, PretrainConfig | BenchConfig | PlanConfig):
        named = {name.removeprefix("--train.").replace("-", "_") for name in given if name.startswith("--train.")}
        config = apply_flags(replace(defaults, **_shared(command, PretrainConfig)), defaults, named)
        if isinstance(command, PlanConfig):
            with usage_errors():
                plans = make_plans(config, command)
            if command.json:
                print(json.dumps(plans, indent=1))
            else:
                show_plans(plans, config)
            return 0
        own = defaults is RECIPES[OWN_IMAGES_RECIPE] and "--recipe" not in given
        if own and rank_and_size()[0] == 0:
            print(f"--data.path without --recipe: taking {OWN_IMAGES_RECIPE}, {DESCRIPTIONS[OWN_IMAGES_RECIPE]}")
        if isinstance(command, BenchConfig):
            from fastmae.cli.bench import bench

            return bench(config, command.seconds, command.json)
        from fastmae.pretraining import run

        if rank_and_size()[1] > 1:  # torchrun's summary quotes the error of the process that failed first
            from torch.distributed.elastic.multiprocessing.errors import record

            run = record(run)
        return EXIT_PREEMPTED if run(config, stop)[1] == "preempted" else 0
    if isinstance(command, DataCommands):
        return import_module("fastmae.cli.data").run(command.command)
    if isinstance(command, InspectConfig | FeaturesConfig | EvaluateCommands):
        command = getattr(command, "command", command)
        if isinstance(command, ClassifierConfig):
            return import_module("fastmae.cli.finetune").train(command, given, stop)
        return import_module("fastmae.cli.evaluate").run(command)
    if isinstance(command, PlotConfig):
        return import_module("fastmae.cli.plot").plot(command)
    if isinstance(command, AblateConfig):
        return import_module("fastmae.cli.ablate").ablate(command)
    if isinstance(command, FitTargetConfig):
        return import_module("fastmae.cli.ablate").fit_target(command)
    if isinstance(command, ReconstructConfig):
        return import_module("fastmae.cli.reconstruct").reconstruct(command)
    if isinstance(command, ConvertConfig):
        return import_module("fastmae.cli.convert").convert(command)
    if isinstance(command, ConsolidateConfig):
        return import_module("fastmae.cli.reconstruct").consolidate(command)
    print(import_module("fastmae.environment").report())
    return 0


def _defaults(command: Sequence[str], given: Mapping[str, str]) -> PretrainConfig:
    """The configuration that gives the other flags their defaults, from the words of the command line before tyro."""
    if command not in (["pretrain"], ["bench"], ["plan"]):
        return starting_config()
    out = Path(given["--out"]) if "--out" in given else None
    own_images = given.get("--data.path", "None") != "None"
    options = {"out": out, "resume": "--resume" in given, "own_images": own_images}
    recipe = given.get("--recipe", PLAN_RECIPE if command == ["plan"] else None)
    with usage_errors():
        return starting_config(recipe, **options)
