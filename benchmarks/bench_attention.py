"""Attention at the lengths of a masked autoencoder: each backend, forward and backward, from one packed projection, or
from one of queries and one of keys and values where only some rows are asked for.

``sdpa`` is PyTorch's own choice among its kernels; ``sdpa-flash``, ``sdpa-cudnn`` and ``sdpa-efficient`` are those
kernels by name. ``choose_attention.py`` makes from the result what ``backend="auto"`` picks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from comparison import Comparison, Competitor, Unavailable, gradient
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmae.ops import _attention_triton, _xformers, attention_kvpacked, attention_qkvpacked
from fastmae.ops._attention_autograd import AddedBias
from fastmae.ops._attention_choice import device_key

CUDA = torch.cuda.is_available()
# Encoders keep a quarter of 196 or 256 patches, decoders see all, each with a class token; 80 channels are ViT-H's.
SHAPES = [(tokens, dim) for tokens in (50, 65, 197, 257) for dim in (32, 64, 80)]
CASES = [("bfloat16", *shape) for shape in SHAPES] + [("float32", *shape) for shape in SHAPES]
if CUDA:
    # Encoders, decoders and unmasked encoders of ViT-B, L and H, and one small model; compiling takes the time. Nobody
    # trains in full precision there: two shapes, to know.
    SHAPES = [(50, 32), (50, 64), (65, 80), (197, 32), (197, 64), (257, 32), (257, 80)]
    CASES = [("bfloat16", *shape) for shape in SHAPES] + [("float32", 50, 64), ("float32", 197, 32)]
BATCH, HEADS = (128, 16) if CUDA else (8, 12)
KERNELS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CAN_USE = {
    "sdpa-flash": torch.backends.cuda.can_use_flash_attention,
    "sdpa-cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "sdpa-efficient": torch.backends.cuda.can_use_efficient_attention,
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
        if not CAN_USE[name](torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False)):
            return "PyTorch says that it does not take such tensors"
    return None


def attend(name: str, inputs: list[Tensor]) -> Tensor:
    """Attention by a competitor, of one packed tensor or of queries and packed keys and values."""
    attention = attention_qkvpacked if len(inputs) == 1 else attention_kvpacked
    with sdpa_kernel(KERNELS[name]) if name in KERNELS else nullcontext():
        return attention(*inputs, "sdpa" if name in KERNELS else name)


class Tiled(torch.autograd.Function):
    """Our kernels in tiles that are given; None means the default."""

    @staticmethod
    def forward(ctx, forward_tile, backward_tile, *inputs):
        out, lse = _attention_triton.forward(*_parts(inputs), forward_tile)
        ctx.save_for_backward(lse, *inputs)
        ctx.tile = backward_tile
        return out

    @staticmethod
    def backward(ctx, grad):
        lse, *inputs = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in inputs]
        _attention_triton.backward(grad, lse, *_parts(inputs), *_parts(grads), ctx.tile)
        return None, None, *grads


def _parts(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Queries, keys and values, of one packed tensor or of queries and packed keys and values."""
    return inputs[0].unbind(2) if len(inputs) == 1 else (inputs[0], *inputs[1].unbind(2))


def tiles(dtype: torch.dtype, tokens: int, dim: int, queries: int | None) -> tuple[list, list]:
    """Candidates for the forward and for the backward, the default first."""
    size = (queries or tokens, tokens)
    forward = _attention_triton.forward_tiles(*size, dtype.itemsize)
    return forward, _attention_triton.backward_tiles(*size, dim, dtype.itemsize)


def make_inputs(
    n: int, dtype: torch.dtype, tokens: int, dim: int, device: torch.device, queries: int | None = None,
    heads: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """One packed tensor, or queries and packed keys and values."""
    sizes = [(tokens, 3)] if queries is None else [(queries, 1), (tokens, 2)]
    made = [torch.randn(n, length, parts, heads or HEADS, dim, device=device).to(dtype) for length, parts in sizes]
    return [(x.squeeze(2) if x.shape[2] == 1 else x).requires_grad_() for x in made]


def build_tiles(
    dtype_name: str, tokens: int, dim: int, device: torch.device, queries: int | None, backward: bool
) -> Comparison:
    """Each tile of our kernels, forward alone or backward alone; there, the gradient of a bias both ways."""
    dtype = getattr(torch, dtype_name)
    inputs = make_inputs(BATCH, dtype, tokens, dim, device, queries)

    def competitor(tile) -> Competitor:
        if backward:
            return gradient(lambda: Tiled.apply(None, tile, *inputs), inputs)
        return torch.no_grad()(lambda: Tiled.apply(tile, None, *inputs))

    found = tiles(dtype, tokens, dim, queries)[backward]
    calls = {f"{t.queries} queries, {t.warps} warps, {t.stages} stages": competitor(t) for t in found}
    if backward and queries is None:
        (qkv,), bias = inputs, torch.randn(3 * HEADS * dim, device=device, requires_grad=True)
        ways = {
            "bias in the kernel": lambda: attention_qkvpacked(qkv, "triton", bias),
            "bias by a pass": lambda: attention_qkvpacked(AddedBias.apply(qkv, bias), "triton"),
        }
        calls |= {name: gradient(way, [qkv, bias]) for name, way in ways.items()}
    shape = f"{dtype_name} {f'{queries} of ' if queries else ''}{tokens} tokens of {dim}"
    return Comparison(f"attention tiles, {'backward' if backward else 'forward'}, {shape}", calls, seconds=0.2)


def build(dtype_name: str, tokens: int, dim: int, device: torch.device, queries: int | None = None) -> Comparison:
    """``queries``: only that many rows attend, to all tokens."""
    dtype, rows = getattr(torch, dtype_name), queries or tokens
    inputs = make_inputs(BATCH, dtype, tokens, dim, device, queries)
    grad = torch.randn(BATCH, rows, HEADS, dim, device=device).to(dtype)

    def step(function: Callable[[list[Tensor]], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(inputs), inputs, grad)

    calls = {}
    for name in COMPETITORS:
        reason = missing(name, device, dtype, tokens, dim)
        calls[name] = Unavailable(reason) if reason else step(partial(attend, name))
    heads = BATCH * HEADS
    return Comparison(
        f"attention, {dtype_name} {f'{queries} of ' if queries else ''}{tokens} tokens of {dim}",
        calls,
        # Forward q, k, v and the output; backward q, k, v, the output's gradient and three gradients.
        useful_bytes=heads * dim * (5 * rows + 6 * tokens) * dtype.itemsize,
        # Two products forward; backward the scores again, and four.
        flops=heads * 7 * 2 * rows * tokens * dim,
        dtype=dtype,
        seconds=0.2 if CUDA else 1.2,
    )


def facts(dtype: str, tokens: int, head_dim: int, device: torch.device) -> dict:
    """What ``choose_attention.py`` reads of a result."""
    key = device_key(device.type)
    return {"dtype": dtype, "tokens": tokens, "head_dim": head_dim, "device_key": key, "torch": torch.__version__}


@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def bench_attention(compete, benchmark, device, request, case, competitor):
    if device.type == "cpu" and case[0] == "bfloat16" and request.getfixturevalue("dtype") == torch.float32:
        pytest.skip("this CPU is faster in fp32")
    benchmark.extra_info.update(facts(*case, device))
    compete(build, *case, device)
