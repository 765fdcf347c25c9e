"""``fastmae bench``: images per second of the loader, of the model and of both, and what limits them."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastmae import data
from fastmae.cli.errors import mistakes
from fastmae.data import Dataset
from fastmae.data.header import Format
from fastmae.model import create_model
from fastmae.ops import _xformers
from fastmae.train.checkpoint import Ranks
from fastmae.train.compilation import uses_cuda_graphs
from fastmae.train.config import PretrainConfig, to_json
from fastmae.train.flops import count_flops
from fastmae.train.loop import Trainer
from fastmae.train.parallel import DTYPES, num_processes
from fastmae.train.precision import settle_precision
from fastmae.train.profiling import throughput
from fastmae.train.profiling.bottleneck import Diagnosis, Facts, diagnose
from fastmae.train.profiling.breakdown import Breakdown
from fastmae.train.profiling.throughput import PHASES, Throughput
from fastmae.train.rules import validate
from fastmae.train.run_folder import RunFolder

_SAMPLED = 4096
_SHORT_SIDE_SHARE = 8 / 7
"""Short side of a data set over the crop's side: 256 for 224, as everybody stores ImageNet."""
_NAMES = {"loader": "loader alone", "model": "model alone", "both": "both together"}


def bench(config: PretrainConfig, seconds: float, json_file: Path | None) -> int:
    """Measure, print, write the file; return the exit code."""
    with mistakes():
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
        with mistakes({"compile_mode": "--train.compile-mode", "cuda_graph": "--train.cuda-graph"}):
            trainer = _trainer(config, run, console)
        console.print(_setting(trainer), style="dim")
        found = throughput.measure(trainer, seconds)
        result = _result(trainer, found, config)
    _print(result, found.breakdown, console)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _trainer(config: PretrainConfig, run: RunFolder, console: Console) -> Trainer:
    """A trainer of the configuration, made to be measured."""
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    name = config.train.device
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--train.device: expected a CUDA device for cuda, but PyTorch finds none")
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    dataset = data.open_dataset(config.data.path, **config.dataset_arguments())
    if config.model.attention == "xformers":
        _xformers.require(device)

    def make(config: PretrainConfig) -> Trainer:
        model = create_model(**config.model_arguments()).to(device)
        config = settle_precision(config, model.architecture["embed_dim"], device, Ranks()).config
        return Trainer(config, model, dataset, run, create_loader=data.create_loader, console=console)

    trainer = make(throughput.config_to_measure(config))
    if trainer.accumulation > 1:  # --train.batch-size auto found that less than the global batch fits
        train = replace(trainer.config.train, global_batch_size=trainer.batch_size)
        trainer = make(replace(trainer.config, train=train))
    return trainer


def _setting(trainer: Trainer) -> str:
    train, dataset = trainer.config.train, trainer.dataset
    weights = sum(p.numel() for p in trainer.model.parameters())
    source = "the embedded photographs" if dataset.embedded else str(dataset.root)
    return (
        f"{weights / 1e6:.1f} M weights on {trainer.device} ({torch.get_num_threads()} threads), {train.precision}, "
        f"batches of {train.global_batch_size}; {len(dataset):,} images of {source}"
    )


def _result(trainer: Trainer, found: Throughput, config: PretrainConfig) -> dict[str, Any]:
    """Everything that was found, ready for JSON."""
    facts = _facts(trainer, found)
    diagnosis: Diagnosis = diagnose(facts)
    flops = count_flops(trainer.model.architecture, found.masked, trainer.config.model.mask_ratio) / found.masked
    product = statistics.median(found.matmul_flops)
    # Steps faster than the product raise the peak: a CPU that emulates bf16 has no fast products.
    best = max(product, flops * found.rate("model"), flops * found.rate("both"))
    rates = {phase: {"images_per_second": found.rate(phase), "rounds": found.rates(phase)} for phase in PHASES}
    return {
        "setting": _setting(trainer),
        "device": torch.cuda.get_device_name(trainer.device) if facts.on_gpu else "cpu",
        "torch": torch.__version__,
        "loader": {**rates["loader"], "kind": found.kind, "threads": found.threads,
                   "cpu_seconds_per_image": float(np.median(found.loader_cpu_seconds)),
                   "busy_cores": facts.loader_busy_cores},
        "model": {**rates["model"], "flops_per_image": flops, "flops_per_second": found.rate("model") * flops,
                  "precision": facts.precision, "matmul_flops_per_second": product, "peak_flops_per_second": best,
                  "mfu": found.rate("model") * flops / best},
        "both": {**rates["both"], "data_wait_share": found.wait_share(), "busy_cores": found.busy_cores("both"),
                 "mfu": found.rate("both") * flops / best},
        "step": {"ms": found.step_ms(), "recorded": found.breakdown.to_json()},
        "masks_per_image": facts.masks_per_image,
        "cores": facts.cores,
        "images": {"mean_pixels": facts.source_pixels, "short_side": facts.short_side,
                   "mean_pixels_at_short_side": facts.shrunk_pixels},
        "bottleneck": diagnosis.bottleneck,
        "sentence": diagnosis.sentence,
        "advice": list(diagnosis.advice),
        "config": to_json(config),
    }  # fmt: skip


