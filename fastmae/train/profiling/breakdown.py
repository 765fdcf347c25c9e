"""Where the time of a training step goes: recorded spans to shares that add up. Pure functions; nothing is measured.

On a CPU every moment of the trainer's thread belongs to the innermost operator that runs then. On a GPU every moment
belongs to the kernels that run then: where several overlap, to those of the training itself, before communication and
copies of images, before what the loader decodes; moments without a kernel are idle, and waiting for images if the host
was. So what is hidden behind computation costs nothing, and is listed beside as hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from fastmae.train.profiling.kinds import (
    BETWEEN,
    COMMUNICATION,
    DECODING,
    IDLE,
    KINDS,
    OTHER,
    WAITING,
    kind_of_kernel,
    kind_of_operators,
)
from fastmae.train.profiling.spans import Span, Timeline, segments

LABELS = {
    "data": "waiting for images", "masking": "masking and embedding", "embedding": "masking and embedding",
    "encoder": "encoder", "decoder": "decoder", "forward": "forward", "backward": "backward",
    "optimizer": "norm and optimiser",
}  # fmt: skip
"""Ranges that the trainer names while it is recorded, and the stages that they are."""

TO_DEVICE, LOSS, REST, DEVICE_IDLE = "images to the device", "loss", "the rest", "idle device"
BACKWARD = {
    LOSS: "loss, backward", "decoder": "decoder, backward", "encoder": "encoder, backward",
    "masking and embedding": "embedding, backward",
}  # fmt: skip
"""Stages of the forward, and those of the backward that belong to them; both are labels, too."""
LABELS |= {stage: stage for stage in BACKWARD.values()}

STAGES = (
    "waiting for images", TO_DEVICE, "masking and embedding", "encoder", "decoder", LOSS, "forward",
    *BACKWARD.values(), "backward", "norm and optimiser", DECODING, REST, DEVICE_IDLE,
)  # fmt: skip
"""In the order in which they are shown; "forward" and "backward" are what of them cannot be told apart: the sums of
gradients, and all of a model that is compiled as a whole."""

_LOSS_OP = "fastmae_masked_patch_mse"


class Kernel(NamedTuple):
    """A kernel, copy or fill on a GPU.

    Attributes:
        launched: when the host launched it, microseconds; None if PyTorch did not (the loader's decoder did).
        operators: names that were open on the launching thread, outermost first.
    """

    name: str
    begin: float
    end: float
    launched: float | None = None
    operators: tuple[str, ...] = ()


class Stretch(NamedTuple):
    """Time that is of one kind and stage. Of those that overlap the lowest ``rank`` counts, equal ones share."""

    begin: float
    end: float
    kind: str
    stage: str
    rank: int = 0


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of one step.

    Attributes:
        steps: that were recorded.
        step_ms: of one, recorded, from the clock.
        stages, kinds: milliseconds by name; each adds up to ``step_ms``.
        hidden: milliseconds of kernels that ran behind others, by kind.
    """

    steps: int
    step_ms: float
    stages: dict[str, float]
    kinds: dict[str, float]
    hidden: dict[str, float]

    @property
    def attributed(self) -> float:
        """Share of the time whose kind is known: all but kernels of names that nobody knows."""
        return 1.0 - self.kinds.get(OTHER, 0.0) / self.step_ms

    def to_json(self) -> dict[str, Any]:
        """Everything, shares included, ready for JSON."""

        def table(values: dict[str, float]) -> dict[str, dict[str, float]]:
            return {name: {"ms": ms, "share": ms / self.step_ms} for name, ms in values.items()}

        return {
            "steps": self.steps,
            "step_ms": self.step_ms,
            "attributed_share": self.attributed,
            "stages": table(self.stages),
            "kinds": table(self.kinds),
            "hidden_ms": self.hidden,
        }

    def lines(self) -> list[str]:
        """A table for people."""
        found = []
        for title, values in (("stage", self.stages), ("kind of work", self.kinds)):
            found.append(f"{title:<24}{'ms a step':>10}{'share':>8}")
            found += [f"  {name:<22}{ms:>10.2f}{ms / self.step_ms:>8.1%}" for name, ms in values.items()]
            found.append(f"  {'together':<22}{sum(values.values()):>10.2f}{sum(values.values()) / self.step_ms:>8.1%}")
        if self.hidden:
            hidden = ", ".join(f"{name} {ms:.2f} ms" for name, ms in self.hidden.items())
            found.append(f"behind other kernels, not counted above: {hidden}")
        found.append(f"{self.attributed:.1%} of the time is of a known kind")
        return found


def break_down_host(spans: Iterable[Span], window: tuple[float, float], steps: int) -> Breakdown:
    """A CPU's steps, from all that its training thread recorded.

    Args:
        spans: operators and labels of that thread.
        window: begin and end of the steps, microseconds.
        steps: in the window.
    """
    work = [Stretch(*window, BETWEEN, REST, rank=1)]
    for begin, end, names in segments(spans):
        stage, kind = stage_of(names) or REST, kind_of_operators([name for name in names if name not in LABELS])
        if kind == BETWEEN and stage == LABELS["data"]:
            kind = WAITING
        work.append(Stretch(begin, end, kind, stage))
    return _summarize(work, window, steps)


def break_down_device(
    kernels: Iterable[Kernel], labels: Timeline, window: tuple[float, float], steps: int
) -> Breakdown:
    """A GPU's steps, from its kernels and the labels of the training thread.

    Args:
        kernels: of all streams.
        labels: of the thread that trains.
        window: from a moment when nothing ran to another, microseconds.
        steps: in the window.
    """
    work = [Stretch(*window, IDLE, DEVICE_IDLE, rank=4)]
    waits = (s for s in labels.segments if stage_of(s.names) == LABELS["data"])
    work += [Stretch(s.begin, s.end, WAITING, LABELS["data"], rank=3) for s in waits]
    work += [_place(kernel, labels) for kernel in kernels]
    return _summarize(work, window, steps)


def stage_of(names: Sequence[str]) -> str | None:
    """The stage of the innermost label among open names; the loss is known by its operator."""
    for name in reversed(names):
        if name in LABELS:
            inside = any(_LOSS_OP in other.replace("::", "_") for other in names) and "backward" not in names
            return LOSS if inside else LABELS[name]
    return None


def _place(kernel: Kernel, labels: Timeline) -> Stretch:
    """A kernel with its kind, the stage that launched it, and its rank."""
    begin, end = kernel.begin, kernel.end
    to_device = kernel.name.startswith("Memcpy HtoD")
    if kernel.launched is None:
        kind = kind_of_kernel(kernel.name) if to_device else DECODING
        return Stretch(begin, end, kind, TO_DEVICE if to_device else DECODING, rank=1 if to_device else 2)
    kind = kind_of_kernel(kernel.name, kernel.operators)
    labelled = labels.at(kernel.launched)
    stage = stage_of((*labelled, *kernel.operators)) or REST
    if to_device and stage in (LABELS["data"], REST):
        return Stretch(begin, end, kind, TO_DEVICE, rank=1)
    return Stretch(begin, end, kind, stage, rank=1 if kind == COMMUNICATION else 0)


def _summarize(work: Sequence[Stretch], window: tuple[float, float], steps: int) -> Breakdown:
    stages, kinds, hidden = _sweep(work, window)
    scale = 1e-3 / steps

    def ordered(values: dict[str, float], order: Sequence[str]) -> dict[str, float]:
        return {name: values[name] * scale for name in order if values.get(name)}

    step_ms = (window[1] - window[0]) * scale
    hideable = {kind: value for kind, value in hidden.items() if kind not in (IDLE, BETWEEN, WAITING)}
    return Breakdown(steps, step_ms, ordered(stages, STAGES), ordered(kinds, KINDS), ordered(hideable, KINDS))


def _sweep(work: Sequence[Stretch], window: tuple[float, float]) -> tuple[dict[str, float], ...]:
    """Microseconds by stage, by kind, and by kind of what ran behind something of a lower rank or as one of several."""
    edges: dict[float, list[tuple[bool, int]]] = defaultdict(list)
    for number, (begin, end, *_) in enumerate(work):
        begin, end = max(begin, window[0]), min(end, window[1])
        if begin < end:
            edges[begin].append((True, number))
            edges[end].append((False, number))
    stages, kinds, hidden = (defaultdict(float) for _ in range(3))
    active: set[int] = set()
    for now, following in pairwise(sorted(edges)):
        for starts, number in edges[now]:
            (active.add if starts else active.discard)(number)
        first = min(work[number].rank for number in active)
        counted = [work[number] for number in active if work[number].rank == first]
        share = (following - now) / len(counted)
        for stretch in counted:
            stages[stretch.stage] += share
            kinds[stretch.kind] += share
            hidden[stretch.kind] += following - now - share
        for number in active:
            if work[number].rank > first:
                hidden[work[number].kind] += following - now
    return stages, kinds, hidden
