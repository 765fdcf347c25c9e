"""A whole training run: open the data, build the model, check, resume or initialise, train, evaluate, summarise.

:class:`TrainingRun` is what runs of every kind share, :class:`Pretraining` a masked autoencoder's;
:mod:`fastmae.finetuning` has classifiers'. Nothing here parses arguments or exits the process.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastmae import data
from fastmae.data.records import Records
from fastmae.errors import UsageError, usage_errors
from fastmae.evaluate import evaluate_sets
from fastmae.evaluate.callbacks import Pictures, Probe, reconstruction_sets
from fastmae.loading import load, read_weights
from fastmae.model import create_model
from fastmae.ops import _xformers
from fastmae.train.autotune import describe_uneven_shares, settle_precision, with_saved
from fastmae.train.callbacks import Callback
from fastmae.train.checkpoint import Checkpoint, CheckpointError, Ranks, list_checkpoints, open_latest, step_of
from fastmae.train.checkpoint.state import check_manifest
from fastmae.train.config import PretrainConfig, read_config, to_json
from fastmae.train.launcher import place
from fastmae.train.liveness import StoppedEarly, StopRequest, Watchdog, leave_if_asked
from fastmae.train.loggers import in_notebook, without_nan
from fastmae.train.parallel import DTYPES, Parallelism, construct, initialize, shutdown
from fastmae.train.preflight import preflight
from fastmae.train.profile import Profile
from fastmae.train.recipes import NEEDS_WEIGHTS, describe
from fastmae.train.rules import flag, validate
from fastmae.train.run_folder import RunFolder
from fastmae.train.task import MaskedAutoencoding
from fastmae.train.trainer import Status, Trainer
from fastmae.train.weights import export_weights
from fastmae.train.weights import initialize as initialize_weights

_log = logging.getLogger(__name__)

FLAGS = {"compile_mode": "--train.compile-mode", "cuda_graph": "--train.cuda-graph"}
"""Flags behind arguments that functions report by their own names."""
_CROPS, _ROWS = 256, 12
"""Crops over which the final errors are measured, and rows of the final picture."""
_BASELINES = {"the mean visible colour": "mse_mean_color", "inverse-distance filling": "mse_inverse_distance"}


def run(config: PretrainConfig, stop: StopRequest, records: Records | None = None) -> tuple[Path, Status]:
    """Pretrain and evaluate: :func:`launch`. ``records`` are the images, instead of what ``--data.path`` names."""
    with usage_errors(FLAGS):
        if config.recipe in NEEDS_WEIGHTS and config.train.init_from is None:
            raise ValueError(f"--train.init-from: expected weights to continue from with {config.recipe}, got none")
    trained, status = launch(partial(Pretraining, records=records), config, stop, config.recipe)
    return trained.folder.path, status


def launch(kind: Callable[..., TrainingRun], config: Any, stop: StopRequest, name: str) -> tuple[TrainingRun, Status]:
    """Train and evaluate; every process of the run calls it, its signals being watched for already.

    Args:
        kind: makes the run of its configuration, folder, parallelism, ranks, stop and watchdog.
        name: begins the name of a run folder that the configuration does not name.

    Returns:
        The run and how it ended, the same on all ranks.

    Raises:
        UsageError: for what the user can fix before the first step.
        DataError, CheckpointError, FloatingPointError: as ``Trainer.fit``.
    """
    with usage_errors(FLAGS):
        validate(config)
        rank, world_size, *_ = place()
    with (
        cpu_threads(config.train.num_threads),
        Watchdog(rank, world_size, config.report.stall_seconds, stop) as watchdog,
        watchdog.explaining(),
    ):
        watchdog.at("joining the process group")
        with usage_errors(FLAGS):
            train = config.train
            parallelism = initialize(train.parallel, train.device, shard_size=train.shard_size, timeout=train.timeout)
        try:
            with watchdog.explaining(), Ranks.create() as ranks:
                ranks.waiting = watchdog.waiting
                default = Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")
                out = ranks.first("naming the run", lambda: _folder(config) or default)
                config = replace(config, **{config.folder_flag: out})
                if not config.resume and ranks.first("looking for the run", lambda: _is_restarted(config)):
                    config = replace(config, resume=True)
                with usage_errors():
                    folder = _open_folder(config, ranks)
                with folder:
                    run = kind(config, folder, parallelism, ranks, stop, watchdog)
                    status = run.run()
        except BaseException:
            shutdown(parallelism, failed=True)
            raise
        shutdown(parallelism)
    return run, status


def _folder(config: Any) -> Path | None:
    return getattr(config, config.folder_flag)


def _is_restarted(config: Any) -> bool:
    """Whether torchrun has restarted this very run (``--max-restarts``), which then resumes by itself."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    saved = read_config(_folder(config), type(config)) if restarts else None
    return saved is not None and replace(saved, resume=False, **{config.folder_flag: _folder(config)}) == config


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Context with another number of PyTorch's CPU threads; None keeps the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open_folder(config: Any, ranks: Ranks) -> RunFolder:
    """The run folder, which rank 0 makes and locks."""
    led, path, name = [], _folder(config), flag(config.folder_flag)

    def lead() -> None:
        try:
            led.append(RunFolder(path, resume=config.resume, flag=name))
        except BlockingIOError:
            raise
        except OSError as error:
            raise UsageError(f"{name}: expected a folder that can be written, got {path}: {error}") from error

    if ranks.size == 1:
        lead()
    else:
        ranks.first("opening the run folder", lead)
    return led[0] if led else RunFolder(path, resume=config.resume, leader=False)


