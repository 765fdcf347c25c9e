"""``fastmae bench``: how fast the loader is alone, the model alone, and both together, and what limits them.

The trainer's own step runs on the loader's own batches. The three are measured in turn, round by round, so that a busy
moment hits all alike. Before each turn the loader's queue is full and nobody works; batches that were ready already are
not counted. On a GPU the host waits at the ends of a turn and nowhere in between. Each round also times a large matrix
product in the run's precision, the peak that MFU is a fraction of, at the same moment and with the same threads. Advice
is given only where its fact was measured.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastmae import data
from fastmae.data import Dataset
from fastmae.data.formats import Format
from fastmae.errors import usage_errors
from fastmae.model import create_model
from fastmae.ops import _xformers
from fastmae.pretraining import FLAGS, cpu_threads
from fastmae.train.autotune import settle_precision
from fastmae.train.config import PretrainConfig, to_json
from fastmae.train.flops import matmul_flops
from fastmae.train.launcher import place
from fastmae.train.parallel import initialize
from fastmae.train.profile import StageTimes
from fastmae.train.ranks import Ranks
from fastmae.train.rules import validate
from fastmae.train.run_folder import RunFolder
from fastmae.train.task import MaskedAutoencoding
from fastmae.train.trainer import Trainer

PHASES = ("loader", "model", "both")
_ROUNDS, _MIN_ROUNDS = 5, 2
_READY_BEYOND_PREFETCH = 4
"""Batches that a loader may have ready beside its queue: DALI's own, one in the making, one on its way to the GPU."""
_PRODUCT = 0.05  # seconds of a matrix product on a CPU that are enough for a peak
_EVEN, _KEPT = 1.1, 0.9
"""Rates within this factor are called equal; below this fraction of the slower one's rate, loader and model get in each
other's way."""
_IDLE_CORES = 0.75  # with less of the cores at work, the loader waits for something else than processors
_SAMPLED = 4096  # images whose sizes are looked at


def bench(config: PretrainConfig, seconds: float, json_file: Path | None) -> int:
    """Measure, print, write the file; return the exit code."""
    with usage_errors():
        if not (seconds > 0 and math.isfinite(seconds)):
            raise ValueError(f"--seconds: expected a positive number, got {seconds}")
        if (processes := place()[1]) > 1:
            raise ValueError(
                f"fastmae bench: expected to be started alone, got {processes} processes of torchrun; it measures one, "
                "and fastmae pretrain reports the images/s and MFU of several"
            )
        validate(config)
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
    console, threads = Console(highlight=False, markup=False, soft_wrap=True), cpu_threads(config.train.num_threads)
    with threads, tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder) / "run") as run:
        with usage_errors(FLAGS):
            trainer = create_trainer(config, run, console)
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


# ---- measuring -------------------------------------------------------------------------------------------------------


def config_to_measure(config: PretrainConfig) -> PretrainConfig:
    """The configuration with one optimiser step for each batch, without an end, and all images of the last size."""
    batch_size = config.train.batch_size
    train = replace(
        config.train,
        global_batch_size=batch_size if isinstance(batch_size, int) else config.train.global_batch_size,
        epochs=None,
        steps=1 << 40,
        warmup_epochs=None,
        warmup_steps=(1 << 40) - 1,  # the learning rate stays near zero, so that nothing diverges on repeated batches
        max_minutes=None,
        fit_steps=False,
    )
    return replace(config, train=train, data=replace(config.data, progressive_sizes=()))


def create_trainer(config: PretrainConfig, run: RunFolder, console: Console) -> Trainer:
    """A trainer of the configuration, made to be measured."""
    config = config_to_measure(config)
    device = initialize("none", config.train.device).device
    dataset = data.open_dataset(
        config.data.path, index=config.data.index, window=config.data.window, **config.dataset_arguments()
    )
    if config.model.attention == "xformers":
        _xformers.require(device)

    def make(config: PretrainConfig) -> Trainer:
        model = create_model(**config.model_arguments()).to(device)
        config, *texts = settle_precision(config, model.architecture["embed_dim"], device, Ranks())
        for text in filter(None, texts):
            console.print(text)
        return Trainer(config, MaskedAutoencoding(config, model, dataset, data.create_loader), run, console=console)

    trainer = make(config)
    if trainer.accumulation == 1:
        return trainer
    # --train.batch-size auto found that less than the global batch fits.
    return make(replace(trainer.config, train=replace(trainer.config.train, global_batch_size=trainer.batch_size)))


