"""An imitation of ``torch.cuda`` for ``gpu.py --dry-run``: the lines for CUDA run on the CPU, synchronously.

It measures nothing. A wrong name or argument in such a line shows without a GPU.
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

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, end_event):
        return (end_event.at - self.at) * 1e3 + 1e-6


class Stream:
    def wait_stream(self, stream):
        pass


class CUDAGraph:
    def replay(self):
        pass

    def pool(self):
        return (0, 1)


def graph(cuda_graph, pool=None):
    return nullcontext()


def stream(stream):
    return nullcontext()


def _sleep(cycles):
    assert isinstance(cycles, int)


def get_device_properties(device=None):
    return SimpleNamespace(L2_cache_size=1 << 16)


current_stream = Stream
memory_allocated = max_memory_allocated = lambda device=None: 0
synchronize = reset_peak_memory_stats = empty_cache = lambda: None
