"""An imitation of ``torch.cuda`` for ``--tiny``: the lines for CUDA run on the CPU, synchronously, and measure nothing.

A wrong name or argument in such a line shows without a GPU.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace


class Event:
    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end_event):
        return (end_event.at - self.at) * 1e3 + 1e-6


def CUDAGraph():
    return SimpleNamespace(replay=lambda: None, pool=lambda: (0, 1))


def _sleep(cycles):
    assert isinstance(cycles, int)


Stream = current_stream = lambda: SimpleNamespace(wait_stream=lambda stream: None)
graph = lambda cuda_graph, pool=None: nullcontext()  # noqa: E731
stream = lambda stream: nullcontext()  # noqa: E731
get_device_properties = lambda device=None: SimpleNamespace(L2_cache_size=1 << 16)  # noqa: E731
memory_allocated = max_memory_allocated = lambda device=None: 0
synchronize = reset_peak_memory_stats = empty_cache = lambda: None
