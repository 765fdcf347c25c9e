"""``fastmae bench``: images per second of the loader, of the model and of both, and what limits them."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastmae import data
from fastmae.errors import usage_errors
from fastmae.model import create_model
from fastmae.ops import _xformers
from fastmae.train.bench import PHASES, config_to_measure, measure, result
from fastmae.train.config import PretrainConfig
from fastmae.train.parallel import num_processes
from fastmae.train.precision import settle_precision
from fastmae.train.ranks import Ranks
from fastmae.train.rules import validate
from fastmae.train.run_folder import RunFolder
from fastmae.train.task import MaskedAutoencoding
from fastmae.train.trainer import Trainer


def bench(config: PretrainConfig, seconds: float, json_file: Path | None) -> int:
    """Measure, print, write the file; return the exit code."""
    with usage_errors():
        if not (seconds > 0 and math.isfinite(seconds)):
            raise ValueError(f"--seconds: expected a positive number, got {seconds}")
        if num_processes() > 1:
            raise ValueError(
                f"fastmae bench: expected to be started alone, got {num_processes()} processes of torchrun; it "
                "measures one, and fastmae pretrain reports the images/s and MFU of several"
            )
        validate(config)
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder) / "run") as run:
        with usage_errors({"compile_mode": "--train.compile-mode", "cuda_graph": "--train.cuda-graph"}):
            trainer = _trainer(config, run, console)
        train, dataset = trainer.config.train, trainer.dataset
        source = "the embedded photographs" if dataset.embedded else str(dataset.root)
        console.print(
            f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.1f} M weights on {trainer.device} "
            f"({torch.get_num_threads()} threads), {train.precision}, batches of {train.global_batch_size}; "
            f"{len(dataset):,} images of {source}",
            style="dim",
        )
        found = result(trainer, measure(trainer, seconds))
    _print(found, console)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _trainer(config: PretrainConfig, run: RunFolder, console: Console) -> Trainer:
    """A trainer of the configuration, made to be measured."""
    config = config_to_measure(config)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    name, found = config.train.device, torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("--train.device: expected a CUDA device for cuda, but PyTorch finds none")
    device = torch.device("cuda" if name != "cpu" and found else "cpu")
    dataset = data.open_dataset(config.data.path, **config.dataset_arguments())
    if config.model.attention == "xformers":
        _xformers.require(device)

    def make(config: PretrainConfig) -> Trainer:
        model = create_model(**config.model_arguments()).to(device)
        config = settle_precision(config, model.architecture["embed_dim"], device, Ranks()).config
        return Trainer(config, MaskedAutoencoding(config, model, dataset, data.create_loader), run, console=console)

    trainer = make(config)
    if trainer.accumulation == 1:
        return trainer
    # --train.batch-size auto found that less than the global batch fits.
    return make(replace(trainer.config, train=replace(trainer.config.train, global_batch_size=trainer.batch_size)))


def _print(found: dict[str, Any], console: Console) -> None:
    loader, model, both, step = (found[name] for name in ("loader", "model", "both", "step"))
    console.print(f"\n{'':<16}{'images/s':>10}   lowest to highest of {len(loader['rounds'])} rounds")
    cost = f"{loader['cpu_seconds_per_image'] * 1e3:.2f} ms of CPU time per image"
    notes = {"loader": f"   ({loader['kind']}, {loader['threads']} threads, {cost})"}
    for phase in PHASES:
        rate, rounds = found[phase]["images_per_second"], found[phase]["rounds"]
        name = "both together" if phase == "both" else f"{phase} alone"
        console.print(f"{name:<16}{rate:>10,.1f}   {min(rounds):,.1f} to {max(rounds):,.1f}{notes.get(phase, '')}")
    if (masks := found["masks_per_image"]) > 1:
        console.print(f"The loader's are decoded images, each masked {masks} times; the others are masked images.")
    reached = model["peak_flops_per_second"] > model["matmul_flops_per_second"]
    peak = "the most that these steps reached, more than" if reached else "as measured with"
    console.print(
        f"Waiting for batches, both together: {both['data_wait_share']:.1%} of the time\n"
        f"Model FLOPs utilisation: {model['mfu']:.1%} alone, {both['mfu']:.1%} with the loader "
        f"({model['flops_per_second'] / 1e12:.3g} of {model['peak_flops_per_second'] / 1e12:.3g} TFLOP/s, {peak} "
        f"a large matrix product in {found['precision']} between the steps; "
        f"{model['flops_per_image'] / 1e9:.3g} GFLOP per image)\n"
        f"A step of {step['ms']:.1f} ms: "
        + ", ".join(f"{name} {ms:.1f} ms" for name, ms in step["stages_ms"].items())
        + "\n"
    )
    console.print(found["sentence"], style="bold")
    if found["advice"]:
        console.print("Worth trying; this command measures it:")
    for advice in found["advice"]:
        console.print(f"  - {advice}")
