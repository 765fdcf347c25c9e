"""Unmasked multi-head attention for short sequences, with the implementation chosen per shape, dtype and device.

Masked autoencoders attend over 50 to 200 tokens, where the library kernels that win on long sequences often lose. Three
backends, all differentiable and usable inside ``torch.compile(fullgraph=True)``:

``plain``     softmax over the whole score matrix; the packed form has a backward of its own that writes one gradient.
``sdpa``      ``torch.nn.functional.scaled_dot_product_attention``.
``xformers``  ``xformers.ops.memory_efficient_attention``, where its CUDA operators load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmae.ops import _xformers
from fastmae.ops._check import check

BACKENDS = ("auto", "plain", "sdpa", "xformers")

# Above this many keys the fp32 score matrix costs a CPU more than the blocked kernel does (forward + backward, one
# interleaved run on AVX-512 cores: equal at 50 to 65 tokens, 0.7x to 0.85x at 197).
_CPU_PLAIN_FP32_KEYS = 64

_aten = torch.ops.aten


def choose_backend(device_type: str, dtype: torch.dtype, num_keys: int) -> tuple[str, str]:
    """What ``"auto"`` means for these tensors: the backend's name, and why."""
    if device_type != "cpu":
        return "sdpa", "PyTorch picks among its fused kernels; no measurement here says otherwise yet"
    if dtype in (torch.bfloat16, torch.float16):
        return "plain", "the CPU's half-precision SDPA is slower at these lengths (benchmarks/bench_attention.py)"
    if num_keys <= _CPU_PLAIN_FP32_KEYS:
        return "plain", f"at most {_CPU_PLAIN_FP32_KEYS} keys: as fast as SDPA, and one packed gradient"
    return "sdpa", f"more than {_CPU_PLAIN_FP32_KEYS} keys in full precision"


