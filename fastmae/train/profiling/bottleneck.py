"""From measured rates to words: what limits a run, and what would help. A pure function; it measures nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Bottleneck = Literal["model", "loader", "cores", "host", "balanced"]

_EVEN = 1.1
"""Rates within this factor are called equal."""
_KEPT = 0.9
"""Below this share of the slower one's rate, loader and model get in each other's way."""
_IDLE = 0.75
"""With less than this share of the cores at work, the loader waits for something else than processors."""
_WORTH_SHRINKING = 1.5
_CHEAP = 4
"""A loader so many times faster than the model takes too little of the processor to be worth making cheaper."""
_WORTH_GRAPHS = 0.1
"""Share of a step that a GPU may be idle before launches are worth sparing."""
_MAX_MASKS = 8


@dataclass(frozen=True)
class Facts:
    """What was measured and counted. Rates are images per second.

    Attributes:
        loader_rate: decoded images, the loader alone.
        model_rate, both_rate: masked images, training on resident batches and on the loader's.
        together: ``both_rate`` over the slower one's, compared within rounds.
        masks_per_image: R, masked images that one decoded image serves.
        batch_size: masked images in one forward.
        cores: processors that this process may use.
        loader_busy_cores, both_busy_cores: processors at work while the loader runs alone, and with the model.
        loader_threads: decoding threads.
        on_gpu: whether the model trains on a GPU.
        loader: "dali" or "torch".
        dali: "used", "installed" (but not used), "missing", or "unfit" for these images.
        path: the data set's, as the user wrote it; None for the embedded photographs.
        sharded: whether the images lie in tar shards.
        short_side: what suffices for crops of this size, pixels.
        source_pixels, shrunk_pixels: pixels of an image, on average, as it is and at that short side.
        slow_formats: share of the images that are PNG or WebP, slower to decode than JPEG.
        precision: "bf16", "fp16" or "fp32".
        other_precision, other_speedup: another one that was measured in the same run, or None; the model alone trains
            so many times as many images in it.
        cuda_graphs: whether it does so in CUDA graphs.
        idle_share: share of a step, images being there, in which the GPU has nothing to do.
    """

    loader_rate: float
    model_rate: float
    both_rate: float
    together: float
    masks_per_image: int
    batch_size: int
    cores: int
    loader_busy_cores: float
    both_busy_cores: float
    loader_threads: int
    on_gpu: bool
    loader: str
    dali: Literal["used", "installed", "missing", "unfit"]
    path: str | None
    sharded: bool
    short_side: int
    source_pixels: float
    shrunk_pixels: float
    slow_formats: float
    precision: str
    cuda_graphs: bool = False
    other_precision: str | None = None
    other_speedup: float = 1.0
    idle_share: float = 0.0

    @property
    def loader_capacity(self) -> float:
        """Masked images a second that the loader alone can serve."""
        return self.loader_rate * self.masks_per_image


class Diagnosis(NamedTuple):
    """The answer.

    Attributes:
        bottleneck: "model"; "loader"; "balanced" if they are equally fast; "cores" where both compute on the same
            processors, and "host" where a GPU's model is held up by the loader's work beside it.
        sentence: the same in a sentence.
        advice: what would help, each with the fact behind it.
    """

    bottleneck: Bottleneck
    sentence: str
    advice: tuple[str, ...]


def diagnose(facts: Facts) -> Diagnosis:
    """What limits the run."""
    capacity, model, both = facts.loader_capacity, facts.model_rate, facts.both_rate
    if facts.together < _KEPT and not capacity * _EVEN < model:
        share = f"{facts.together:.0%} of what the slower one makes alone"
        if facts.on_gpu:
            sentence = f"Loader and model get in each other's way: together they make {both:,.0f} images/s, {share}."
            return Diagnosis("host", sentence, _host_advice(facts) + _work_advice(facts, model))
        sentence = (
            f"The processor is the bottleneck: loader and model share {_cores(facts)}, "
            f"and together make {both:,.0f} images/s, {share}."
        )
        return Diagnosis("cores", sentence, _cores_advice(facts) + _model_advice(facts))
    if capacity * _EVEN < model:
        sentence = (
            f"The loader is the bottleneck: it makes {capacity:,.0f} images/s, and the model could train {model:,.0f}."
        )
        return Diagnosis("loader", sentence, _loader_advice(facts, model))
    if capacity < _EVEN * model:
        sentence = f"Loader and model are equally fast: {capacity:,.0f} and {model:,.0f} images/s."
        return Diagnosis("balanced", sentence, _loader_advice(facts, model * _EVEN) + _model_advice(facts))
    sentence = f"The model is the bottleneck: the loader is {capacity / model:.1f} times faster."
    return Diagnosis("model", sentence, _model_advice(facts))


def _cores(facts: Facts) -> str:
    return f"{facts.cores} core" + ("s" if facts.cores != 1 else "")


def _loader_advice(facts: Facts, wanted_rate: float) -> tuple[str, ...]:
    """What would make the loader faster, or need it less; ``wanted_rate`` in masked images a second."""
    return _threads_advice(facts) + _work_advice(facts, wanted_rate)


def _threads_advice(facts: Facts) -> tuple[str, ...]:
    """Where cores are idle while the loader runs."""
    found = []
    if facts.loader_busy_cores < _IDLE * facts.cores and facts.path is not None:
        busy = f"the loader alone keeps {facts.loader_busy_cores:.1f} of {_cores(facts)} at work"
        if facts.loader_threads < facts.cores:
            found.append(f"--data.num-threads {facts.cores}: {busy}, with {facts.loader_threads} threads.")
        elif facts.dali != "used" or not facts.on_gpu:
            shards = "" if facts.sharded else ", or tar shards on a local disk (fastmae data shard)"
            found.append(
                f"--data.num-threads {2 * facts.cores}{shards}: {busy} with a thread for each, so threads wait, "
                "most likely for the file system."
            )
    return tuple(found)


def _work_advice(facts: Facts, wanted_rate: float) -> tuple[str, ...]:
    """What would leave the processor less to do."""
    found = []
    if facts.on_gpu and facts.dali == "missing":
        found.append(
            "pip install 'fastmae[dali-cuda13]': images are decoded on the CPU now, and DALI would on the GPU."
        )
    if facts.on_gpu and facts.dali == "installed":
        found.append("--data.loader dali: images are decoded on the CPU now, and DALI would decode them on the GPU.")
    ratio = facts.source_pixels / facts.shrunk_pixels
    if facts.path is not None and ratio > _WORTH_SHRINKING:
        found.append(
            f"fastmae data shard {facts.path} OUT --short-side {facts.short_side}: images have "
            f"{facts.source_pixels / 1e6:.2f} megapixels on average and would have {facts.shrunk_pixels / 1e6:.2f}, "
            f"{ratio:.1f} times fewer to read and decode."
        )
    if facts.path is not None and facts.slow_formats > 0.5:
        found.append(
            f"fastmae data shard {facts.path} OUT --reencode: {facts.slow_formats:.0%} of the images are PNG or WebP, "
            "and JPEG decodes faster."
        )
    masks = _balancing_masks(facts, wanted_rate)
    if masks is not None:
        found.append(
            f"--train.masks-per-image {masks}: the loader would serve {facts.loader_rate * masks:,.0f} images/s. An "
            "image's masks share its crop, so that a run of as many steps sees fewer crops."
        )
    return tuple(found)


def _balancing_masks(facts: Facts, wanted_rate: float) -> int | None:
    """The smallest number of masks an image that makes the loader fast enough, else the largest that is sensible."""
    allowed = [r for r in range(facts.masks_per_image + 1, _MAX_MASKS + 1) if facts.batch_size % r == 0]
    enough = [r for r in allowed if r >= math.ceil(wanted_rate / facts.loader_rate - 1e-9)]
    return (enough[:1] or allowed[-1:] or [None])[0]


def _model_advice(facts: Facts) -> tuple[str, ...]:
    found = []
    if facts.other_precision is not None and facts.other_speedup > _EVEN:
        found.append(
            f"--train.precision {facts.other_precision}: measured in this run, the model alone trains "
            f"{facts.other_speedup:.1f} times as many images/s as in {facts.precision}."
        )
    if facts.on_gpu and facts.idle_share > _WORTH_GRAPHS and not facts.cuda_graphs:
        found.append(
            f"--train.cuda-graph: the GPU is idle for {facts.idle_share:.0%} of a step, waiting for the host to queue "
            "work."
        )
    return tuple(found)


def _cores_advice(facts: Facts) -> tuple[str, ...]:
    found = []
    if facts.both_busy_cores < _IDLE * facts.cores:
        found.append(
            f"--train.num-threads, --data.num-threads: together they keep {facts.both_busy_cores:.1f} of "
            f"{_cores(facts)} at work; either their threads are too few, or other processes are busy here."
        )
    if facts.loader_capacity < _CHEAP * facts.model_rate:
        found += _work_advice(facts, 2 * facts.loader_capacity)
    return tuple(found)


def _host_advice(facts: Facts) -> tuple[str, ...]:
    fewer = max(1, facts.loader_threads // 2)
    return (f"--data.num-threads {fewer}: fewer threads beside the one that queues the GPU's work.",)
