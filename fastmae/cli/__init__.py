"""The command line: ``fastmae pretrain``, ``data``, ``reconstruct``, ``consolidate``, ``bench``, ``plan``, ``env``.

This file parses arguments, and imports no more than that takes: ``--help`` does not wait for PyTorch. Each command is a
module beside it, imported when it is called.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

import fastmae
from fastmae.cli.arguments import parse
from fastmae.cli.commands import BenchConfig, ConsolidateConfig, DataCommands, EnvConfig, ReconstructConfig
from fastmae.cli.errors import UsageError, is_mistake, mistakes
from fastmae.cli.output import flush_output, forgiving_output
from fastmae.cli.plan import PlanConfig
from fastmae.cli.said_once import rank_and_size, say_once
from fastmae.train.config import PretrainConfig, read_config
from fastmae.train.liveness.signals import StopRequest
from fastmae.train.recipes import DESCRIPTIONS, RECIPES, apply_flags

DEFAULT_RECIPE, OWN_IMAGES_RECIPE, PLAN_RECIPE = "photographs", "small-data", "imagenet-vit-l"
"""Without ``--recipe``: for the embedded photographs, for ``--data.path``, and for ``fastmae plan``."""
EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130
"""Exit codes: what the user can fix, and Ctrl-C outside the training loop."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code. A user's mistake is one line on stderr, a bug keeps its traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        # A run does not end because | tee did, and no command ends in a traceback because | head did.
        with forgiving_output():
            return _main(argv)
    finally:
        flush_output()


def _main(argv: list[str]) -> int:
    if argv == ["--version"]:
        print(f"fastmae {fastmae.__version__}")
        return 0
    try:
        with mistakes():
            defaults = _defaults(argv)
        return _run(parse(_commands(defaults), argv), defaults, argv)
    except KeyboardInterrupt:
        if rank_and_size()[0] == 0:
            print("fastmae: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if not is_mistake(error):
            raise
        say_once(str(error))
        return EXIT_MISTAKE


def _commands(defaults: PretrainConfig) -> dict[str, Any]:
    classes = {
        "pretrain": (PretrainConfig, {"default": defaults}),
        "data": (DataCommands, {}),
        "reconstruct": (ReconstructConfig, {}),
        "consolidate": (ConsolidateConfig, {}),
        "bench": (BenchConfig, {"default": BenchConfig(**_sections(defaults, "data"))}),
        "plan": (PlanConfig, {"default": PlanConfig(**_sections(defaults))}),
        "env": (EnvConfig, {}),
    }
    return {name: Annotated[kind, tyro.conf.subcommand(name, **more)] for name, (kind, more) in classes.items()}


def _sections(config: PretrainConfig | BenchConfig | PlanConfig, *more: str) -> dict[str, Any]:
    """The sections of a run's configuration that another command shares."""
    return {name: getattr(config, name) for name in ("recipe", "model", "train", *more)}


def _run(command: object, defaults: PretrainConfig, argv: Sequence[str]) -> int:
    if isinstance(command, PretrainConfig):
        _say_recipe(defaults, argv)
        # Before PyTorch is imported, which takes seconds.
        with StopRequest(quiet=rank_and_size()[0] != 0) as stop:
            from fastmae.cli.pretrain import pretrain

            return pretrain(apply_flags(command, defaults, _given(argv)), stop)
    if isinstance(command, BenchConfig):
        _say_recipe(defaults, argv)
        from fastmae.cli.bench import bench

        config = replace(defaults, **_sections(command, "data"))
        return bench(apply_flags(config, defaults, _given(argv)), command.seconds, command.json)
    if isinstance(command, DataCommands):
        from fastmae.cli.data import run

        return run(command.command)
    if isinstance(command, PlanConfig):
        from fastmae.cli.plan import plan

        config = replace(defaults, **_sections(command))
        return plan(apply_flags(config, defaults, _given(argv)), command)
    if isinstance(command, ConsolidateConfig):
        from fastmae.cli.consolidate import consolidate

        return consolidate(command.checkpoint, command.out, command.optimizer)
    if isinstance(command, ReconstructConfig):
        from fastmae.cli.reconstruct import reconstruct

        return reconstruct(command)
    from fastmae.environment import report

    print(report())
    return 0


def _defaults(argv: Sequence[str]) -> PretrainConfig:
    """Where the other flags' defaults come from: the run to continue, or the recipe.

    Without a recipe, images of the user's own get ``small-data``: the recipe of the embedded photographs (64 pixels,
    minutes, eighty times table 8's learning rate) would train on them without complaint, and badly.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=RECIPES, default=None)
    parser.add_argument("--data.path", dest="images", default="None")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.exit_on_error = False
    try:
        known, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        return RECIPES[DEFAULT_RECIPE]  # tyro reads the same flags and reports the error
    own_images = known.images != "None"
    if known.resume:
        if known.out is None:
            raise UsageError("--resume: expected --out with the run folder to continue, got none")
        saved = read_config(known.out)
        if saved is not None and known.recipe not in (None, saved.recipe):
            raise UsageError(f"--recipe: the run in {known.out} was started with {saved.recipe}, got {known.recipe}")
        if saved is not None:
            return replace(saved, resume=False)
        if known.recipe is None and not own_images:
            raise UsageError(
                f"--resume: expected a run to continue in {known.out}, found none; --recipe or --data.path starts one"
            )
    default = PLAN_RECIPE if argv[:1] == ["plan"] else OWN_IMAGES_RECIPE if own_images else DEFAULT_RECIPE
    return RECIPES[known.recipe or default]


def _say_recipe(defaults: PretrainConfig, argv: Sequence[str]) -> None:
    """Say which recipe was taken if the user named images and no recipe."""
    named = any(word.partition("=")[0] == "--recipe" for word in argv)
    if defaults is RECIPES[OWN_IMAGES_RECIPE] and not named and rank_and_size()[0] == 0:
        print(f"--data.path without --recipe: taking {OWN_IMAGES_RECIPE}, {DESCRIPTIONS[OWN_IMAGES_RECIPE]}")


def _given(argv: Sequence[str]) -> set[str]:
    """Fields of the section ``train`` that the user named."""
    names = {argument.split("=")[0].replace("-", "_") for argument in argv if argument.startswith("--train.")}
    return {name.removeprefix("__train.") for name in names}
