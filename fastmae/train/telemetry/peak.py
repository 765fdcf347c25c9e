"""What a device does at best, by measurement: the rate of a large matrix product, of which a step reaches a share."""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch

_SIZE = {"cuda": 8192, "cpu": 1536}
_QUICK_SIZE = {"cuda": 8192, "cpu": 384}
_QUICK_ROUNDS = 3


def matmul_flops(device: torch.device, dtype: torch.dtype, rounds: int = 5, size: int | None = None) -> float:
    """FLOP/s of a large square matrix product: what the device does at best, the median of some rounds.

    Waits for the device.

    Args:
        device: a CUDA device or the CPU, with PyTorch's present settings (TF32, threads).
        dtype: of both factors and of the product.
        rounds: timed, after two that are not.
        size: of the matrices; None: 8192 on a GPU, 1536 on a CPU.
    """
    size = size or _SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out, seconds = torch.empty_like(a), []
    for _ in range(rounds + 2):
        _synchronize(device)
        begun = time.perf_counter()
        torch.mm(a, b, out=out)
        _synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / statistics.median(seconds[2:])


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """:func:`matmul_flops` once a process for each device, dtype and number of threads; None where it cannot be had.

    A run begins with it, so it is short: on a GPU a few milliseconds and under a gigabyte that is given back, on a CPU
    about as much time with matrices of 384, which fit its caches. A large product is up to a few tenths faster or
    slower there, and so is the share of the peak that follows.
    """
    return _peak_flops(str(device), dtype, torch.get_num_threads())


@cache
def _peak_flops(device: str, dtype: torch.dtype, threads: int) -> float | None:
    where = torch.device(device)
    try:
        with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
            return matmul_flops(where, dtype, _QUICK_ROUNDS, _QUICK_SIZE[where.type])
    except RuntimeError:  # no memory left, or a dtype that the device has no product for: a figure less, not a run
        return None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
