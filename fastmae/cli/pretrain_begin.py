"""The beginning of ``fastmae pretrain``: data, model, trainer, what watches it, and what is said of them."""

from __future__ import annotations

import logging
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastmae import data
from fastmae.cli.evaluations import Pictures, Probe
from fastmae.interop.hugging_face_weights import is_hugging_face, read_hugging_face
from fastmae.model import create_model
from fastmae.ops import _xformers
from fastmae.train.batch_size import keeps_batch_size
from fastmae.train.callbacks import Callback
from fastmae.train.checkpoint import Checkpoint, CheckpointError, Ranks, list_checkpoints, open_latest
from fastmae.train.checkpoint.format import step_of
from fastmae.train.config import PretrainConfig, to_json
from fastmae.train.fit_steps import with_saved_length
from fastmae.train.init_from import initialize as initialize_weights
from fastmae.train.init_from import read_weights
from fastmae.train.liveness.heartbeat import Heartbeat
from fastmae.train.liveness.signals import StopRequest
from fastmae.train.liveness.watch import leave_if_asked
from fastmae.train.loop import Trainer
from fastmae.train.parallel import Parallelism, construct
from fastmae.train.precision import settle_precision
from fastmae.train.preflight import preflight
from fastmae.train.profile import Profile
from fastmae.train.recipes import DESCRIPTIONS, RECIPES, scaled_warmup
from fastmae.train.rules import flag
from fastmae.train.run_folder import RunFolder

_log = logging.getLogger(__name__)


def prepare(
    config: PretrainConfig,
    run: RunFolder,
    console: Console,
    parallelism: Parallelism,
    ranks: Ranks,
    stop: StopRequest,
    heartbeat: Heartbeat,
) -> Trainer:
    """The trainer of a run, at its first step or where its newest checkpoint left it."""
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    device = parallelism.device
    open_dataset = partial(data.open_dataset, config.data.path, **config.dataset_arguments())
    heartbeat.begin("opening the data")
    if ranks.size > 1:
        ranks.first_in_hours("opening the data", lambda: open_dataset() and None)  # the others then find its index
    dataset = open_dataset()
    leave_if_asked(ranks, stop)
    if config.model.attention == "xformers":
        _xformers.require(device)
    heartbeat.begin("starting")
    kind = data.choose_loader(dataset, config.data.loader)
    model = construct(lambda: create_model(**config.model_arguments()), parallelism)
    preflight(config, parallelism, ranks, run=run.path, dataset=dataset, model=model)
    leave_if_asked(ranks, stop)
    options = {"console": console, "parallelism": parallelism, "ranks": ranks, "stop": stop, "heartbeat": heartbeat}
    options["callbacks"] = _callbacks(config, dataset, ranks)
    saved = None
    if config.resume and ranks.first("listing checkpoints", lambda: bool(list_checkpoints(run.checkpoints))):
        saved = open_latest(run.path, ranks=ranks)
    manifest = saved.manifest if saved else None
    precision = settle_precision(config, model.architecture["embed_dim"], device, ranks, manifest)
    # What is measured is in the checkpoints; config.json keeps "auto", for other machines.
    to_run = with_saved_length(precision.config, manifest)
    if config.train.batch_size == "auto" and saved and keeps_batch_size(config, saved.manifest, ranks.size):
        batch_size = saved.manifest["config"]["train"]["batch_size"]
        to_run = replace(to_run, train=replace(to_run.train, batch_size=batch_size))
    trainer = Trainer(to_run, model, dataset, run, create_loader=data.create_loader, **options)
    _say_config(config, console)
    _say_size(trainer, kind, None)
    if precision.text:
        console.print(precision.text)
    if precision.warning and parallelism.is_main:
        print(f"WARNING: {precision.warning}", file=sys.stderr)
    if parallelism.is_main:
        _warn_of_few_images(dataset, config)
    if saved:
        differences = _resume(trainer, saved, run, console)
        for difference in differences if parallelism.is_main else ():
            print(f"WARNING: not an exact continuation: {difference}", file=sys.stderr)
    else:
        if config.resume and parallelism.is_main:
            print(f"WARNING: --resume: no checkpoint in {run.path} yet; starting at step 0", file=sys.stderr)
        if config.train.init_from is not None:
            _start_from(config.train.init_from, trainer, console, ranks)
    run.write_json("config.json", to_json(config))
    console.print(f"Run folder: {run.path}")
    return trainer


