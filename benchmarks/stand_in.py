"""A stand-in for ``torch.cuda`` on a machine without a GPU: the lines for CUDA run, on the CPU, synchronously.

It measures nothing worth knowing. It is there so that a wrong name or argument in such a line is found without a GPU;
``tests/benchmarks/test_gpu_script.py`` holds its names and parameters to those of ``torch.cuda``.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
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


@contextmanager
def graph(cuda_graph, pool=None):
    yield


@contextmanager
def stream(stream):
    yield


def current_stream():
    return Stream()


def synchronize():
    pass


def _sleep(cycles):
    assert isinstance(cycles, int)


def get_device_properties(device=None):
    return SimpleNamespace(L2_cache_size=1 << 16)


def memory_allocated():
    return 0


def max_memory_allocated():
    return 0


def reset_peak_memory_stats():
    pass


def empty_cache():
    pass
