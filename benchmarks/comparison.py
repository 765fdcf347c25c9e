"""Competitors for one job, measured in turn: every round runs each of them once, so that a busy moment hits all alike.

Medians are taken over rounds, and ratios between competitors within each round before their median is taken.
pytest-benchmark gets the measured times through :class:`Replay`, for its statistics, tables and files.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from measure import Meter
from torch import Tensor


class Unavailable(str):
    """Stands in a competitor's place and says why it cannot run here."""


@dataclass(frozen=True)
class Prepared:
    """A call that needs something made before it, untimed: ``call(prepare())``."""

    prepare: Callable[[], object]
    call: Callable[[object], object]


Competitor = Callable[[], object] | Prepared


def gradient(
    function: Callable[[], Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], bias_of: Tensor | None = None
) -> Prepared:
    """The backward alone: gradients of ``inputs``, for gradients of the results that are ones or random numbers.

    Args:
        function: the forward, untimed.
        inputs: what the gradients are taken of.
        bias_of: one of the inputs, which a bias was added to where it was made: its gradient's column sum, that bias's
            gradient, belongs to the job.
    """

    grads: list[Tensor] = []

    def results() -> tuple[Tensor, ...]:
        out = function()
        out = out if isinstance(out, tuple) else (out,)
        if not grads:  # not before: a competitor that is not run is not to be compiled
            grads.extend(torch.ones_like(o) if o.ndim == 0 else torch.randn_like(o) for o in out)
        return out

    def backward(made: object) -> object:
        found = torch.autograd.grad(made, inputs, grads)
        if bias_of is None:
            return found
        (of,) = (g for tensor, g in zip(inputs, found, strict=True) if tensor is bias_of)
        return *found, of.sum(tuple(range(of.ndim - 1)))

    return Prepared(results, backward)


