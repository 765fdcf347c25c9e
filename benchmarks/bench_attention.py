"""Attention at the lengths of a masked autoencoder: each backend, forward and backward, from one packed projection.

``sdpa`` is PyTorch's own choice among its kernels; ``sdpa-flash``, ``sdpa-cudnn`` and ``sdpa-efficient`` are those
kernels by name. ``choose_attention.py`` makes from the result what ``backend="auto"`` picks.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contest import Contest, Unavailable
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmae.ops import _attention_triton, _xformers, attention_qkvpacked
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


def named_kernel(kernel: SDPBackend, qkv: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return attention_qkvpacked(qkv, "sdpa")


def build(dtype_name: str, tokens: int, dim: int, device: torch.device) -> Contest:
    dtype = getattr(torch, dtype_name)
    qkv = torch.randn(BATCH, tokens, 3, HEADS, dim, device=device).to(dtype).requires_grad_()
    grad = torch.randn(BATCH, tokens, HEADS, dim, device=device).to(dtype)

    def step(attend: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(qkv), qkv, grad)

    calls = {}
    for name in COMPETITORS:
        if reason := missing(name, device, dtype, tokens, dim):
            calls[name] = Unavailable(reason)
        elif name in KERNELS:
            calls[name] = step(lambda x, kernel=KERNELS[name]: named_kernel(kernel, x))
        else:
            calls[name] = step(lambda x, name=name: attention_qkvpacked(x, name))
    heads, row = BATCH * HEADS, tokens * dim
    return Contest(
        f"attention, {dtype_name} {tokens} tokens of {dim}",
        calls,
        # Forward q, k, v and the output; backward q, k, v, the output's gradient and three gradients.
        useful_bytes=heads * row * 11 * dtype.itemsize,
        # Two products forward; backward the scores again, and four.
        flops=heads * 7 * 2 * tokens * row,
        dtype=dtype,
        seconds=0.2 if CUDA else 1.2,
    )


@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def bench_attention(compete, benchmark, device, request, case, competitor):
    if device.type == "cpu" and case[0] == "bfloat16" and request.getfixturevalue("dtype") == torch.float32:
        pytest.skip("this CPU is faster in fp32")
    dtype, tokens, head_dim = case
    benchmark.extra_info.update(
        dtype=dtype, tokens=tokens, head_dim=head_dim, device_key=device_key(device.type), torch=torch.__version__
    )
    compete(build, *case, device)
