"""What the device does at its best: copies, and the matrix products of the models at their sizes. For GPUs.

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

COPIES = [1 << 26, 1 << 28, 1 << 30, 1 << 33] if CUDA else [1 << 16]
FP8 = [(8192, 8192, 8192), (12800, 1024, 4096), (12800, 4096, 1024)] if CUDA else [(16, 32, 48)]
# 12,800 rows are 256 images of 50 visible tokens, 12,650 are 253, 12,672 is the next multiple of 128, 51,200 are 1,024
# images; 50,432 rows are 256 images of a decoder's 197 tokens.
ROWS = [(12800, 1024), (50432, 512), (12650, 1024), (12672, 1024), (51200, 1024), (12800, 768), (12800, 1280)]
LINEARS = [
    (rows, *sizes)
    for rows, d in (ROWS if CUDA else [(8, 16)])
    for sizes in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d))
]
DTYPES = ("bfloat16", "float16", "float32")
SCALES = ("tensor, fast", "tensor, exact", "row, fast", "row, exact")
WAYS = ("forward", "forward with bias", "input gradient", "weight gradient, bf16", "weight gradient, fp32")
ONLY_CUDA = ("row, fast", "row, exact", "weight gradient, fp32")


def copies(size: int, device: torch.device) -> Benchmark:
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Benchmark(f"copy, {size >> 10} KiB", {"copy_": lambda: target.copy_(source)}, useful_bytes=size)


def products(size: int, device: torch.device) -> Benchmark:
    pairs = {name: [random(device, size, size).to(getattr(torch, name)) for _ in range(2)] for name in DTYPES}
    calls = {name: lambda pair=pair: torch.mm(*pair) for name, pair in pairs.items()}
    return _of_products(f"square matrix product, {size}", calls, 2 * size**3)


def fp8_products(sizes: tuple[int, int, int], device: torch.device) -> Benchmark:
    rows, inner, outer = sizes
    a, b = random(device, rows, inner), random(device, outer, inner)
    high, low = [x.bfloat16() for x in (a, b)], [x.to(torch.float8_e4m3fn) for x in (a, b)]

    def product(scales: str, accumulation: str) -> Tensor:
        shapes = ((rows, 1), (1, outer)) if scales == "row" else ((), ())
        scale_a, scale_b = (torch.ones(shape, device=device) for shape in shapes)
        fast = accumulation == "fast"
        return torch._scaled_mm(low[0], low[1].t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)

    calls = {"bf16": lambda: high[0] @ high[1].t()}
    calls |= {name: lambda name=name: product(*name.split(", ")) for name in SCALES}
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
    *((copies, size, "copy_") for size in COPIES),
    *((products, 8192 if CUDA else 64, dtype) for dtype in DTYPES),
    *((fp8_products, sizes, name) for sizes in FP8 for name in ("bf16", *SCALES)),
    *((linears, sizes, name) for sizes in LINEARS for name in WAYS),
]


@pytest.mark.parametrize(("build", "sizes", "competitor"), CASES)
def bench_ceilings(compete, device, build, sizes, competitor):
    compete(build, sizes, device)