def _resolve(backend: str, x: Tensor, num_keys: int) -> str:
    check(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", backend)
    if backend == "auto":
        return choose_backend(x.device.type, x.dtype, num_keys)[0]
    if backend == "xformers":
        _xformers.require(x.device)
    return backend


def describe_backends() -> list[tuple[str, str]]:
    """Lines for a report: each backend with whether it can be used, then what ``"auto"`` picks and why."""
    rows = [("plain", "available"), ("sdpa", "available"), ("xformers", _xformers.status())]
    cases = [("cpu", torch.bfloat16, 197), ("cpu", torch.float32, 50), ("cpu", torch.float32, 197)]
    if torch.cuda.is_available():
        cases.append(("cuda", torch.bfloat16, 197))
    for device, dtype, keys in cases:
        name, reason = choose_backend(device, dtype, keys)
        rows.append((f"auto, {device}, {str(dtype).removeprefix('torch.')}, {keys} tokens", f"{name}: {reason}"))
    return rows


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Scaled dot-product attention, ``softmax(q k^T / sqrt(Dh)) v`` for each head.

    Args:
        q: queries (N, Lq, H, Dh), floating point, any strides.
        k, v: keys and values (N, Lk, H, Dh), of q's dtype and device. Lq and Lk may differ.
        backend: ``"auto"``, ``"plain"``, ``"sdpa"`` or ``"xformers"``. A backend that is named is used or refused,
            never replaced.

    Returns:
        (N, Lq, H, Dh), q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that is unknown or cannot run here.
    """
    _check_qkv(q, k, v)
    chosen = _resolve(backend, q, k.shape[1])
    if chosen == "xformers":
        return _xformers.attend(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if chosen == "sdpa":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    weights = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)).softmax(dim=-1).to(v.dtype)
    return torch.matmul(weights, v).transpose(1, 2)


def attention_qkvpacked(qkv: Tensor, backend: str = "auto") -> Tensor:
    """Self-attention on the output of one fused projection.

    With the plain backend the gradient of ``qkv`` is written once, as one tensor; the others let autograd stack three.

    Args:
        qkv: (N, L, 3, H, Dh), floating point.
        backend: as in :func:`attention`.

    Returns:
        (N, L, H, Dh), qkv's dtype.

    Raises:
        ValueError: a shape or dtype that does not fit, or a backend that is unknown or cannot run here.
    """
    check(isinstance(qkv, Tensor), "qkv", "a tensor (N, L, 3, H, Dh)", qkv)
    fits = qkv.ndim == 5 and qkv.shape[2] == 3 and qkv.is_floating_point()
    check(fits, "qkv", "a floating-point tensor of shape (N, L, 3, H, Dh)", qkv)
    if _resolve(backend, qkv, qkv.shape[1]) == "plain":
        return _plain_qkvpacked(qkv)[0]
    return attention(*qkv.unbind(2), backend=backend)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        fits = isinstance(tensor, Tensor) and tensor.ndim == 4 and tensor.is_floating_point()
        check(fits, name, "a floating-point tensor of shape (N, L, H, Dh)", tensor)
    n, _, heads, dim = q.shape
    for name, tensor in (("k", k), ("v", v)):
        fits = (tensor.shape[0], *tensor.shape[2:]) == (n, heads, dim) and tensor.shape[1] == k.shape[1]
        fits = fits and tensor.dtype == q.dtype and tensor.device == q.device
        check(fits, name, f"(N, Lk, H, Dh) to fit q, {q.dtype} {tuple(q.shape)} on {q.device}", tensor)


@torch.library.custom_op("fastmae::plain_attention_qkvpacked", mutates_args=())
def _plain_qkvpacked(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output (N, L, H, Dh), and for the backward the weights (N*H, L, L) and qkv as (3, N*H, L, Dh)."""
    n, length, _, heads, dim = qkv.shape
    # One copy puts every head's rows together, so that the four products below are plain batched ones.
    heads_first = qkv.permute(2, 0, 3, 1, 4).clone(memory_format=torch.contiguous_format)
    heads_first = heads_first.view(3, n * heads, length, dim)
    q, k, v = heads_first
    # Low-level softmax: it keeps the dtype (statistics in fp32) whatever autocast is active around the op.
    scores = torch.baddbmm(q.new_zeros(1), q, k.transpose(1, 2), beta=0, alpha=dim**-0.5)
    weights = _aten._softmax(scores, -1, False)
    out = torch.bmm(weights, v).view(n, heads, length, dim).permute(0, 2, 1, 3)
    return out.clone(memory_format=torch.contiguous_format), weights, heads_first


@_plain_qkvpacked.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, length, _, heads, dim = qkv.shape
    return (
        qkv.new_empty(n, length, heads, dim),
        qkv.new_empty(n * heads, length, length),
        qkv.new_empty(3, n * heads, length, dim),
    )


@torch.library.custom_op("fastmae::plain_attention_qkvpacked_backward", mutates_args=())
def _plain_qkvpacked_backward(grad: Tensor, weights: Tensor, heads_first: Tensor) -> Tensor:
    n, length, heads, dim = grad.shape
    q, k, v = heads_first
    grad = grad.permute(0, 2, 1, 3).reshape(n * heads, length, dim)
    packed = torch.empty_like(heads_first)
    torch.bmm(weights.transpose(1, 2), grad, out=packed[2])
    grad_weights = torch.bmm(grad, v.transpose(1, 2))
    grad_scores = _aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    scale, none = dim**-0.5, q.new_zeros(1)
    torch.baddbmm(none, grad_scores, k, beta=0, alpha=scale, out=packed[0])
    torch.baddbmm(none, grad_scores.transpose(1, 2), q, beta=0, alpha=scale, out=packed[1])
    packed = packed.view(3, n, heads, length, dim).permute(1, 3, 0, 2, 4)
    return packed.clone(memory_format=torch.contiguous_format)


@_plain_qkvpacked_backward.register_fake
def _(grad: Tensor, weights: Tensor, heads_first: Tensor) -> Tensor:
    n, length, heads, dim = grad.shape
    return grad.new_empty(n, length, 3, heads, dim)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], output[2])


def _backward(ctx, grad: Tensor, _grad_weights, _grad_heads_first) -> Tensor:
    return _plain_qkvpacked_backward(grad, *ctx.saved_tensors)


_plain_qkvpacked.register_autograd(_backward, setup_context=_save)
