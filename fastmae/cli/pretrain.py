"""``fastmae pretrain``: a run folder, a trainer, and at the end a picture."""

from __future__ import annotations

import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from fastmae import data
from fastmae.cli.errors import UsageError, mistakes
from fastmae.cli.evaluations import Pictures, Probe, newest_values, reconstruction_sets
from fastmae.evaluate import evaluate_sets
from fastmae.interop.hugging_face_weights import is_hugging_face, read_hugging_face
from fastmae.model import create_model
from fastmae.ops import _xformers
from fastmae.train.batching.auto_batch import settle_batch_size
from fastmae.train.batching.free_memory import find_machine
from fastmae.train.checkpoint import CheckpointError, Ranks, list_checkpoints, open_latest
from fastmae.train.checkpoint.folder import step_of
from fastmae.train.config import PretrainConfig, to_json
from fastmae.train.flags import validate
from fastmae.train.init_from import initialize as initialize_weights
from fastmae.train.init_from import read_weights
from fastmae.train.liveness.collectives import joining
from fastmae.train.liveness.heartbeat import Heartbeat
from fastmae.train.liveness.rank_states import StateBoard
from fastmae.train.liveness.signals import PREEMPTED, StoppedEarly, StopRequest
from fastmae.train.liveness.watch import leave_if_asked
from fastmae.train.loop import Trainer
from fastmae.train.observers import Observer
from fastmae.train.parallel import DTYPES, Parallelism, construct, initialize, shutdown
from fastmae.train.preflight import preflight
from fastmae.train.profiling.profile import Profile
from fastmae.train.recipes import DESCRIPTIONS, NEEDS_WEIGHTS, RECIPES
from fastmae.train.run_folder import RunFolder
from fastmae.train.scaling.sizes import architecture_sizes
from fastmae.train.telemetry.rank_log import RankLog
from fastmae.train.weights import export_weights, load_model

_NEW_CROPS, _ROWS = 256, 12

_FLAGS = {
    "mode": "--train.parallel",
    "shard_size": "--train.shard-size",
    "device_type": "--train.device",
    "global_batch": "--train.global-batch-size",
    "max_batch": "--train.batch-size",
    "compile_mode": "--train.compile-mode",
}
"""Where arguments come from that functions complain about by their own names."""


def pretrain(config: PretrainConfig, stop: StopRequest) -> int:
    """Train, evaluate, and say where the picture is; return the exit code.

    Args:
        config: from the flags.
        stop: signals, watched for already.
    """
    with mistakes(_FLAGS):
        validate(config)
        if config.recipe in NEEDS_WEIGHTS and config.train.init_from is None:
            raise ValueError(f"--train.init-from: expected weights to continue from with {config.recipe}, got none")
        shard_size = config.train.shard_size
        with joining():
            parallelism = initialize(config.train.parallel, _device_type(config.train.device), shard_size=shard_size)
    stall_seconds = config.report.stall_seconds
    try:
        with (
            Heartbeat(parallelism.rank, StateBoard.create(), stall_seconds) as heartbeat,
            heartbeat.explaining(),
            Ranks.create() as ranks,
            heartbeat.explaining(),
        ):
            ranks.waiting = heartbeat.waiting
            return _pretrain(config, parallelism, ranks, stop, heartbeat)
    finally:
        shutdown(parallelism)


def _pretrain(
    config: PretrainConfig, parallelism: Parallelism, ranks: Ranks, stop: StopRequest, heartbeat: Heartbeat
) -> int:
    default = Path("runs") / time.strftime(f"{config.recipe}-%Y%m%d-%H%M%S")
    config = replace(config, out=ranks.first("naming the run", lambda: config.out or default))
    with mistakes():
        run = _open_run(config, ranks)
    with run, RankLog(run.path, ranks.rank, ranks.size, parallelism.device):
        console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not parallelism.is_main)
        try:
            with mistakes(_FLAGS):
                trainer = _prepare(config, run, console, parallelism, ranks, stop, heartbeat)
        except StoppedEarly as stopped:
            _leave_early(config, run, console, str(stopped))
            return PREEMPTED
        begun, first_step = time.monotonic(), trainer.step
        status = trainer.fit()
        seconds = time.monotonic() - begun
        if status == "preempted":
            console.print(f"Saved at step {trainer.step}. Continue with: fastmae pretrain --out {run.path} --resume")
            return PREEMPTED
        if parallelism.is_main:
            heartbeat.begin("evaluating")
            ended = run.read_json("status.json")
            run.write_json("status.json", ended | {"status": "running"})  # it is not finished without its weights
            with run.failure_noted(lambda: trainer.step):
                _finish(trainer, run, console, seconds, trainer.step - first_step)
            run.write_json("status.json", ended)
        heartbeat.begin("ending")
        ranks.first("ending the run", lambda: None)  # the others wait for it
    return 0


def _open_run(config: PretrainConfig, ranks: Ranks) -> RunFolder:
    """The run folder, locked by the first rank."""
    run = None

    def lead() -> None:
        nonlocal run
        try:
            run = RunFolder(config.out, resume=config.resume)
        except BlockingIOError:
            raise
        except OSError as error:
            raise UsageError(f"--out: expected a folder that can be written, got {config.out}: {error}") from error

    lead() if ranks.size == 1 else ranks.first("opening the run folder", lead)
    return run or RunFolder(config.out, resume=config.resume, leader=False)


def _leave_early(config: PretrainConfig, run: RunFolder, console: Console, reason: str) -> None:
    """Leave a run folder that the run can begin in, or go on in, with ``--resume``."""
    saved = list_checkpoints(run.checkpoints)
    run.write_json("status.json", {"status": "preempted", "step": step_of(saved[0]) if saved else 0, "reason": reason})
    if run.leader and run.read_json("config.json") is None:
        run.write_json("config.json", to_json(config))
    console.print(f"Left before the first step. Continue with: fastmae pretrain --out {run.path} --resume")