@dataclass
class Measured:
    """What was measured.

    Attributes:
        decoded, masked: images in a batch, as the loader and as the model counts them.
        rounds: by name, a value per round: images per second of each phase, decoded ones for the "loader", masked ones
            for "model" and "both"; "wait": share of the time that the trainer waits for a batch, loader and model
            together; "cpu_seconds": of all processors per decoded image, the loader alone; "matmul_flops": FLOP/s of a
            large matrix product.
        stages: seconds per step of each stage, loader and model together, in the last round.
    """

    decoded: int
    masked: int
    rounds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    stages: dict[str, float] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return median(self.rounds[name])

    @property
    def busy_cores(self) -> float:
        """Processors at work in the loader alone."""
        return self.median("cpu_seconds") * self.median("loader")

    def together(self) -> float:
        """Rate of both together over that of the slower one alone, the median within rounds."""
        masks = self.masked / self.decoded
        rounds = zip(*(self.rounds[phase] for phase in PHASES), strict=True)
        return median(both / min(loader * masks, model) for loader, model, both in rounds)


def measure(trainer: Trainer, seconds: float) -> Measured:
    """Measure for about so many seconds, with at least two rounds however long these take.

    The trainer is one of :func:`config_to_measure`; its weights are trained on.
    """
    with trainer.loader_at(trainer.samples) as loader:
        trainer.model.train()
        bench = _Bench(trainer, loader)
        one = {phase: bench.warm_up(phase) for phase in PHASES}
        rounds = int(max(_MIN_ROUNDS, min(_ROUNDS, seconds / max(sum(one.values()), 1e-6))))
        for number in range(rounds):
            first = number % len(PHASES)
            for phase in PHASES[first:] + PHASES[:first]:
                bench.take_turn(phase, seconds / (rounds * len(PHASES)) / one[phase])
        trainer.loader = loader
        return bench.found


