"""How many threads, how many batches ahead: chosen from the machine."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

PREFETCH = 2
"""Batches made ahead; more does not help where the loader is slower, and costs memory where it is faster."""
_MOST_THREADS = 16
_MEMORY_SHARE = 8
"""Batches made ahead take at most this part of the memory, or only one is made."""


class LoaderOptions(NamedTuple):
    """What a loader uses of the machine.

    Attributes:
        num_threads: threads that read, decode and resize.
        prefetch: finished batches that wait for the consumer at most.
        cores: processor cores that this process may use.
        batch_bytes: bytes of a batch's images.
    """

    num_threads: int
    prefetch: int
    cores: int
    batch_bytes: int

    def describe(self) -> str:
        """For a log: what was chosen, out of what."""
        threads = f"{self.num_threads} decoding thread{'s' * (self.num_threads != 1)} on {self.cores} cores"
        batches = f"{self.prefetch} batch{'es' * (self.prefetch != 1)} ahead"
        return f"{threads}, {batches} of {self.batch_bytes / 1e6:.1f} MB each"


def choose_options(
    device: torch.device,
    batch_bytes: int,
    *,
    world_size: int = 1,
    num_threads: int | None = None,
    prefetch: int | None = None,
) -> LoaderOptions:
    """Options for one of ``world_size`` processes, with whatever the caller decided.

    Args:
        device: where the model is; if that is the CPU, half the cores are left to it.
        batch_bytes: bytes of a batch's images.
        world_size: processes in the run; as many of them as there are GPUs share this machine.
        num_threads, prefetch: not chosen, if given.

    Raises:
        ValueError: ``num_threads`` or ``prefetch`` below 1.
    """
    for name, value in (("num_threads", num_threads), ("prefetch", prefetch)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    cores = available_cores()
    neighbours = min(world_size, max(torch.cuda.device_count(), 1)) if device.type == "cuda" else 1
    share = cores // neighbours if device.type != "cpu" else cores // 2
    threads = num_threads or max(1, min(_MOST_THREADS, share))
    affordable = PREFETCH * batch_bytes <= physical_bytes() // neighbours // _MEMORY_SHARE
    return LoaderOptions(threads, prefetch or (PREFETCH if affordable else 1), cores, batch_bytes)


def physical_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
