"""The matrix products of the models at their sizes, in bf16 and FP8: what a step can at best take. For GPUs.

Calls run ten in a row, the caches as the call before left them. ``F.linear`` comes with its two gradients, the products
of FP8 with scales per tensor and per row and with both accumulations.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from benchmark import Benchmark, Unavailable
from op_benchmark import CUDA
from torch import Tensor

FP8 = [(8192, 8192, 8192), (12800, 1024, 4096), (12800, 4096, 1024)] if CUDA else [(16, 32, 48)]
# 12,800 rows are 256 images of 50 visible tokens, 12,650 are 253, 12,672 is the next multiple of 128, 51,200 are 1,024
# images; 50,432 rows are 256 images of a decoder's 197 tokens.
ROWS = [(12800, 1024), (50432, 512), (12650, 1024), (12672, 1024), (51200, 1024), (12800, 768), (12800, 1280)]
LINEARS = [
    (rows, *sizes)
    for rows, d in (ROWS if CUDA else [(8, 16)])
    for sizes in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d))
]
SCALES = ("tensor, fast", "tensor, exact", "row, fast", "row, exact")
WAYS = ("forward", "forward with bias", "input gradient", "weight gradient, bf16", "weight gradient, fp32")
ONLY_CUDA = ("row, fast", "row, exact", "weight gradient, fp32")


def fp8_products(sizes: tuple[int, int, int], device: torch.device) -> Benchmark:
    rows, inner, outer = sizes
    factors = random(device, rows, inner), random(device, outer, inner).t()
    high, low = ([x.to(dtype) for x in factors] for dtype in (torch.bfloat16, torch.float8_e4m3fn))

    def product(scales: str, accumulation: str):
        shapes = ((rows, 1), (1, outer)) if scales == "row" else ((), ())
        given = [*low, *(torch.ones(shape, device=device) for shape in shapes)]
        fast = accumulation == "fast"
        return lambda: torch._scaled_mm(*given, out_dtype=torch.bfloat16, use_fast_accum=fast)

    calls = {"bf16": lambda: high[0] @ high[1]} | {name: product(*name.split(", ")) for name in SCALES}
    return _of_products(f"fp8 product, {rows} x {inner} to {outer}", calls, 2 * rows * inner * outer)


def linears(sizes: tuple[int, int, int], device: torch.device) -> Benchmark:
    rows, inner, outer = sizes
    shapes = (rows, inner), (outer, inner), (outer,), (rows, outer)
    x, weight, bias, grad = (random(device, *shape).bfloat16() for shape in shapes)
    calls = (
        lambda: F.linear(x, weight),
        lambda: F.linear(x, weight, bias),
        lambda: grad @ weight,
        lambda: torch.mm(grad.t(), x),
        lambda: torch.mm(grad.t(), x, out_dtype=torch.float32),
    )
    group = f"F.linear, {rows} x {inner} to {outer}"
    return _of_products(group, dict(zip(WAYS, calls, strict=True)), 2 * rows * inner * outer)


def random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device)


def _of_products(group: str, calls: dict, flops: int) -> Benchmark:
    if not CUDA:
        calls |= {name: Unavailable("for CUDA") for name in calls if name in ONLY_CUDA}
    return Benchmark(group, calls, flops=flops, dtype=torch.bfloat16, repeats=10, flush=False)


CASES = [
    *((fp8_products, sizes, name) for sizes in FP8 for name in ("bf16", *SCALES)),
    *((linears, sizes, name) for sizes in LINEARS for name in WAYS),
]


@pytest.mark.parametrize(("build", "sizes", "competitor"), CASES)
def bench_ceilings(compete, device, build, sizes, competitor):
    compete(build, sizes, device)