def _facts(trainer: Trainer, found: Throughput) -> Facts:
    train, config, dataset = trainer.config.train, trainer.config, trainer.dataset
    short_side = round(max(config.img_size) * _SHORT_SIDE_SHARE)
    source, shrunk, slow = _sizes(dataset, short_side)
    return Facts(
        loader_rate=found.rate("loader"),
        model_rate=found.rate("model"),
        both_rate=found.rate("both"),
        together=found.together(),
        masks_per_image=train.masks_per_image,
        batch_size=found.masked,
        cores=found.cores,
        loader_busy_cores=found.busy_cores("loader"),
        both_busy_cores=found.busy_cores("both"),
        loader_threads=found.threads,
        on_gpu=trainer.device.type == "cuda",
        loader=found.kind,
        dali=_dali(dataset, found.kind),
        path=None if dataset.embedded else str(config.data.path),
        sharded=bool(dataset.index.shards),
        short_side=short_side,
        source_pixels=source,
        shrunk_pixels=shrunk,
        slow_formats=slow,
        precision=next(name for name, dtype in DTYPES.items() if dtype == trainer.dtype),
        cuda_graphs=train.cuda_graph or (train.compile != "none" and uses_cuda_graphs(train.compile_mode)),
        other_precision=found.other_precision,
        other_speedup=found.other_speedup() if found.other_precision else 1.0,
        idle_share=found.idle_share(),
    )


def _dali(dataset: Dataset, kind: str) -> str:
    if kind == "dali":
        return "used"
    if dataset.embedded or not dataset.formats <= {Format.JPEG, Format.PNG, Format.WEBP} or dataset.channels != 3:
        return "unfit"
    return "installed" if data.has_dali() else "missing"


def _sizes(dataset: Dataset, short_side: int) -> tuple[float, float, float]:
    """Of an evenly spread sample: mean pixels, mean pixels at a short side, and the share of PNG and WebP."""
    ids = np.unique(np.linspace(0, len(dataset) - 1, _SAMPLED).astype(np.int64))
    rows = dataset.rows(ids)
    rows = rows[rows["bad"] == 0]
    if not len(rows):  # a few thousand bad ones among very many
        return 1.0, 1.0, 0.0
    pixels = rows["height"].astype(float) * rows["width"]
    scale = np.minimum(1.0, short_side / np.minimum(rows["height"], rows["width"]))
    slow = np.isin(rows["format"], [Format.PNG, Format.WEBP]).mean()
    return float(pixels.mean()), float((pixels * scale**2).mean()), float(slow)


def _print(result: dict[str, Any], breakdown: Breakdown, console: Console) -> None:
    console.print(f"\n{'':<16}{'images/s':>10}   lowest to highest of {len(result['loader']['rounds'])} rounds")
    for phase in PHASES:
        rounds = result[phase]["rounds"]
        line = f"{_NAMES[phase]:<16}{result[phase]['images_per_second']:>10,.1f}"
        line += f"   {min(rounds):,.1f} to {max(rounds):,.1f}"
        if phase == "loader":
            loader = result["loader"]
            threads = f"{loader['threads']} thread" + ("s" if loader["threads"] > 1 else "")
            line += f"   ({loader['kind']}, {threads}, "
            line += f"{loader['cpu_seconds_per_image'] * 1e3:.2f} ms of processor time an image)"
        console.print(line)
    if result["masks_per_image"] > 1:
        masks = result["masks_per_image"]
        console.print(f"The loader's are decoded images, each masked {masks} times; the others are masked images.")
    model, both = result["model"], result["both"]
    console.print(
        f"Waiting for batches, both together: {both['data_wait_share']:.1%} of the time\n"
        f"Model FLOPs utilisation: {model['mfu']:.1%} alone, {both['mfu']:.1%} with the loader "
        f"({model['flops_per_second'] / 1e12:.3g} of {model['peak_flops_per_second'] / 1e12:.3g} TFLOP/s, "
        f"{_peak(result)}; {model['flops_per_image'] / 1e9:.3g} GFLOP per image)\n"
    )
    step = result["step"]
    console.print(
        f"Where a step goes, loader and model together: {step['recorded']['steps']} steps of "
        f"{step['recorded']['step_ms']:.1f} ms each while a profiler recorded them ({step['ms']:.1f} ms without one)"
    )
    console.print("\n".join(breakdown.lines()) + "\n")
    console.print(result["sentence"], style="bold")
    if result["advice"]:
        console.print("Worth trying; this command measures it:")
    for advice in result["advice"]:
        console.print(f"  - {advice}")


def _peak(result: dict[str, Any]) -> str:
    """Where the peak comes from."""
    model, precision = result["model"], result["model"]["precision"]
    if model["peak_flops_per_second"] == model["matmul_flops_per_second"]:
        return f"what a large matrix product in {precision} reaches, timed between the steps"
    return (
        f"the most that these steps reached: a large matrix product in {precision}, timed between them, is slower "
        f"({model['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s)"
    )
