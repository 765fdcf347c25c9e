"""Benchmarks: calls that do the same job, timed in turn.

Every round runs each call once, so that a busy moment hits all alike. Times are medians over rounds; ratios are taken
within each round, then their median.

On CUDA a call is timed by events on its stream, after a buffer larger than the level 2 cache is overwritten. The device
first spins until the host has queued all of the call's kernels: neither launch latency nor Python is measured, as
neither counts in a training step that the device limits. On the CPU a call is timed by the clock, with warm caches.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from results import entry
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastmae
from fastmae.environment import cpu_model

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "torchvision", "triton", "transformers", "timm", "xformers", "apex", "pillow", "nvidia-dali-cuda120",
    "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13", "webdataset",
)  # fmt: skip


class Unavailable(str):
    """Takes the place of a call that cannot run here, and says why."""


class Setup(NamedTuple):
    """A call with an untimed part before it: ``call(setup())``."""

    setup: Callable[[], object]
    call: Callable[[object], object]


Call = Callable[[], object] | Setup


def ready(call: Call) -> Callable[[], object]:
    """What is timed; the untimed part is done."""
    if not isinstance(call, Setup):
        return call
    made = call.setup()
    return lambda: call.call(made)


def lazily(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A call that is made when it is first called: one that is not selected costs nothing."""
    make_once = cache(make)
    return lambda: make_once()()


