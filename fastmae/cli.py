"""The command line: ``fastmae pretrain``, ``fastmae reconstruct``, ``fastmae env``.

Only what parses arguments is imported at the top, so that ``--help`` does not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import errno
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastmae.train.config import PretrainConfig, apply_flags, read_config, to_json, validate
from fastmae.train.recipes import RECIPES

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from fastmae.train.loop import Trainer
    from fastmae.train.run_folder import RunFolder

EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130
"""Exit codes: what the user can mend, and Ctrl-C outside the training loop."""

_NEW_CROPS_EPOCH = 2**31
"""An epoch that no run reaches: crops of it were never trained on."""

_UNSEEN = "photographs never trained on"


class UsageError(Exception):
    """Something that the user can mend; printed as one line."""


@dataclass(frozen=True)
class ReconstructConfig:
    """Draw masked, reconstructed and original images side by side."""

    checkpoint: tyro.conf.Positional[Path]
    """Run folder, checkpoint folder or exported .safetensors file."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Images to reconstruct."""
    out: Path = Path("reconstruction.png")
    """The figure to write."""
    mask_ratio: float = 0.75
    """Share of patches to hide, strictly between 0 and 1."""
    seed: int = 0
    """Seed of the masks."""


@dataclass(frozen=True)
class EnvConfig:
    """Print versions, devices, kernels and attention backends: paste it into a bug report."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code. A user's mistake is one line on stderr, a bug keeps its traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _mistakes():
            defaults = _defaults(argv)
        command = tyro.cli(_commands(defaults), prog="fastmae", description=__doc__.splitlines()[0], args=argv)
        if isinstance(command, PretrainConfig):
            return pretrain(apply_flags(command, defaults, _given(argv)))
        if isinstance(command, ReconstructConfig):
            return reconstruct(command)
        from fastmae.environment import report

        print(report())
        return 0
    except KeyboardInterrupt:
        print("fastmae: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if not _is_mistake(error):
            raise
        print(f"fastmae: error: {error}", file=sys.stderr)
        return EXIT_MISTAKE


def pretrain(config: PretrainConfig) -> int:
    """Train, evaluate, and say where the picture is; return the exit code."""
    from fastmae.train.run_folder import RunFolder

    with _mistakes():
        validate(config)
        config = replace(config, out=config.out or Path("runs") / time.strftime(f"{config.recipe}-%Y%m%d-%H%M%S"))
        try:
            run = RunFolder(config.out, resume=config.resume)
        except OSError as error:
            raise UsageError(f"--out: expected a folder that can be written, got {config.out}: {error}") from error
    with run:
        from rich.console import Console

        from fastmae.train.signals import PREEMPTED

        console = Console(highlight=False, soft_wrap=True)
        with _mistakes():
            trainer = _prepare(config, run, console)
        begun, first_step = time.monotonic(), trainer.step
        status = trainer.fit()
        seconds = time.monotonic() - begun
        if status == "preempted":
            console.print(f"Saved at step {trainer.step}. Continue with: fastmae pretrain --out {run.path} --resume")
            return PREEMPTED
        _finish(trainer, run, console, seconds, trainer.step - first_step)
    return 0


def reconstruct(config: ReconstructConfig) -> int:
    """Draw the figure of some images; return the exit code."""
    from fastmae.data import read_images
    from fastmae.evaluate import evaluate_sets
    from fastmae.train.weights import load_model

    model, _ = load_model(config.checkpoint)
    with _mistakes():
        images = read_images(list(config.images), model.img_size)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        summary = evaluate_sets(
            model,
            {"images": images},
            names={"images": [path.stem for path in config.images]},
            mask_ratio=config.mask_ratio,
            seed=config.seed,
            path=config.out,
            dtype=_dtype("fp32"),
        )
    for name, values in summary.items():
        print(name, *(f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float)), sep="  ")
    print(f"Picture: {config.out}")
    return 0


def _prepare(config: PretrainConfig, run: RunFolder, console: Console) -> Trainer:
    """The trainer of a run, at its first step or where its newest checkpoint left it."""
    import torch

    from fastmae import data
    from fastmae.model import create_model
    from fastmae.ops import _xformers
    from fastmae.train.checkpoint import latest_checkpoint, list_checkpoints
    from fastmae.train.loop import Trainer

    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    device = _device(config.train.device)
    dataset = data.open_dataset(config.data.path, on_bad=config.data.on_bad)
    if config.model.attention == "xformers":
        _xformers.require(device)
    kind = data.choose_loader(dataset, config.data.loader)
    model = create_model(**config.model_arguments()).to(device)
    trainer = Trainer(config, model, dataset, run, create_loader=data.create_loader, console=console)
    _print_config(config, console)
    weights = sum(p.numel() for p in model.parameters())
    console.print(
        f"{weights / 1e6:.1f} M weights on {device} ({torch.get_num_threads()} threads), {len(dataset):,} images "
        f"({kind} loader), {trainer.schedule.total_steps:,} steps of "
        f"{trainer.accumulation} x {trainer.batch_size} images"
    )
    if config.resume and list_checkpoints(run.checkpoints):
        path = latest_checkpoint(run.path)
        differences = trainer.resume(path)
        console.print(f"Continuing from {path}")
        for difference in differences:
            print(f"WARNING: not an exact continuation: {difference}", file=sys.stderr)
    elif config.resume:
        print(f"WARNING: --resume: no checkpoint in {run.path} yet; starting at step 0", file=sys.stderr)
    run.write_json("config.json", to_json(config))
    console.print(f"Run folder: {run.path}")
    return trainer


def _finish(trainer: Trainer, run: RunFolder, console: Console, seconds: float, steps: int) -> None:
    """Export the weights, reconstruct crops and photographs that were not trained on, write the summary."""
    from fastmae import data
    from fastmae.evaluate import evaluate_sets
    from fastmae.train.weights import export_weights

    config, model, dataset = trainer.config, trainer.model.eval(), trainer.dataset
    augment = data.Augment(scale=config.data.scale, ratio=config.data.ratio, hflip=config.data.hflip)
    crops = data.fixed_crops(
        dataset, config.img_size, seed=config.train.seed, epoch=_NEW_CROPS_EPOCH, count=32, augment=augment
    )
    names, photographs = data.validation_photographs(config.img_size)
    source = "photographs" if config.data.path is None else "images"
    sets = {
        f"new crops of the training {source}": crops,
        _UNSEEN: photographs,
    }
    picture = run.reconstructions / "final.png"
    errors = evaluate_sets(
        model,
        sets,
        mask_ratio=config.model.mask_ratio,
        seed=config.train.seed,
        path=picture,
        dtype=_dtype(config.train.precision),
        names={_UNSEEN: names},
    )
    weights = export_weights(model, run.path / "model.safetensors", step=trainer.step, config=to_json(config))
    rows = run.read_metrics()
    summary = {
        "steps": trainer.step,
        "samples": trainer.samples,
        "seconds": seconds,
        "images_per_second": steps * config.train.global_batch_size / seconds,
        "first_loss": rows[0]["loss"] if rows else None,
        "last_loss": rows[-1]["loss"] if rows else None,
        "device": str(trainer.device),
        "num_threads": trainer.num_threads,
        "loader": trainer.loader.kind,
        "bad_images": [f"{bad.path}: {bad.reason}" for bad in [*dataset.bad, *trainer.loader.bad_files]],
        "sets": errors,
        "picture": str(picture),
        "weights": str(weights),
    }
    run.write_json("summary.json", summary)
    for name, values in errors.items():
        console.print(
            f"{name}: error {values['mse']:.3f}  (mean colour {values['mse_mean_color']:.3f}, "
            f"inverse distance {values['mse_inverse_distance']:.3f})"
        )
    console.print(f"Weights: {weights}\nPicture: {picture}")


def _commands(defaults: PretrainConfig) -> Any:
    return (
        Annotated[PretrainConfig, tyro.conf.subcommand("pretrain", default=defaults)]
        | Annotated[ReconstructConfig, tyro.conf.subcommand("reconstruct")]
        | Annotated[EnvConfig, tyro.conf.subcommand("env")]
    )


def _defaults(argv: Sequence[str]) -> PretrainConfig:
    """Where the other flags' defaults come from: the run to continue, or the recipe."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=RECIPES, default=None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.exit_on_error = False
    try:
        known, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        return RECIPES["photographs"]  # tyro reads the same flags and words the error
    if known.resume:
        if known.out is None:
            raise UsageError("--resume: expected --out with the run folder to continue, got none")
        saved = read_config(known.out)
        if saved is not None and known.recipe not in (None, saved.recipe):
            raise UsageError(f"--recipe: the run in {known.out} was started with {saved.recipe}, got {known.recipe}")
        if saved is not None:
            return replace(saved, resume=False)
    return RECIPES[known.recipe or "photographs"]


