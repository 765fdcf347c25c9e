"""What a call costs on a device (time, peak memory, kernel launches), and what the device can do at best.

On CUDA a call is timed by events on its stream. Before each call a buffer several times the size of the level 2 cache
is overwritten, which empties the cache and keeps the device busy while the host queues the call: launch latency is
hidden as it is inside a training step. On the CPU a call is timed by the clock, with whatever the caches hold.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_FLUSH_BYTES = 512 << 20
_MATMUL_SIZE = {"cuda": 8192, "cpu": 1536}


class Meter:
    """Times calls on one device, and remembers what the device was measured to do at best."""

    def __init__(self, device: torch.device):
        self.device, self.is_cuda = device, device.type == "cuda"
        self._copies: dict[int, float] = {}
        self._matmuls: dict[torch.dtype, float] = {}
        self._flush_buffer = None

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        if self._flush_buffer is None:
            self._flush_buffer = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        for _ in range(2):
            self._flush_buffer.zero_()

    def time(self, call: Callable[[], object], calls: int = 1, flush: bool = True) -> float:
        """Seconds of one call, the mean of ``calls`` in a row; the first finds an empty cache if ``flush``."""
        self.synchronize()
        if not self.is_cuda:
            begun = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - begun) / calls
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if flush:
            self.flush()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def median(self, call: Callable[[], object], rounds: int = 15) -> float:
        """Median seconds of a call after two untimed ones."""
        for _ in range(2):
            call()
        return statistics.median(self.time(call) for _ in range(rounds))

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
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def launches(self, call: Callable[[], object]) -> int | None:
        """Kernels, copies and fills that a call puts on the device; None on the CPU and where that cannot be seen."""
        if not self.is_cuda:
            return None
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        self.synchronize()
        try:
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                call()
                self.synchronize()
        except RuntimeError:  # where counters are not open to users; the times are worth having all the same
            return None
        return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


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