def later(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A call whose parts are made when it is first called: those that are not selected cost nothing."""
    made: list[Callable[[], object]] = []

    def call() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return call


def compiled(function: Callable) -> Callable:
    """Compiled for the shapes that it is called with; sizes left open would be a handicap."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def arm(competitor: Competitor) -> Callable[[], object]:
    """A call to time, all that it needs made."""
    if not isinstance(competitor, Prepared):
        return competitor
    made = competitor.prepare()
    return lambda: competitor.call(made)


@dataclass
class Comparison:
    """One job and those who do it.

    Attributes:
        group: the name of the job, for tables.
        competitors: callables without arguments, :class:`Prepared` or :class:`Unavailable`.
        useful_bytes: bytes that the job has to move, whoever does it.
        sector_bytes: bytes of the 32-byte sectors that they lie in; None if the same.
        flops: floating-point operations of the job.
        dtype: of the matrix products, for tables and for comparison with a large one; None where there are none.
        images: images a call, where they are the measure.
        resident_bytes: what a competitor holds between calls (weights, optimiser state), added to its peak memory.
        unseen_memory: competitors whose memory is a CUDA graph's, which the allocator does not count.
        calls: calls in a row that are timed as one.
        flush: whether the device's cache is emptied before.
        hides_host: whether a call's kernels are all queued before the first starts. Not for whole steps, whose Python
            is part of them.
        seconds: time for all rounds together, where --rounds does not say how many.
        facts: more to report about a competitor, from its name and the number of rounds.
    """

    group: str
    competitors: Mapping[str, Competitor | Unavailable]
    useful_bytes: int | None = None
    sector_bytes: int | None = None
    flops: int | None = None
    dtype: torch.dtype | None = None
    images: int | None = None
    resident_bytes: Mapping[str, int] = field(default_factory=dict)
    unseen_memory: Collection[str] = ()
    calls: int = 1
    flush: bool = True
    hides_host: bool = True
    seconds: float = 1.0
    facts: Callable[[str, int], dict] | None = None


@dataclass
class Results:
    """Times of every competitor, round by round, and the errors of those that failed."""

    times: dict[str, list[float]]
    errors: dict[str, str]
    info: dict[str, dict]


def compare(
    comparison: Comparison,
    names: list[str],
    meter: Meter,
    rounds: int | None = None,
    announce: Callable[[int, float], None] = lambda rounds, seconds: None,
    report: Callable[[str, float | str], None] = lambda name, found: None,
) -> Results:
    """Warm up, then run the named competitors round by round, from 5 to 200 rounds unless ``rounds`` is given.

    ``announce`` gets the number of rounds and their expected seconds before the first of them, ``report`` the name of a
    competitor and its seconds at each measurement, or its error, as soon as they are known.
    """
    errors: dict[str, str] = {}
    once: dict[str, float] = {}
    queued: dict[str, float] = {}
    covered: dict[str, list[bool]] = {}

    def measure(name: str) -> float:
        cover = queued[name] if comparison.hides_host else None
        seconds = meter.time(arm(comparison.competitors[name]), comparison.calls, comparison.flush, cover)
        covered.setdefault(name, []).append(meter.covered)
        report(name, seconds)
        return seconds

    for name in names:
        try:
            for _ in range(2 if meter.is_cuda else 0):
                arm(comparison.competitors[name])()
            queued[name] = meter.queue_seconds(arm(comparison.competitors[name]))
            once[name] = measure(name)
        except Exception as error:  # one that fails must not take the others with it; its own test raises this
            # As text: the traceback itself would hold on to the memory of what failed.
            errors[name] = "".join(traceback.format_exception(error))
            report(name, errors[name])
    names = list(once)
    if rounds is None:
        rounds = int(max(5, min(200, comparison.seconds / (sum(once.values()) * comparison.calls + 1e-4))))
    announce(rounds, rounds * sum(once.values()) * comparison.calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        # Nobody always runs behind the same one.
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            times[name].append(measure(name))
    results = Results(times, errors, {name: _describe(comparison, name, times, meter) for name in names})
    for name in names if meter.is_cuda else ():
        results.info[name] |= {
            "queue_seconds": queued[name],
            "hidden_share": sum(covered[name]) / len(covered[name]) if comparison.hides_host else None,
        }
    return results


def _describe(comparison: Comparison, name: str, times: dict[str, list[float]], meter: Meter) -> dict:
    competitor, seconds = comparison.competitors[name], statistics.median(times[name])
    info: dict = {"competitor": name}
    info["ratios"] = {
        other: round(statistics.median(a / b for a, b in zip(times[name], theirs, strict=True)), 4)
        for other, theirs in times.items()
        if other != name
    }
    if comparison.useful_bytes:
        sectors = comparison.sector_bytes or comparison.useful_bytes
        copy = meter.copy_seconds(comparison.useful_bytes)
        info |= {
            "useful_bytes": comparison.useful_bytes,
            "sector_bytes": sectors,
            "gb_per_s": comparison.useful_bytes / seconds / 1e9,
            "copy_gb_per_s": comparison.useful_bytes / copy / 1e9,
            "share_of_copy": copy / seconds,
            "share_of_copy_by_sectors": meter.copy_seconds(sectors) / seconds,
        }
    if comparison.dtype:
        info["dtype"] = name_of(comparison.dtype)
    if comparison.flops:
        best = meter.matmul_flops(comparison.dtype)
        info |= {
            "flops": comparison.flops,
            "tflop_per_s": comparison.flops / seconds / 1e12,
            "matmul_tflop_per_s": best / 1e12,
            "share_of_matmul": comparison.flops / seconds / best,
        }
    if comparison.images:
        info["images_per_s"] = comparison.images / seconds
    if comparison.facts:
        info |= comparison.facts(name, len(times[name]))
    if meter.is_cuda:
        if name not in comparison.unseen_memory:
            info["peak_memory_bytes"] = meter.peak_memory(arm(competitor)) + comparison.resident_bytes.get(name, 0)
        info["launches"] = meter.launches(arm(competitor))
    return info


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(comparison: Comparison, results: Results) -> list[str]:
    """Lines for the terminal: every competitor's median, and how many times its time fastmae and the baselines take."""
    against = [name for name in results.times if name.startswith(("fastmae", "facebookresearch-sdpa", "plain", "sdpa"))]
    title = f"{comparison.group}, {name_of(comparison.dtype)}" if comparison.dtype else comparison.group
    lines = [title, f"{'time, and time / time of':<36}{'median':>12}  " + "  ".join(against)]
    for name, times in results.times.items():
        ratios = (({name: 1.0} | results.info[name]["ratios"])[other] for other in against)
        cells = "  ".join(f"{ratio:>{len(other)}.2f}" for ratio, other in zip(ratios, against, strict=True))
        lines.append(f"{name:<36}{statistics.median(times) * 1e3:>9.3f} ms  {cells}")
        if "losses" in (info := results.info[name]):
            lines[-1] += f"  loss {info['losses'][0]:.4f}, after {info['steps']} steps {info['losses'][1]:.4f}"
    return lines


class Replay:
    """A clock that plays measured times back: pytest-benchmark reads it before and after each round."""

    def __init__(self) -> None:
        self._readings = iter(())

    def load(self, seconds: list[float]) -> None:
        self._readings = iter([reading for s in seconds for reading in (0.0, s)])

    def __call__(self) -> float:
        return next(self._readings)
