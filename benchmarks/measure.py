"""What a call costs on a device (time, peak memory, kernel launches), and what the device can do at best.

On CUDA a call is timed by events on its stream. Before each call a buffer several times the size of the level 2 cache
is overwritten, which empties the cache, and where the host's time to queue the call is known, the device then spins for
longer than that: all kernels of the call are queued before the first of them starts, so launch latency and Python are
not in the measured time, as they are not in a training step that the device limits. On the CPU a call is timed by the
clock, with whatever the caches hold.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import fastmae

_MATMUL_SIZE = {"cuda": 8192, "cpu": 1536}
_FLUSHED_CACHES = 4
"""Bytes overwritten to empty the level 2 cache, in sizes of that cache."""
_CALIBRATION_CYCLES = 10_000_000
_SPIN_MARGIN, _SPIN_EXTRA_SECONDS, _MAX_SPIN_SECONDS = 1.5, 50e-6, 0.5
_PACKAGES = (
    "torch", "torchvision", "triton", "transformers", "timm", "xformers", "apex", "pillow", "nvidia-dali-cuda120",
    "nvidia-dali-cuda130", "webdataset", "pytest-benchmark",
)  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine(cpu: str) -> dict:
    """What a result has to be read with: device, versions, threads."""
    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else cpu,
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), "fastmae": fastmae.__version__}
        | {p: v for p in _PACKAGES if (v := _version(p))},
    }


class Kernel(NamedTuple):
    """A kernel, copy or fill by name: how often a call launches it, and seconds of all launches together."""

    name: str
    launches: int
    seconds: float


class Meter:
    """Times calls on one device, and remembers what the device was measured to do at best.

    Args:
        device: where the calls run.
        cuda: ``torch.cuda``, or a stand-in with its functions, on which the lines for CUDA run without a GPU.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        self.device, self.cuda = device, cuda
        self.is_cuda = device.type == "cuda" or cuda is not torch.cuda
        self.covered = False
        """Whether the host had queued all of the last timed call before the device came to it."""
        self._copies: dict[int, float] = {}
        self._matmuls: dict[torch.dtype, float] = {}
        self._flush_buffer = None
        self._cycles_per_second = 0.0

    def synchronize(self) -> None:
        if self.is_cuda:
            self.cuda.synchronize()

    def flush(self) -> None:
        if self._flush_buffer is None:
            size = _FLUSHED_CACHES * self.cuda.get_device_properties(self.device).L2_cache_size
            self._flush_buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._flush_buffer.zero_()

    def spin(self, seconds: float) -> None:
        """Keep the device busy for at least so long, without a byte moved."""
        if not self._cycles_per_second:
            self._spin_cycles(_CALIBRATION_CYCLES)  # the first launch loads the kernel, the clock rises
            self._cycles_per_second = _CALIBRATION_CYCLES / self._spin_cycles(_CALIBRATION_CYCLES)
        self.cuda._sleep(int(min(seconds, _MAX_SPIN_SECONDS) * self._cycles_per_second))

    def _spin_cycles(self, cycles: int) -> float:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def queue_seconds(self, call: Callable[[], object]) -> float:
        """Seconds that the host takes to queue a call, the device idle before it and not waited for."""
        self.synchronize()
        begun = time.perf_counter()
        call()
        taken = time.perf_counter() - begun
        self.synchronize()
        return taken

    def time(
        self, call: Callable[[], object], calls: int = 1, flush: bool = True, queue_seconds: float | None = None
    ) -> float:
        """Seconds of one call, the mean of ``calls`` in a row; the first finds an empty cache if ``flush``.

        With ``queue_seconds``, what the host takes to queue one call, the device spins until all are queued. Without,
        the host's time counts where the device waits for it.
        """
        self.synchronize()
        if not self.is_cuda:
            begun = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - begun) / calls
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        if flush:
            self.flush()
        if queue_seconds is not None:
            self.spin(queue_seconds * calls * _SPIN_MARGIN + _SPIN_EXTRA_SECONDS)
        start.record()
        for _ in range(calls):
            call()
        self.covered = not start.query()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

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
        """FLOP/s of a large square matrix product in ``dtype``."""
        if dtype not in self._matmuls:
            size = _MATMUL_SIZE[self.device.type]
            a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            self._matmuls[dtype] = 2 * size**3 / self.median(lambda: torch.mm(a, b, out=out), rounds=5)
        return self._matmuls[dtype]

    def peak_memory(self, call: Callable[[], object]) -> int | None:
        """Bytes that a call allocates beyond what is there before it, at its peak; None on the CPU."""
        if not self.is_cuda:
            return None
        self.synchronize()
        before = self.cuda.memory_allocated()
        self.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return self.cuda.max_memory_allocated() - before

    def kernels(self, call: Callable[[], object]) -> list[Kernel] | None:
        """What a call puts on the device, longest first; None on the CPU and where the profiler is refused."""
        if not self.is_cuda:
            return None
        from torch.profiler import ProfilerActivity, profile

        kind = self.device.type.upper()
        self.synchronize()
        try:
            with profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
                call()
                self.synchronize()
        except RuntimeError:  # where counters are not open to users; the times are worth having all the same
            return None
        found: dict[str, list[float]] = defaultdict(list)
        for event in profiler.events():
            if event.device_type.name == kind:
                found[event.name].append(event.time_range.elapsed_us() / 1e6)
        kernels = [Kernel(name, len(seconds), sum(seconds)) for name, seconds in found.items()]
        return sorted(kernels, key=lambda kernel: -kernel.seconds)

    def launches(self, call: Callable[[], object]) -> int | None:
        """Kernels, copies and fills that a call puts on the device; None where that cannot be seen."""
        kernels = self.kernels(call)
        return None if kernels is None else sum(kernel.launches for kernel in kernels)


def image_sector_bytes(images: torch.Tensor, ids: torch.Tensor, patch_size: int) -> int:
    """Bytes of the distinct 32-byte sectors that the chosen patches of a batch lie in, counted.

    Args:
        images: (N, C, H, W), dense in memory, channels first or last; taken to begin at a sector.
        ids: (N, K), the patches, row by row.
    """
    n, _, h, w = images.shape
    grid = (h // patch_size, w // patch_size)
    chosen = torch.zeros(n, grid[0] * grid[1], dtype=torch.bool, device=ids.device)
    chosen = chosen.scatter_(1, ids, True).view(n, 1, *grid)
    chosen = chosen.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3).expand(images.shape)
    order = sorted(range(4), key=lambda axis: (-images.stride(axis), axis))
    chosen = chosen.permute(order).reshape(-1)
    # A value of four bytes never straddles two sectors, so that sectors can be counted in values.
    values = 32 // images.element_size()
    chosen = torch.nn.functional.pad(chosen, (0, -chosen.numel() % values))
    return int(chosen.view(-1, values).any(1).sum()) * 32