@dataclass
class TrainingRun:
    """One run in an open folder: set up, train, evaluate. Subclasses have the images, the model and its task."""

    config: Any
    folder: RunFolder
    parallelism: Parallelism
    ranks: Ranks
    stop: StopRequest
    watchdog: Watchdog

    def __post_init__(self) -> None:
        # Long lines stay whole, so that paths can be copied; a notebook's stdout claims to be a terminal and is none.
        options = {"highlight": False, "markup": False, "soft_wrap": True, "force_jupyter": False}
        terminal = False if in_notebook() else None
        self.console = Console(quiet=not self.parallelism.is_main, force_terminal=terminal, **options)
        self.resume_command = f"{self.config.command} {flag(self.config.folder_flag)} {self.folder.path} --resume"

    def run(self) -> Status:
        """Returns how the run ended, the same on all ranks."""
        try:
            with usage_errors(FLAGS):
                trainer = self.set_up()
        except StoppedEarly as stopped:
            return self.leave_early(str(stopped))
        began, first_step = time.monotonic(), trainer.step
        status = trainer.fit()
        seconds = time.monotonic() - began
        if status == "preempted":
            self.console.print(f"Saved at step {trainer.step}. Continue with: {self.resume_command}")
            return status
        if self.parallelism.is_main:
            self.watchdog.at("evaluating")
            rate = (trainer.step - first_step) * self.config.train.global_batch_size / seconds
            status = self.finish(trainer, {"seconds": seconds, "images_per_second": rate})
        self.watchdog.at("ending")
        return self.ranks.first("ending the run", lambda: status)  # the others wait for rank 0's evaluation

    # Before the first step. All ranks take the same path; where one may take long, the others wait on the side group.

    def set_up(self) -> Trainer:
        """The trainer, at step 0 or where the newest checkpoint left it; raises StoppedEarly on all ranks, if a signal
        has come to any."""
        ranks, device = self.ranks, self.parallelism.device
        self.watchdog.at("opening the data")
        dataset = self.open_images()
        leave_if_asked(ranks, self.stop)
        if self.config.model.attention == "xformers":
            _xformers.require(device)
        self.watchdog.at("starting")
        kind = data.choose_loader(dataset, self.config.data.loader)
        model = self.create_model()
        config = self.config
        preflight(config, self.parallelism, ranks, run=self.folder.path, dataset=dataset, model=model)
        leave_if_asked(ranks, self.stop)
        saved, found = None, []
        if config.resume:
            found = ranks.first("listing checkpoints", lambda: list_checkpoints(self.folder.checkpoints))
            saved = open_latest(self.folder.path, ranks=ranks, check=check_manifest) if found else None
        settled = with_saved(config, saved and saved.manifest, ranks.size)
        settled, how, warning = settle_precision(settled, model.architecture["embed_dim"], device, ranks)
        trainer = Trainer(
            settled,
            self.create_task(settled, model, dataset),
            self.folder,
            console=self.console,
            parallelism=self.parallelism,
            ranks=ranks,
            callbacks=self.callbacks(dataset),
            stop=self.stop,
            watchdog=self.watchdog,
        )
        for line in (*self.describe(), *_describe_size(trainer, kind), how):
            if line:
                self.console.print(line)
        train = config.train
        uneven = describe_uneven_shares(train.global_batch_size, ranks.size, train.masks_per_image)
        for line in (warning, _too_few_images(dataset, config), uneven):
            self.warn(line)
        if saved:
            self.resume(trainer, saved, found)
        else:
            if config.resume:
                self.warn(f"--resume: no checkpoint in {self.folder.path} yet; starting at step 0")
            self.initialize(trainer)
        self.folder.write_json("config.json", to_json(config))
        self.console.print(f"Run folder: {self.folder.path}")
        return trainer

    def open(self, images: Any, **options: Any) -> data.Dataset:
        """A data set, on all ranks; ``options`` are those of ``fastmae.data.open_dataset``."""
        open_dataset = partial(data.open_dataset, images, **options)
        if self.ranks.size > 1:  # rank 0 lists the data and publishes the index, the others then open it
            return data.open_once(open_dataset, partial(self.ranks.first_in_hours, "opening the data"))
        return open_dataset()

    def callbacks(self, dataset: data.Dataset) -> list[Callback]:
        """What ``--report`` asks for; the same on all ranks."""
        report = self.config.report
        return [Profile(report.profile_at_step, report.profile_steps)] if report.profile_at_step else []

    def initialize(self, trainer: Trainer) -> None:
        """What a new run does to its model once that is where it is trained."""

    def resume(self, trainer: Trainer, saved: Checkpoint, found: list[Path]) -> None:
        """Continue from a checkpoint; report which one, and what makes the continuation inexact."""
        differences = trainer.resume(saved)
        damaged = [path.name for path in found if step_of(path) > saved.manifest["step"]]
        text = f"Continuing from {saved.path}" + (f"; skipped as damaged: {', '.join(damaged)}" if damaged else "")
        self.console.print(text)
        _log.info("; ".join([text, *differences]))
        for difference in differences:
            self.warn(f"not an exact continuation: {difference}")

    def leave_early(self, reason: str) -> Status:
        """A signal before the first step: leave a folder that ``--resume`` starts or continues in."""
        saved = list_checkpoints(self.folder.checkpoints)
        status = {"status": "preempted", "step": step_of(saved[0]) if saved else 0, "reason": reason}
        self.folder.write_json("status.json", status)
        if self.folder.leader and self.folder.read_json("config.json") is None:
            self.folder.write_json("config.json", to_json(self.config))
        self.console.print(f"Left before the first step. Continue with: {self.resume_command}")
        return "preempted"

    def warn(self, text: str | None) -> None:
        if text and self.parallelism.is_main:
            print(f"WARNING: {text}", file=sys.stderr)

    # After the last step, on rank 0.

    def finish(self, trainer: Trainer, timing: dict[str, float]) -> Status:
        """Write the final weights, then evaluate them; a signal ends the evaluation, which resuming repeats."""
        ended, status = self.folder.read_json("status.json"), "finished"
        # Not finished before its weights are there: the process may be killed now.
        self.folder.write_json("status.json", ended | {"status": "running"})
        with self.folder.failure_noted(lambda: trainer.step):
            model, weights = self.export(trainer)
            try:
                with self.stop.raising():
                    self.evaluate(trainer, model, weights, timing)
            except StoppedEarly as stopped:
                status = "preempted"
                ended |= {"status": status, "reason": f"{stopped} during the final evaluation"}
                # A run that its time limit ended trains on before it evaluates.
                verb = "Evaluate" if trainer.step == trainer.schedule.total_steps else "Continue"
                self.console.print(f"The training is done: {weights}. {verb} with: {self.resume_command}")
        self.folder.write_json("status.json", ended)
        return status

    def export(self, trainer: Trainer) -> tuple[nn.Module, Path]:
        """Write ``model.safetensors``; return the whole model and the file."""
        # Of a sharded model the checkpoint that was just saved is the only whole copy.
        sharded = self.parallelism.sharded
        model = load(self.folder.path).to(trainer.device) if sharded else trainer.model.eval()
        path = self.folder.path / "model.safetensors"
        return model, export_weights(model, path, step=trainer.step, config=to_json(trainer.config))