def _given(argv: Sequence[str]) -> set[str]:
    """Fields of the section ``train`` that the user named."""
    names = {argument.split("=")[0].replace("-", "_") for argument in argv if argument.startswith("--train.")}
    return {name.removeprefix("__train.") for name in names}


@contextmanager
def _mistakes() -> Iterator[None]:
    """What goes wrong here is the user's to mend: outside, a ValueError or OSError counts as a bug."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def _is_mistake(error: Exception) -> bool:
    from fastmae.data import DataError
    from fastmae.train.checkpoint import CheckpointError

    full_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full_disk or isinstance(error, UsageError | DataError | CheckpointError | FloatingPointError)


def _device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--train.device: expected a CUDA device for cuda, but PyTorch finds none")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _dtype(precision: str) -> torch.dtype:
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32


def _print_config(config: PretrainConfig, console: Console) -> None:
    """The resolved configuration, a line a flag; what the recipe does not say is bold."""
    recipe = RECIPES[config.recipe]
    for section in ("model", "data", "train"):
        for field in fields(getattr(config, section)):
            value = getattr(getattr(config, section), field.name)
            changed = value != getattr(getattr(recipe, section), field.name)
            console.print(f"  {f'{section}.{field.name}':<33}{value}", style="bold" if changed else None)
