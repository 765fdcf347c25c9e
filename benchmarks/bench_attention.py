"""Attention at the lengths of a masked autoencoder: each backend, forward and backward, from one packed projection, or
from one of queries and one of keys and values where only some rows are asked for.

``sdpa`` is PyTorch's own choice among its kernels; ``sdpa-flash``, ``sdpa-cudnn`` and ``sdpa-efficient`` are those
kernels by name. ``report.py`` makes from the result what ``backend="auto"`` picks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
from benchmark import Benchmark, Unavailable, gradient
from op_benchmark import CUDA
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmae.ops import _attention_triton, _xformers, attention_kvpacked, attention_qkvpacked
from fastmae.ops._attention_choice import device_key

# dtype, tokens, channels per head, and queries if not of all tokens. Encoders keep a quarter of 196 or 256 patches,
# decoders see all, each with a class token; 80 channels are ViT-H's.
CASES = list(product(("bfloat16", "float32"), (50, 65, 197, 257), (32, 64, 80)))
if CUDA:
    # Encoders, decoders and unmasked encoders of ViT-B, L and H, and one small model; compiling takes the time. Nobody
    # trains in full precision there: two shapes, to know.
    SHAPES = [(50, 32), (50, 64), (65, 80), (197, 32), (197, 64), (257, 32), (257, 80)]
    CASES = [*(("bfloat16", *shape) for shape in SHAPES), ("float32", 50, 64), ("float32", 197, 32)]
    # Of the last decoder block only the masked patches are asked for.
    CASES += [("bfloat16", 197, 32, 147), ("bfloat16", 257, 32, 192)]
TILED = [("bfloat16", 50, 64), ("bfloat16", 197, 32), ("bfloat16", 197, 32, 147)] if CUDA else []
BATCH, HEADS = (128, 16) if CUDA else (8, 12)
KERNELS = {
    "sdpa-flash": (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.can_use_flash_attention),
    "sdpa-cudnn": (SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.can_use_cudnn_attention),
    "sdpa-efficient": (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.can_use_efficient_attention),
}
COMPETITORS = ["sdpa", "plain", "triton", "xformers", *KERNELS]


def missing(name: str, device: torch.device, dtype: torch.dtype, tokens: int, dim: int) -> str | None:
    """Why a competitor cannot take part; one that can and fails must be seen to fail."""
    if name == "xformers":
        try:
            _xformers.require(device)
        except ValueError as error:
            return str(error)
    if name == "triton":
        return "a kernel for GPUs" if device.type == "cpu" else _attention_triton.unfit(dtype, tokens, dim)
    if name in KERNELS:
        if device.type == "cpu":
            return "a kernel for CUDA"
        q = torch.empty(1, 1, tokens, dim, device=device, dtype=dtype, requires_grad=True)
        if not KERNELS[name][1](torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False)):
            return "PyTorch says that it does not take such tensors"
    return None


def attend(name: str, inputs: Sequence[Tensor]) -> Tensor:
    """Attention by a competitor, of one packed tensor or of queries and packed keys and values."""
    attention = attention_qkvpacked if len(inputs) == 1 else attention_kvpacked
    with sdpa_kernel(KERNELS[name][0]) if name in KERNELS else nullcontext():
        return attention(*inputs, "sdpa" if name in KERNELS else name)


def make_inputs(
    n: int, heads: int, dtype: torch.dtype, tokens: int, dim: int, device: torch.device, queries: int | None = None
) -> list[Tensor]:
    """One packed tensor, or queries and packed keys and values."""
    shapes = [(n, tokens, 3, heads, dim)] if queries is None else [(n, queries, heads, dim), (n, tokens, 2, heads, dim)]
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def case_name(dtype: str, tokens: int, dim: int, queries: int | None = None) -> str:
    return f"{dtype} {f'{queries} of ' if queries else ''}{tokens} tokens of {dim}"


def build(device: torch.device, dtype_name: str, tokens: int, dim: int, queries: int | None = None) -> Benchmark:
    dtype, rows = getattr(torch, dtype_name), queries or tokens
    inputs = make_inputs(BATCH, HEADS, dtype, tokens, dim, device, queries)
    grad = torch.randn(BATCH, rows, HEADS, dim, device=device).to(dtype)

    def call(name: str):
        if reason := missing(name, device, dtype, tokens, dim):
            return Unavailable(reason)
        return lambda: torch.autograd.grad(attend(name, inputs), inputs, grad)

    facts = {"dtype": dtype_name, "tokens": tokens, "head_dim": dim, "device_key": device_key(device.type)}
    facts["torch"] = torch.__version__
    return Benchmark(
        f"attention, {case_name(dtype_name, tokens, dim, queries)}",
        {name: call(name) for name in COMPETITORS},
        # Forward q, k, v and the output; backward q, k, v, the output's gradient and three gradients.
        useful_bytes=BATCH * HEADS * dim * (5 * rows + 6 * tokens) * dtype.itemsize,
        # Two products forward; backward the scores again, and four.
        flops=BATCH * HEADS * 7 * 2 * rows * tokens * dim,
        dtype=dtype,
        seconds=0.2 if CUDA else 1.2,
        # What the table of choices is made of; it is of self-attention.
        facts=lambda name, rounds: {} if queries else facts,
    )


@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def bench_attention(compete, device, request, case, competitor):
    if device.type == "cpu" and case[0] == "bfloat16" and request.getfixturevalue("dtype") == torch.float32:
        pytest.skip("this CPU is faster in fp32")
    compete(build, device, *case)


# --- The tiles that our kernels could run in --------------------------------------------------------------------------


class Tiled(torch.autograd.Function):
    """Our kernels in given tiles; None means the default."""

    @staticmethod
    def forward(ctx, forward_tile, backward_tile, *inputs):
        out, lse = _attention_triton.forward(*_unpacked(inputs), forward_tile)
        ctx.save_for_backward(lse, *inputs)
        ctx.tile = backward_tile
        return out

    @staticmethod
    def backward(ctx, grad):
        lse, *inputs = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in inputs]
        _attention_triton.backward(grad, lse, *_unpacked(inputs), *_unpacked(grads), ctx.tile)
        return None, None, *grads


def _unpacked(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return inputs[0].unbind(2) if len(inputs) == 1 else (inputs[0], *inputs[1].unbind(2))


def tiles(dtype_name: str, tokens: int, dim: int, queries: int | None = None, *, backward: bool) -> dict[str, tuple]:
    """Candidates by name, the default first; each with the other direction's default, as ``Tiled`` takes them."""
    size, itemsize = (queries or tokens, tokens), getattr(torch, dtype_name).itemsize
    found = _attention_triton.forward_tiles(*size, itemsize)
    if backward:
        found = _attention_triton.backward_tiles(*size, dim, itemsize)
    pairs = [((None, tile) if backward else (tile, None), tile) for tile in found]
    return {f"{tile.queries} queries, {tile.warps} warps, {tile.stages} stages": pair for pair, tile in pairs}


def build_tiles(device: torch.device, backward: bool, dtype_name: str, *shape: int) -> Benchmark:
    """Each tile of our kernels, forward alone or backward alone."""
    tokens, dim, *queries = shape
    inputs = make_inputs(BATCH, HEADS, getattr(torch, dtype_name), tokens, dim, device, *queries)
    calls = {}
    for name, pair in tiles(dtype_name, *shape, backward=backward).items():
        function = partial(Tiled.apply, *pair, *inputs)
        calls[name] = gradient(function, inputs) if backward else torch.no_grad()(function)
    direction = "backward" if backward else "forward"
    return Benchmark(f"attention tiles, {direction}, {case_name(dtype_name, *shape)}", calls, seconds=0.2)


TILES = [(case, b, name) for case in TILED for b in (False, True) for name in tiles(*case, backward=b)]


@pytest.mark.parametrize(("case", "backward", "competitor"), TILES, ids=str)
def bench_attention_tiles(compete, device, case, backward, competitor):
    compete(build_tiles, device, backward, *case)