def gradient(
    function: Callable[[], Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    bias: tuple[Tensor, Tensor] | None = None,
) -> Setup:
    """The backward alone, for random output gradients.

    Args:
        function: the forward, untimed.
        inputs: whose gradients to compute; a function need not use all of them.
        bias: two of the inputs, a tensor and the bias that was added where it was made. A function that takes the sum
            has no gradient of the bias: then the column sums of the tensor's gradient, which are it, belong to the job.
    """
    grads: list[Tensor] = []

    def forward() -> tuple[Tensor, ...]:
        out = function()
        out = out if isinstance(out, tuple) else (out,)
        grads.extend(torch.randn_like(o) for o in out[len(grads) :])  # once
        return out

    def backward(out: object) -> object:
        found = torch.autograd.grad(out, inputs, grads, allow_unused=True)
        if bias is None:
            return found
        of_tensor, of_bias = (g for x in bias for y, g in zip(inputs, found, strict=True) if x is y)
        return found if of_bias is not None else (*found, of_tensor.sum(tuple(range(of_tensor.ndim - 1))))

    return Setup(forward, backward)


@dataclass
class Benchmark:
    """One job and the calls that do it.

    Attributes:
        group: the job's name in tables: kind, comma, case.
        calls: by competitor; the value is a call, or why there is none.
        useful_bytes: bytes that the job has to move, whoever does it.
        sector_bytes: bytes of the 32-byte sectors that they lie in; None if the same.
        flops: floating-point operations of the job.
        dtype: of the matrix products; None where there are none.
        images: images per call, where they are the measure.
        resident_bytes: what a competitor holds between calls (weights, optimiser state), added to its peak memory;
            without an entry for one, its peak is not measured. None: nobody holds anything.
        repeats: calls in a row that are timed as one.
        flush: whether to empty the device's cache first.
        hide_host: whether to queue a call's kernels before the first starts. Not for steps, whose Python counts.
        seconds: time for all rounds together, where their number is not given.
        facts: more results of a competitor, from its name and the number of rounds.
    """

    group: str
    calls: Mapping[str, Call | Unavailable]
    useful_bytes: int | None = None
    sector_bytes: int | None = None
    flops: int | None = None
    dtype: torch.dtype | None = None
    images: int | None = None
    resident_bytes: Mapping[str, int] | None = None
    repeats: int = 1
    flush: bool = True
    hide_host: bool = True
    seconds: float = 1.0
    facts: Callable[[str, int], dict] = lambda name, rounds: {}


class Results(NamedTuple):
    """Times round by round, entries for the results' files, and errors as text; each by competitor."""

    times: dict[str, list[float]]
    entries: dict[str, dict]
    errors: dict[str, str]


def run(
    benchmark: Benchmark,
    names: list[str],
    timer: Timer,
    rounds: int | None = None,
    report: Callable[[str, float], None] = lambda name, seconds: None,
) -> Results:
    """Warm up, then time the named competitors round by round, in 5 to 200 rounds unless ``rounds`` is given.

    ``report`` gets each time as soon as it is measured.
    """
    first: dict[str, float] = {}
    queued: dict[str, float] = {}
    errors: dict[str, str] = {}

    def measure(name: str) -> float:
        wait = queued[name] if benchmark.hide_host else None
        seconds = timer.time(ready(benchmark.calls[name]), benchmark.repeats, benchmark.flush, wait)
        report(name, seconds)
        return seconds

    for name in names:
        try:
            for _ in range(2 if timer.is_cuda else 0):
                ready(benchmark.calls[name])()
            queued[name] = timer.queue_seconds(ready(benchmark.calls[name]))
            first[name] = measure(name)
        except Exception:  # as text: a traceback holds on to memory
            errors[name] = traceback.format_exc()
    each = sum(first.values()) * benchmark.repeats
    order, times = list(first), {name: [] for name in first}
    for _ in range(rounds or int(max(5, min(200, benchmark.seconds / (each + 1e-4))))):
        for name in order:
            times[name].append(measure(name))
        order = [*order[1:], *order[:1]]  # nobody always follows the same one
    entries = {
        name: entry(benchmark.group, name, times[name], **_facts(benchmark, name, times, timer)) for name in times
    }
    return Results(times, entries, errors)


def _facts(benchmark: Benchmark, name: str, times: dict[str, list[float]], timer: Timer) -> dict:
    seconds = statistics.median(times[name])
    facts: dict = {"ratios": ratios(times, name)}
    if benchmark.useful_bytes:
        useful, sectors = benchmark.useful_bytes, benchmark.sector_bytes or benchmark.useful_bytes
        facts |= {
            "useful_bytes": useful,
            "sector_bytes": sectors,
            "gb_per_s": useful / seconds / 1e9,
            "share_of_copy": timer.copy_seconds(useful) / seconds,
            "share_of_copy_by_sectors": timer.copy_seconds(sectors) / seconds,
        }
    if benchmark.dtype:
        facts["dtype"] = name_of(benchmark.dtype)
    if benchmark.flops:
        achieved = benchmark.flops / seconds
        share = achieved / timer.matmul_flops(benchmark.dtype)
        facts |= {"flops": benchmark.flops, "tflop_per_s": achieved / 1e12, "share_of_matmul": share}
    if benchmark.images:
        facts["images_per_s"] = benchmark.images / seconds
    if timer.is_cuda:
        resident = 0 if benchmark.resident_bytes is None else benchmark.resident_bytes.get(name)
        if resident is not None:
            facts["peak_memory_bytes"] = timer.peak_memory(ready(benchmark.calls[name])) + resident
        facts["launches"] = timer.launches(ready(benchmark.calls[name]))
    return facts | benchmark.facts(name, len(times[name]))


def ratios(measured: Mapping[str, Sequence[float]], name: str) -> dict[str, float]:
    """A competitor's times over each other's, the median of the rounds."""
    others = {other: zip(measured[name], theirs, strict=True) for other, theirs in measured.items() if other != name}
    return {other: round(statistics.median(a / b for a, b in pairs), 4) for other, pairs in others.items()}


def describe_run() -> dict:
    """What a result has to be read with: machine, versions, date and commit."""
    versions = {"python": platform.python_version(), "fastmae": fastmae.__version__}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit = "unknown"  # no git, or no repository
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    cuda, cpu = torch.cuda.is_available(), cpu_model()
    machine = {
        "device": torch.cuda.get_device_name(0) if cuda else cpu,
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "versions": versions,
    }
    return {"machine": machine, "date": time.strftime("%Y-%m-%d"), "commit": commit}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(benchmark: Benchmark, results: Results) -> list[str]:
    """Lines for the terminal: each median, and how many times the time of fastmae and of the baselines it is."""
    against = [name for name in results.times if name.startswith(("fastmae", "facebookresearch-sdpa", "plain", "sdpa"))]
    title = f"{benchmark.group}, {name_of(benchmark.dtype)}" if benchmark.dtype else benchmark.group
    lines = [title, f"{'time, and time / time of':<36}{'median':>12}  " + "  ".join(against)]
    for name, times in results.times.items():
        found = {name: 1.0} | results.entries[name]["ratios"]
        cells = "  ".join(f"{found[other]:>{len(other)}.2f}" for other in against)
        lines.append(f"{name:<36}{statistics.median(times) * 1e3:>9.3f} ms  {cells}")
        if "losses" in (one := results.entries[name]):
            lines[-1] += f"  loss {one['losses'][0]:.4f}, after {one['steps']} steps {one['losses'][1]:.4f}"
    return lines


class Timer:
    """Times calls on one device, and remembers what the device does at best.

    Args:
        device: where the calls run.
        cuda: ``torch.cuda``, or an imitation of it, with which the lines for CUDA run without a GPU.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        self.device, self.cuda = device, cuda
        self.is_cuda = device.type == "cuda" or cuda is not torch.cuda
        self._copies: dict[int, float] = {}
        self._products: dict[torch.dtype, float] = {}
        self._flush_buffer: Tensor | None = None
        self._cycles_per_second: float | None = None

    def synchronize(self) -> None:
        if self.is_cuda:
            self.cuda.synchronize()

    def queue_seconds(self, call: Callable[[], object]) -> float:
        """Seconds that the host takes to queue a call; the device is idle before it and not waited for."""
        self.synchronize()
        begun = time.perf_counter()
        call()
        taken = time.perf_counter() - begun
        self.synchronize()
        return taken

    def time(
        self, call: Callable[[], object], repeats: int = 1, flush: bool = True, queue_seconds: float | None = None
    ) -> float:
        """Seconds per call, the mean of ``repeats`` in a row.

        ``queue_seconds``, the host's time for one call, makes the device spin until all are queued; without it, the
        host's time counts where the device waits for it.
        """
        self.synchronize()
        if not self.is_cuda:
            begun = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - begun) / repeats
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        if flush:
            if self._flush_buffer is None:
                size = 4 * self.cuda.get_device_properties(self.device).L2_cache_size
                self._flush_buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._flush_buffer.zero_()
        if queue_seconds is not None:
            self._spin(1.5 * queue_seconds * repeats + 50e-6)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    def _spin(self, seconds: float) -> None:
        """Keep the device busy, half a second at most, without moving a byte."""
        if self._cycles_per_second is None:
            cycles = 10_000_000
            spin = lambda: self.cuda._sleep(cycles)  # noqa: E731
            self.time(spin, flush=False)  # loads the kernel, and the clock rises
            self._cycles_per_second = cycles / self.time(spin, flush=False)
        self.cuda._sleep(int(min(seconds, 0.5) * self._cycles_per_second))

    def median(self, call: Callable[[], object], rounds: int = 15) -> float:
        """Median seconds of a call after two untimed ones."""
        call()
        queued = self.queue_seconds(call)
        return statistics.median(self.time(call, queue_seconds=queued) for _ in range(rounds))

    def copy_seconds(self, num_bytes: int) -> float:
        """Seconds that the device takes to move as many bytes: half of them read, half written."""
        if num_bytes not in self._copies:
            source = torch.zeros(max(num_bytes // 2, 1), dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self._copies[num_bytes] = self.median(lambda: target.copy_(source))
        return self._copies[num_bytes]

    def matmul_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large square matrix product."""
        if dtype not in self._products:
            size = 8192 if self.device.type == "cuda" else 1536
            a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            self._products[dtype] = 2 * size**3 / self.median(lambda: torch.mm(a, b, out=out), rounds=5)
        return self._products[dtype]

    def peak_memory(self, call: Callable[[], object]) -> int:
        """Bytes that a call allocates at its peak, beyond what is there before it."""
        self.synchronize()
        before = self.cuda.memory_allocated()
        self.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return self.cuda.max_memory_allocated() - before

    def launches(self, call: Callable[[], object]) -> int | None:
        """Kernels, copies and fills that a call puts on the device; None where the profiler is refused."""
        kind = self.device.type.upper()
        self.synchronize()
        try:
            with profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
                call()
                self.synchronize()
        except RuntimeError:  # counters are not open to users; the times are worth having all the same
            return None
        return sum(event.device_type.name == kind for event in profiler.events())