@dataclass
class Pretraining(TrainingRun):
    """A masked autoencoder; ``records`` are its images, instead of what ``--data.path`` names."""

    records: Records | None = None

    def open_images(self) -> data.Dataset:
        """The images to train on."""
        config = self.config
        options = {"index": config.data.index, "window": config.data.window, **config.dataset_arguments()}
        return self.open(config.data.path if self.records is None else self.records, **options)

    def create_model(self) -> nn.Module:
        """The model, where it is made before it is sharded."""
        return construct(lambda: create_model(**self.config.model_arguments()), self.parallelism)

    def create_task(self, config: PretrainConfig, model: nn.Module, dataset: data.Dataset) -> MaskedAutoencoding:
        """What is trained; ``config`` is settled."""
        return MaskedAutoencoding(config, model, dataset, data.create_loader)

    def describe(self) -> Iterator[str]:
        """What the run prints of its configuration."""
        return describe(self.config)

    def callbacks(self, dataset: data.Dataset) -> list[Callback]:
        """As :class:`TrainingRun`, and pictures and probes."""
        config, report = self.config, self.config.report
        pixels = config.model.target == "pixels"
        pictures = [Pictures(config, dataset)] if pixels and report.picture_every_steps else []
        probes = [Probe(config, dataset, self.ranks)] if report.probe_every_epochs else []
        return [*pictures, *probes, *super().callbacks(dataset)]

    def initialize(self, trainer: Trainer) -> None:
        """Load ``--train.init-from``."""
        path = self.config.train.init_from
        if path is None:
            return

        def load() -> str:
            try:
                sizes = {name: trainer.model.architecture[name] for name in ("img_size", "patch_size", "in_chans")}
                weights, info = read_weights(path, **self.config.train.init_rules, **sizes)
                return initialize_weights(trainer.model, weights, info.known)
            except (CheckpointError, ValueError) as error:
                raise CheckpointError(f"--train.init-from {path}: {str(error).removeprefix(f'{path}: ')}") from error

        loaded = self.ranks.gather(f"--train.init-from {path}", load)
        self.console.print(f"Weights from {path}: {loaded[0]}")

    def evaluate(self, trainer: Trainer, model: nn.Module, weights: Path, timing: dict[str, float]) -> None:
        """Reconstruct images that were not trained on; write ``final.png`` and ``summary.json``."""
        config, folder, say = trainer.config, self.folder, self.console.print
        errors, picture = {}, None
        if config.model.target == "pixels":
            say("Evaluating: reconstructing images that were not trained on")
            picture = folder.reconstructions / "final.png"
            errors = self.reconstruct(trainer, model, picture)
        losses = [row["loss"] for row in folder.read_metrics()] or [None]
        newest = {name: value for row in folder.read_evaluations() for name, value in row.items()}
        summary = {
            "steps": trainer.step,
            "samples": trainer.samples,
            **timing,
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "device": str(trainer.device),
            "precision": config.train.precision,
            "num_threads": torch.get_num_threads(),
            "loader": trainer.loader.kind,
            "bad_files": len(trainer.bad_files),
            "sets": errors,
            "evaluations": {k: v for k, v in newest.items() if k != "step" and isinstance(v, int | float)},
            "picture": picture and str(picture),
            "weights": str(weights),
        }
        folder.write_json("summary.json", without_nan(summary))
        if bad := len(trainer.bad_files):
            say(f"{bad:,} bad file{'s' * (bad > 1)}, replaced by others: {folder.path}/bad_files.jsonl")
        for name, values in errors.items():
            say(
                f"{name}, {values['mask_strategy']} masks: error {values['mse']:.3f}  "
                f"(mean colour {values['mse_mean_color']:.3f}, inverse distance {values['mse_inverse_distance']:.3f})"
            )
            if values["worse_than"]:
                say(f"{name}: WORSE THAN {' and '.join(values['worse_than'])}, without a model")
        say(f"Weights: {weights}" + (f"\nPicture: {picture}" if picture else ""))
        if not all(math.isfinite(values["mse"]) for values in errors.values()):
            self.warn("THE MODEL'S PREDICTIONS ARE NOT FINITE: its weights are of no use")

    def reconstruct(self, trainer: Trainer, model: nn.Module, picture: Path) -> dict[str, dict[str, Any]]:
        """Errors of reconstructions by set of images, beside those of the baselines; draws the picture."""
        config = trainer.config
        sets, names = reconstruction_sets(config, trainer.dataset, _CROPS)
        masks = {"mask_ratio": config.model.mask_ratio, "mask_strategy": config.model.mask_strategy}
        drawing = {"path": picture, "names": names, "num_rows": _ROWS, "when": f"after {trainer.step:,} steps"}
        dtype = DTYPES[config.train.precision]
        errors = evaluate_sets(model, sets, **masks, **drawing, seed=config.train.seed, dtype=dtype)
        for values in errors.values():
            values["worse_than"] = [name for name, key in _BASELINES.items() if not values["mse"] < values[key]]
        return errors


