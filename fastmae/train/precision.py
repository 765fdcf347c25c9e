"""``--train.precision``: what matrix products compute in, measured on a CPU, where it depends on the machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fastmae.train.checkpoint import Ranks
from fastmae.train.config import PretrainConfig

_FLOPS, _MOST_ROWS, _LEAST_ROWS = 1 << 26, 2048, 32
"""Size of one product: a CPU that emulates bfloat16 at 1 GFLOP/s takes 0.07 s for it."""
_SECONDS, _MOST_ROUNDS = 0.3, 15
_SLOW = 0.9
"""bf16 below this share of fp32's rate is worth a warning; above it, the two may just as well be equal."""


class Speeds(NamedTuple):
    """GFLOP/s of matrix products."""

    fp32: float
    bf16: float

    def __str__(self) -> str:
        return f"{self.bf16:.3g} GFLOP/s in bf16, {self.fp32:.3g} in fp32"


class Settled(NamedTuple):
    """A configuration with a precision in place of "auto"."""

    config: PretrainConfig
    text: str = ""
    """Why it is this precision; empty where the user named it."""
    warning: str = ""
    """That bf16 is slow here, if it is."""


def measure_products(width: int) -> Speeds:
    """Time the first product of a model's MLP, (rows, width) x (width, 4 * width), in both precisions.

    The fastest of interleaved runs on the CPU with PyTorch's present number of threads, because others may be running
    too, and a median is then of their making; under a second.
    """
    rows = max(_LEAST_ROWS, min(_MOST_ROWS, _FLOPS // (8 * width * width)))
    shapes = (rows, width), (4 * width, width)
    operands = {dtype: [torch.full(s, 0.5, dtype=dtype) for s in shapes] for dtype in (torch.float32, torch.bfloat16)}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    begun = time.perf_counter()
    for _ in range(_MOST_ROUNDS):
        for dtype, (x, weight) in operands.items():
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds[dtype].append(time.perf_counter() - start)
        if time.perf_counter() - begun > _SECONDS:
            break
    return Speeds(*(8e-9 * rows * width**2 / min(times) for times in seconds.values()))


def settle_precision(
    config: PretrainConfig, width: int, device: torch.device, ranks: Ranks, saved: Mapping[str, Any] | None = None
) -> Settled:
    """Put a precision in the place of "auto"; every rank calls it, and the first one measures.

    bf16 on CUDA. On the CPU the faster of fp32 and bf16: many have no bfloat16 instructions, and emulate them at a
    hundredth to a fifth of fp32's rate. A resumed run keeps the precision of its checkpoint.

    Args:
        config: validated.
        width: of the model's encoder.
        device: of the training.
        ranks: who has to agree.
        saved: the manifest of the checkpoint to resume from, if any.
    """
    precision, text, warning = config.train.precision, "", ""
    if precision == "auto" and saved is not None:
        precision = saved["config"]["train"]["precision"]
        text = f"Precision auto: {precision}, as the run began"
    if device.type != "cpu":
        precision = "bf16" if precision == "auto" else precision
    elif precision in ("auto", "bf16"):
        speeds = ranks.first("measuring matrix products", lambda: measure_products(width))
        if precision == "auto":
            precision = "bf16" if speeds.bf16 > speeds.fp32 else "fp32"
            text = f"Precision auto: {precision}; matrix products of the model's width run at {speeds} here"
        elif (ratio := speeds.bf16 / speeds.fp32) < _SLOW:
            warning = (
                f"--train.precision bf16: matrix products run at {ratio:.2g} of fp32's rate on this CPU ({speeds}); "
                "fp32 is faster"
            )
    return Settled(replace(config, train=replace(config.train, precision=precision)), text, warning)
