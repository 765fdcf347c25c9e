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

# 12,800 rows are 256 images of 50 visible tokens, 12,650 are 253, 12,672 is the next multiple of 128, 51,200 are 1,024
# images; 50,432 rows are 256 images of a decoder's 197 tokens.
FP8, ROWS = [(16, 32, 48)], [(8, 16)]
if CUDA:
    FP8 = [(8192, 8192, 8192), (12800, 1024, 4096), (12800, 4096, 1024)]
    ROWS = [(12800, 1024), (50432, 512), (12650, 1024), (12672, 1024), (51200, 1024), (12800, 768), (12800, 1280)]
LINEARS = [(rows, *size) for rows, d in ROWS for size in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d))]
SCALES = ("bf16", "tensor, fast", "tensor, exact", "row, fast", "row, exact")
WAYS = ("forward", "forward with bias", "input gradient", "weight gradient, bf16", "weight gradient, fp32")
ONLY_CUDA = ("row, fast", "row, exact", "weight gradient, fp32")


def fp8_products(rows: int, inner: int, outer: int, device: torch.device) -> list:
    factors = torch.randn(rows, inner, device=device), torch.randn(outer, inner, device=device).t()
    high, low = ([x.to(dtype) for x in factors] for dtype in (torch.bfloat16, torch.float8_e4m3fn))

    def product(scales: str, accumulation: str):
        shapes = ((rows, 1), (1, outer)) if scales == "row" else ((), ())
        given = [*low, *(torch.ones(shape, device=device) for shape in shapes)]
        fast = accumulation == "fast"
        return lambda: torch._scaled_mm(*given, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return [lambda: high[0] @ high[1], *(product(*name.split(", ")) for name in SCALES[1:])]


def linears(rows: int, inner: int, outer: int, device: torch.device) -> list:
    shapes = (rows, inner), (outer, inner), (outer,), (rows, outer)
    x, weight, bias, grad = (torch.randn(shape, device=device).bfloat16() for shape in shapes)
    return [
        lambda: F.linear(x, weight),
        lambda: F.linear(x, weight, bias),
        lambda: grad @ weight,
        lambda: torch.mm(grad.t(), x),
        lambda: torch.mm(grad.t(), x, out_dtype=torch.float32),
    ]


# kind: calls, their names, sizes
KINDS = {"fp8 product": (fp8_products, SCALES, FP8), "F.linear": (linears, WAYS, LINEARS)}
CASES = [(kind, sizes, name) for kind, (_, names, shapes) in KINDS.items() for sizes in shapes for name in names]


def build(kind: str, sizes: tuple[int, int, int], device: torch.device) -> Benchmark:
    (make, names, _), (rows, inner, outer) = KINDS[kind], sizes
    calls = dict(zip(names, make(*sizes, device), strict=True))
    if not CUDA:
        calls |= {name: Unavailable("for CUDA") for name in calls if name in ONLY_CUDA}
    group, flops = f"{kind}, {rows} x {inner} to {outer}", 2 * rows * inner * outer
    return Benchmark(group, calls, flops=flops, dtype=torch.bfloat16, repeats=10, flush=False)


@pytest.mark.parametrize(("kind", "sizes", "competitor"), CASES)
def bench_ceilings(compete, device, kind, sizes, competitor):
    compete(build, kind, sizes, device)