def _prepare(
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
    limits = {name: getattr(config.data, name) for name in ("value_range", "max_bad_fraction", "max_pixels")}
    open_dataset = partial(data.open_dataset, config.data.path, channels=config.model.in_chans, **limits)
    heartbeat.begin("opening the data")
    if ranks.size > 1:
        ranks.first("opening the data", lambda: open_dataset() and None)  # the others then find its index
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
    options["observers"] = _observers(config, dataset, ranks)
    saved = None
    if config.resume and ranks.first("listing checkpoints", lambda: bool(list_checkpoints(run.checkpoints))):
        saved = open_latest(run.path, ranks=ranks)
    settled = None
    if config.train.batch_size == "auto":
        machine = find_machine(config, architecture_sizes(model.architecture), parallelism, ranks, dataset, kind)
        settled = settle_batch_size(config, machine, saved.manifest if saved else None)
    to_run = settled.config if settled else config  # config.json keeps "auto", for other GPUs
    trainer = Trainer(to_run, model, dataset, run, create_loader=data.create_loader, **options)
    _print_config(config, console)
    weights = sum(p.numel() for p in model.parameters())
    if config.data.progressive_sizes:
        console.print(f"  images of {trainer.resolution} over the images, counted from 0")
    processes = f"{ranks.size} processes ({parallelism.mode}) x " if ranks.size > 1 else ""
    console.print(
        f"{weights / 1e6:.1f} M weights on {device} ({torch.get_num_threads()} threads), {len(dataset):,} images "
        f"({kind} loader), {trainer.schedule.total_steps:,} steps of "
        f"{processes}{trainer.accumulation} x {trainer.batch_size} images"
    )
    if settled:
        console.print(settled.text)
    train, schedule = config.train, trainer.schedule
    console.print(
        f"learning rate {train.base_lr:g} x {train.global_batch_size} / 256 = {schedule.peak_lr:.3g} after "
        f"{schedule.warmup_steps:,.0f} steps of warm-up, then a cosine to {train.min_lr:g}"
    )
    if saved:
        differences = trainer.resume(saved)
        console.print(f"Continuing from {saved.path}")
        for difference in differences if parallelism.is_main else ():
            print(f"WARNING: not an exact continuation: {difference}", file=sys.stderr)
    else:
        if config.resume and parallelism.is_main:
            print(f"WARNING: --resume: no checkpoint in {run.path} yet; starting at step 0", file=sys.stderr)
        if train.init_from is not None:
            _start_from(train.init_from, trainer, console, ranks)
    run.write_json("config.json", to_json(config))
    console.print(f"Run folder: {run.path}")
    return trainer


def _observers(config: PretrainConfig, dataset: data.Dataset, ranks: Ranks) -> list[Observer]:
    """What looks at the run between steps, as ``--report`` says; the same on all ranks.

    Raises:
        ValueError: if something cannot be observed, naming the flag.
    """
    observers: list[Observer] = []
    if config.report.picture_every_steps:
        observers.append(Pictures(config, dataset))
    if config.report.probe_every_epochs:
        observers.append(Probe(config, dataset, ranks))
    if config.report.profile_at_step:
        observers.append(Profile(config.report.profile_at_step, config.report.profile_steps))
    return observers


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


def _finish(trainer: Trainer, run: RunFolder, console: Console, seconds: float, steps: int) -> None:
    """Export the weights, reconstruct crops and photographs that were not trained on, write the summary."""
    config = trainer.config
    # Of shards there is one whole copy: the checkpoint that was just saved.
    sharded = trainer.parallelism.sharded
    model = load_model(run.path)[0].to(trainer.device) if sharded else trainer.model.eval()
    sets, names = reconstruction_sets(config, trainer.dataset, _NEW_CROPS)
    picture = run.reconstructions / "final.png"
    errors = evaluate_sets(
        model,
        sets,
        mask_ratio=config.model.mask_ratio,
        seed=config.train.seed,
        path=picture,
        dtype=DTYPES[config.train.precision],
        names=names,
        num_rows=_ROWS,
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
        "bad_files": len(trainer.bad_files),
        "sets": errors,
        "evaluations": newest_values(run),
        "picture": str(picture),
        "weights": str(weights),
    }
    run.write_json("summary.json", summary)
    if bad := len(trainer.bad_files):
        console.print(f"{bad:,} bad file{'s' * (bad > 1)}, replaced by others: {run.path / 'bad_files.jsonl'}")
    for name, values in errors.items():
        console.print(
            f"{name}: error {values['mse']:.3f}  (mean colour {values['mse_mean_color']:.3f}, "
            f"inverse distance {values['mse_inverse_distance']:.3f})"
        )
    console.print(f"Weights: {weights}\nPicture: {picture}")


def _device_type(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--train.device: expected a CUDA device for cuda, but PyTorch finds none")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _print_config(config: PretrainConfig, console: Console) -> None:
    """The resolved configuration, a line a flag; what the recipe does not say is bold."""
    recipe = RECIPES[config.recipe]
    console.print(f"Recipe {config.recipe}, version {config.recipe_version}: {DESCRIPTIONS[config.recipe]}")
    for section in ("model", "data", "train", "report"):
        for field in fields(getattr(config, section)):
            value = getattr(getattr(config, section), field.name)
            changed = value != getattr(getattr(recipe, section), field.name)
            console.print(f"  {f'{section}.{field.name}':<33}{value}", style="bold" if changed else None)