# ---------------------------------------------------------------------------------------------------------------------
# What a run prints at its start


def _describe_size(trainer: Trainer, loader: str) -> Iterator[str]:
    """Weights, images, steps and learning rate."""
    config, train, schedule, size = trainer.config, trainer.config.train, trainer.schedule, trainer.ranks.size
    if config.data.progressive_sizes:
        yield f"  images of {trainer.task.resolution} over the images, counted from 0"
    weights = sum(p.numel() for p in trainer.model.parameters())
    processes = f"{size} processes ({trainer.parallelism.mode}) x " if size > 1 else ""
    yield (
        f"{weights / 1e6:.1f} M weights on {trainer.device} ({torch.get_num_threads()} threads), "
        f"{len(trainer.dataset):,} images ({loader} loader), {'at most ' * train.fit_steps}{schedule.total_steps:,} "
        f"steps of {processes}{trainer.accumulation} x {trainer.batch_size} images"
    )
    if not trainer.dataset.embedded:
        yield f"index: {trainer.dataset.index.folder or 'in a temporary file, since it cannot be kept'}"
    yield (
        f"learning rate {train.base_lr:g} x {train.global_batch_size} / 256 = {schedule.peak_lr:.3g} after "
        f"{schedule.warmup_steps:,.0f} steps of warm-up, then a cosine to {train.min_lr:g}"
    )


def _too_few_images(dataset: data.Dataset, config: Any) -> str | None:
    images, batch = len(dataset) - len(dataset.bad_ids), config.train.global_batch_size // config.train.masks_per_image
    if dataset.embedded or images >= batch:
        return None
    return (
        f"--data.path: {images} images, fewer than the {batch} of a step, so that each step holds several crops of "
        "each; expect the model to learn little about other images, and consider a smaller --train.global-batch-size"
    )
