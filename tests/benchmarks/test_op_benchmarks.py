"""The benchmarks of single ops: competitors compute the same, and bytes are those of the ops' budgets.

On a GPU this holds every op at training shapes to the accuracy of plain PyTorch.
"""

from __future__ import annotations

from dataclasses import replace

import bench_attention
import bench_gather_patches
import bench_gather_tokens
import bench_gelu_linear
import bench_masked_patch_mse
import bench_masking
import bench_norm_linear
import bench_restore_tokens
import op_benchmark
import pytest
import torch
from traffic_cases import OPS, Sizes

CPU, CUDA = torch.device("cpu"), torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BF16, F32 = torch.bfloat16, torch.float32
TINY = {F32: 1e-3, BF16: 4e-3}  # of the largest value; that of bf16 is a unit in its last place
MODULES = (
    bench_gather_patches, bench_gather_tokens, bench_gelu_linear, bench_masked_patch_mse, bench_norm_linear,
    bench_restore_tokens,
)  # fmt: skip
CASES = [pytest.param(m.make, shape, id=f"{m.__name__}-{shape[0]}") for m in MODULES for shape in m.SHAPES]


def computed(case: op_benchmark.OpCase, function, inputs: dict, grads: list, dtype: torch.dtype) -> list:
    """Results, and gradients of what requires one; None for what the function does not use."""
    with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype != F32):
        out = function(**inputs)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    leaves = [inputs[name] for name in case.differentiable()]
    if not leaves:
        return out
    grads.extend(torch.randn_like(o, dtype=BF16) for o in out[len(grads) :])
    given = [grad.to(o.dtype) for grad, o in zip(grads, out, strict=True)]
    return [*out, *torch.autograd.grad(out, leaves, given, allow_unused=True)]


def assert_same(case: op_benchmark.OpCase) -> None:
    """Errors are at most twice those of plain PyTorch under autocast, and a tiny share of the largest value on top."""
    wide = {
        name: x.detach().float().requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in case.inputs.items()
    }
    for ours, plain in case.same.items():
        grads = []
        found = [computed(case, case.calls[name], case.inputs, grads, BF16) for name in (ours, plain)]
        truth = computed(case, case.calls[plain], wide, grads, F32)
        for got, other, exact in zip(*found, truth, strict=True):
            if exact is None:
                assert got is None
                continue
            error, allowed = ((x.detach().float() - exact.float()).abs().max() for x in (got, other))
            allowed = 2 * allowed + TINY[got.dtype] * exact.abs().max()
            assert error <= allowed, f"{ours}: error {error:.3e}, allowed {allowed:.3e}, shape {tuple(got.shape)}"


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_ours_is_as_accurate_as_plain_pytorch(make, shape):
    assert_same(make(shape, DEVICE, BF16))


@pytest.mark.parametrize("branch", [True, False])
def test_norm_linear_without_a_branch_and_on_a_bf16_stream(branch):
    case = bench_norm_linear.make(bench_norm_linear.SHAPES[0], DEVICE, BF16, stream=BF16 if branch else F32)
    assert_same(case if branch else replace(case, inputs=case.inputs | {"branch": None, "branch_bias": None}))


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", bench_attention.TILED, ids=str)
def test_every_tile_of_attention_gives_the_same(case, backward):
    _, tokens, dim, *queries = case
    inputs = bench_attention.make_inputs(64, 16, BF16, tokens, dim, DEVICE, *queries)
    call = {"attend": lambda **x: bench_attention.attend("plain", list(x.values()))}
    names = ("qkv",) if len(inputs) == 1 else ("q", "kv")
    for name, pair in bench_attention.tiles(*case, backward=backward).items():
        call[name] = lambda pair=pair, **x: bench_attention.Tiled.apply(*pair, *x.values())
    same = {name: "attend" for name in call if name != "attend"}
    assert_same(op_benchmark.OpCase("attention", "", dict(zip(names, inputs, strict=True)), call, same=same))


def test_useful_bytes_are_the_budget():
    # Small enough to build at once, large enough that what is read once per launch hardly counts.
    s = Sizes(N=32, side=64, patch=16, D=128, E=128)
    image, encoder, decoder = ("uint8", s.N, s.side, s.patch), ("", s.N, s.L, s.K, s.D), ("", s.N, s.L, s.K, s.E)
    cases = {
        "random_masking": bench_masking.make(("", s.N, s.L), CPU, BF16),
        "gather_patches": bench_gather_patches.make(image, CPU, BF16),
        "gather_tokens": bench_gather_tokens.make(encoder, CPU, BF16),
        "restore_tokens": bench_restore_tokens.make(decoder, CPU, BF16),
        "masked_patch_mse": bench_masked_patch_mse.make(image, CPU, BF16),
    }
    for op, case in cases.items():
        for name, found in zip((op, f"{op} backward"), case.moved, strict=True):
            # The gradients of restore_tokens are two launches, each with a budget of its own.
            parts = [o for key, o in OPS.items() if key == name or (key.startswith(f"{name},") and "full" not in key)]
            budget = sum(sum(part.values()) for o in parts for part in (o.reads(s), o.writes(s)))
            assert not found or found == pytest.approx(budget, rel=0.03), name


@pytest.mark.parametrize(("source", "p", "wasted"), [("uint8 NHWC", 16, 16 * 16), ("float32 NCHW", 8, 0)])
def test_sectors_of_a_patch(source, p, wasted):
    # 48 bytes at a multiple of 48 touch two sectors; 32 aligned bytes fill one.
    images = op_benchmark.images_of(source, 1, 64, CPU)
    assert op_benchmark.wasted_sector_bytes(images, p, 5) == 5 * wasted