class _Bench:
    def __init__(self, trainer: Trainer, loader: Any) -> None:
        self.trainer, self.loader, self.device = trainer, loader, trainer.device
        train = trainer.config.train
        self.found = Measured(train.global_batch_size // train.masks_per_image, train.global_batch_size)
        self.ready = loader.options.prefetch + _READY_BEYOND_PREFETCH
        self.batch = next(loader)

    def warm_up(self, phase: str) -> float:
        """Run a phase until it is warm; return about how long one batch takes."""
        self._train(phase, 2 if phase == "model" else 1)
        # A few of the loader's batches were ready; enough others make up for that.
        count = 3 * self.loader.options.prefetch if phase == "loader" else 1
        return max(self._train(phase, count) / count, 1e-5)

    def take_turn(self, phase: str, share: float) -> None:
        """Measure a phase for about as long as ``share`` batches take."""
        found, rounds = self.found, self.found.rounds
        # Slow steps leave the loader all the time it needs to be ahead; what is ready would only cost time.
        ahead = 0 if phase == "model" else max(1, min(self.ready, int(0.4 * share)))
        batches = max(1, math.ceil(0.8 * share) - ahead)
        settle(self.device)
        cpu_begun = time.process_time()
        self._train(phase, ahead)
        self.trainer.stage = stages = StageTimes(self.device)
        seconds = self._train(phase, batches)
        self.trainer.stage = self.trainer.reporter.stages
        rounds[phase].append(batches * (found.decoded if phase == "loader" else found.masked) / seconds)
        if phase == "loader":
            settle(self.device)  # from a full queue to a full queue as many images are made as are taken
            rounds["cpu_seconds"].append((time.process_time() - cpu_begun) / ((ahead + batches) * found.decoded))
        elif phase == "model":
            rounds["matmul_flops"].append(matmul_flops(self.device, self.trainer.dtype, longest=_PRODUCT))
        else:
            found.stages = {name: sum(times) / batches for name, times in stages.take().items()}
            rounds["wait"].append(min(1.0, found.stages["data"] * batches / seconds))

    def _train(self, phase: str, count: int) -> float:
        """Take batches from the loader, or train on them, or on one resident batch again and again; wait for the
        device; return the seconds."""
        self.trainer.loader = repeat(self.batch) if phase == "model" else self.loader
        begun = time.perf_counter()
        for _ in range(count):
            if phase == "loader":
                next(self.loader)
            else:
                self.trainer.train_step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - begun
        self.trainer.reporter.values.take()
        return seconds


def settle(device: torch.device) -> None:
    """Wait until the device and this process's threads do nothing: the loader's queue is full then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    deadline, quiet = time.monotonic() + 2, 0
    while quiet < 2 and time.monotonic() < deadline:
        before = time.process_time()
        time.sleep(0.02)
        quiet = quiet + 1 if time.process_time() - before < 0.002 else 0


# ---- what it means ---------------------------------------------------------------------------------------------------


def result(trainer: Trainer, found: Measured) -> dict[str, Any]:
    """Everything that was found, with what limits the run and what would help, ready for JSON."""
    train, loader, options = trainer.config.train, trainer.loader, trainer.loader.options
    on_gpu, flops = trainer.device.type == "cuda", trainer.task.flops(found.masked) / found.masked
    rates = {phase: {"images_per_second": found.median(phase), "rounds": found.rounds[phase]} for phase in PHASES}
    product, model, both = (found.median(name) for name in ("matmul_flops", "model", "both"))
    peak = max(product, flops * model, flops * both)  # a CPU that emulates bf16 has no fast products
    limit, sentence = diagnose(found, on_gpu, options.cores)
    advice = []
    if limit != "model" and not trainer.dataset.embedded:
        advice = data_advice(trainer.config, trainer.dataset, loader, found, on_gpu)
    return {
        "device": torch.cuda.get_device_name(trainer.device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "precision": train.precision,
        "loader": {**rates["loader"], "kind": loader.kind, "threads": options.num_threads,
                   "cpu_seconds_per_image": found.median("cpu_seconds"), "busy_cores": found.busy_cores},
        "model": {**rates["model"], "flops_per_image": flops, "flops_per_second": model * flops,
                  "matmul_flops_per_second": product, "peak_flops_per_second": peak, "mfu": model * flops / peak},
        "both": {**rates["both"], "data_wait_share": found.median("wait"), "mfu": both * flops / peak},
        "step": {"ms": 1e3 * found.masked / both, "stages_ms": {name: 1e3 * s for name, s in found.stages.items()}},
        "masks_per_image": train.masks_per_image,
        "cores": options.cores,
        "bottleneck": limit,
        "sentence": sentence,
        "advice": advice,
        "config": to_json(trainer.config),
    }  # fmt: skip


def diagnose(found: Measured, on_gpu: bool, cores: int) -> tuple[str, str]:
    """What limits the run ("loader", "model", "balanced", or "shared" where they hold each other up), in a sentence."""
    capacity = found.median("loader") * found.masked / found.decoded
    model, both = found.median("model"), found.median("both")
    if capacity * _EVEN < model:
        text = f"it makes {capacity:,.0f} images/s, the model could train {model:,.0f}"
        return "loader", f"The loader is the bottleneck: {text}."
    if found.together() < _KEPT:
        where = "the host's processors" if on_gpu else f"{cores} core{'s' * (cores > 1)}"
        return "shared", (
            f"Loader and model share {where} and hold each other up: together they make {both:,.0f} images/s, "
            f"{found.together():.0%} of what the slower one makes alone."
        )
    if capacity < _EVEN * model:
        return "balanced", f"Loader and model are equally fast: {capacity:,.0f} and {model:,.0f} images/s."
    return "model", f"The model is the bottleneck: the loader is {capacity / model:.1f} times faster."


def data_advice(config: PretrainConfig, dataset: Dataset, loader: Any, found: Measured, on_gpu: bool) -> list[str]:
    """What would make the loader faster, each with the measured or counted fact behind it."""
    advice, busy, options = [], found.busy_cores, loader.options
    if busy < _IDLE_CORES * options.cores:
        threads = options.cores if options.num_threads < options.cores else 2 * options.cores
        text = f"the loader alone keeps {busy:.1f} of {options.cores} cores busy with {options.num_threads} threads."
        advice.append(f"--data.num-threads {threads}: {text}")
    decodable = dataset.formats <= {Format.JPEG, Format.PNG, Format.WEBP} and dataset.channels == 3
    if on_gpu and loader.kind != "dali" and decodable:
        install = "" if data.has_dali() else "pip install 'fastmae[dali-cuda13]', "
        advice.append(f"{install}--data.loader dali: images are decoded on the CPU now, DALI decodes them on the GPU.")
    short_side = round(max(config.img_size) * 8 / 7)  # 256 for 224, as ImageNet is usually stored
    sample = dataset.rows(np.unique(np.linspace(0, len(dataset) - 1, _SAMPLED).astype(np.int64)))
    height, width = (sample[sample["bad"] == 0][side].astype(float) for side in ("height", "width"))
    scale = np.minimum(1.0, short_side / np.minimum(height, width))
    pixels, shrunk = np.mean(height * width), np.mean(height * width * scale**2)
    if pixels > 1.5 * shrunk:
        advice.append(
            f"fastmae data shard {config.data.path} OUT --short-side {short_side}: images have {pixels / 1e6:.2f} "
            f"megapixels on average and would have {shrunk / 1e6:.2f}, {pixels / shrunk:.1f} times fewer to decode."
        )
    return advice


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