def _warn_of_few_images(dataset: data.Dataset, config: PretrainConfig) -> None:
    images, batch = len(dataset) - len(dataset.bad_ids), config.train.global_batch_size // config.train.masks_per_image
    if dataset.embedded or images >= batch:
        return
    if images == 1:
        text = "one image only: every batch holds crops of it, and the model learns nothing about others"
    else:
        text = f"{images} images, fewer than the {batch} of a step, so that each step holds several crops of each; "
        text += "expect the model to learn little about other images, and consider a smaller --train.global-batch-size"
    print(f"WARNING: --data.path: {text}", file=sys.stderr)


def _callbacks(config: PretrainConfig, dataset: data.Dataset, ranks: Ranks) -> list[Callback]:
    """What looks at the run between steps, as ``--report`` says; the same on all ranks.

    Raises:
        ValueError: if something cannot be observed, naming the flag.
    """
    callbacks: list[Callback] = []
    if config.report.picture_every_steps:
        callbacks.append(Pictures(config, dataset))
    if config.report.probe_every_epochs:
        callbacks.append(Probe(config, dataset, ranks))
    if config.report.profile_at_step:
        callbacks.append(Profile(config.report.profile_at_step, config.report.profile_steps))
    return callbacks


def _resume(trainer: Trainer, saved: Checkpoint, run: RunFolder, console: Console) -> list[str]:
    """Go on from a checkpoint, and say from which one; return what makes the continuation inexact."""
    newer = trainer.ranks.first(
        "listing checkpoints",
        lambda: [path.name for path in list_checkpoints(run.checkpoints) if step_of(path) > saved.manifest["step"]],
    )
    differences = trainer.resume(saved)
    text = f"Continuing from {saved.path}" + (f"; passed over as damaged: {', '.join(newer)}" if newer else "")
    console.print(text)
    _log.info("; ".join([text, *differences]))
    return differences


def _start_from(path: Path, trainer: Trainer, console: Console, ranks: Ranks) -> None:
    """Give a new run's model the weights that the user named."""

    def load() -> str:
        try:
            weights, architecture = (read_hugging_face if is_hugging_face(path) else read_weights)(path)
            return initialize_weights(trainer.model, weights, architecture)
        except (CheckpointError, ValueError) as error:
            raise CheckpointError(f"--train.init-from {path}: {str(error).removeprefix(f'{path}: ')}") from error

    loaded = ranks.gather(f"--train.init-from {path}", load)
    console.print(f"Weights from {path}: {loaded[0]}")


def _say_size(trainer: Trainer, kind: str, batch: str | None) -> None:
    """Weights, images, steps, and how batch and learning rate came about."""
    config, model, say = trainer.config, trainer.model, trainer.console.print
    train, schedule, size = config.train, trainer.schedule, trainer.ranks.size
    weights = sum(p.numel() for p in model.parameters())
    if config.data.progressive_sizes:
        say(f"  images of {trainer.task.resolution} over the images, counted from 0")
    processes = f"{size} processes ({trainer.parallelism.mode}) x " if size > 1 else ""
    say(
        f"{weights / 1e6:.1f} M weights on {trainer.device} ({torch.get_num_threads()} threads), "
        f"{len(trainer.dataset):,} images ({kind} loader), {'at most ' * train.fit_steps}{schedule.total_steps:,} "
        f"steps of {processes}{trainer.accumulation} x {trainer.batch_size} images"
    )
    if batch:
        say(batch)
    say(
        f"learning rate {train.base_lr:g} x {train.global_batch_size} / 256 = {schedule.peak_lr:.3g} after "
        f"{schedule.warmup_steps:,.0f} steps of warm-up, then a cosine to {train.min_lr:g}"
    )


def _say_config(config: PretrainConfig, console: Console) -> None:
    """The recipe and what differs from it, as flags; ``config.json`` has everything."""
    recipe = RECIPES[config.recipe]
    later = f" (today's is {recipe.recipe_version})" if config.recipe_version != recipe.recipe_version else ""
    console.print(f"Recipe {config.recipe}, version {config.recipe_version}{later}: {DESCRIPTIONS[config.recipe]}")
    warmup = scaled_warmup(config.train, recipe.train)
    for section in ("model", "data", "train", "report"):
        for field in fields(getattr(config, section)):
            value, usual = (getattr(getattr(c, section), field.name) for c in (config, recipe))
            if value != usual:
                why = "" if usual is None else f"  (recipe: {_as_flag(usual)})"
                if section == "train" and value is not None and warmup.get(field.name) == value:
                    why += "  the recipe's share of the run"
                console.print(f"  {flag(section, field.name)} {_as_flag(value)}{why}")


def _as_flag(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
