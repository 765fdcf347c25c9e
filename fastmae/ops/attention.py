"""Unmasked multi-head attention for short sequences, with the implementation chosen per shape, dtype and device.

Masked autoencoders attend over 50 to 257 tokens, where the library kernels that win on long sequences often lose. Four
backends, all differentiable and usable inside ``torch.compile(fullgraph=True)``:

``plain``     softmax over the whole score matrix, in batched products, with one packed gradient.
``sdpa``      ``torch.nn.functional.scaled_dot_product_attention``.
``triton``    a head's keys and values in one tile, one packed gradient; at most 257 keys (float64 is not taken).
``xformers``  ``xformers.ops.memory_efficient_attention``, where its CUDA operators load.

``auto`` takes the fastest of them in a table that was measured (:mod:`fastmae.ops._attention_choice`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmae.ops import _attention_plain, _attention_triton, _xformers
from fastmae.ops._attention_autograd import AddedBias
from fastmae.ops._attention_choice import choose_backend, describe_choices
from fastmae.ops._check import check
from fastmae.ops._linear import check_vector

BACKENDS = ("auto", "plain", "sdpa", "triton", "xformers")

__all__ = ["BACKENDS", "attention", "attention_kvpacked", "attention_qkvpacked", "choose_backend", "describe_backends"]


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Scaled dot-product attention, ``softmax(q k^T / sqrt(Dh)) v`` for each head.

    Args:
        q: queries (N, Lq, H, Dh), floating point, any strides.
        k, v: keys and values (N, Lk, H, Dh), of q's dtype and device. Lq and Lk may differ.
        backend: ``"auto"``, ``"plain"``, ``"sdpa"``, ``"triton"`` or ``"xformers"``. A backend that is named is used or
            refused, never replaced.

    Returns:
        (N, Lq, H, Dh), q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that is unknown or cannot run here.
    """
    _check_qkv(q, k, v)
    chosen = _resolve(backend, q, k.shape[1])
    if chosen == "plain":
        return _attention_plain.plain_attention(q, k, v)[0]
    if chosen == "triton":
        return _attention_triton.triton_attention(q, k, v)[0]
    return _library(chosen, q, k, v)


def attention_kvpacked(q: Tensor, kv: Tensor, backend: str = "auto", bias: Tensor | None = None) -> Tensor:
    """Attention to keys and values from one fused projection, of some of the tokens or of others.

    The plain and the Triton backend write the gradient of ``kv`` once, as one tensor; the others let autograd stack
    two.

    Args:
        q: queries (N, Lq, H, Dh), floating point, any strides.
        kv: keys and values (N, Lk, 2, H, Dh), of q's dtype and device.
        backend: as in :func:`attention`.
        bias: as in :func:`attention_qkvpacked`: its first third is in q already, the rest in kv.

    Returns:
        (N, Lq, H, Dh), q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that is unknown or cannot run here.
    """
    fits = isinstance(kv, Tensor) and kv.ndim == 5 and kv.shape[2] == 2 and kv.is_floating_point()
    check(fits, "kv", "a floating-point tensor of shape (N, L, 2, H, Dh)", kv)
    _check_qkv(q, *kv.unbind(2))
    chosen = _resolve(backend, q, kv.shape[1])
    dim = q.shape[2] * q.shape[3]
    check_vector("bias", bias, 3 * dim, q.device)
    if chosen == "triton":
        return _attention_triton.triton_attention_kvpacked(q, kv, bias)[0]
    if bias is not None:
        q, kv = AddedBias.apply(q, bias[:dim]), AddedBias.apply(kv, bias[dim:])
    if chosen == "plain":
        return _attention_plain.plain_attention_kvpacked(q, kv)[0]
    return _library(chosen, q, *kv.unbind(2))


def attention_qkvpacked(qkv: Tensor, backend: str = "auto", bias: Tensor | None = None) -> Tensor:
    """Self-attention on the output of one fused projection.

    The plain and the Triton backend write the gradient of ``qkv`` once, as one tensor; the others let autograd stack
    three.

    Args:
        qkv: (N, L, 3, H, Dh), floating point.
        backend: as in :func:`attention`.
        bias: floating point (3 * H * Dh,), the projection's bias. It is part of ``qkv`` already (added without a
            gradient, ``F.linear(x, weight, bias.detach())``) and not added again: only its gradient is computed here,
            the sum of qkv's over N and L. The Triton backend takes it along in its backward, without reading that
            gradient again; the keys' third, zero but for rounding, is exactly zero there.

    Returns:
        (N, L, H, Dh), qkv's dtype.

    Raises:
        ValueError: a shape or dtype that does not fit, or a backend that is unknown or cannot run here.
    """
    check(isinstance(qkv, Tensor), "qkv", "a tensor (N, L, 3, H, Dh)", qkv)
    fits = qkv.ndim == 5 and qkv.shape[2] == 3 and qkv.is_floating_point()
    check(fits, "qkv", "a floating-point tensor of shape (N, L, 3, H, Dh)", qkv)
    chosen = _resolve(backend, qkv, qkv.shape[1])
    check_vector("bias", bias, 3 * qkv.shape[3] * qkv.shape[4], qkv.device)
    if chosen == "triton":
        return _attention_triton.triton_attention_qkvpacked(qkv, bias)[0]
    if bias is not None:
        qkv = AddedBias.apply(qkv, bias)
    if chosen == "plain":
        return _attention_plain.plain_attention_qkvpacked(qkv)[0]
    return _library(chosen, *qkv.unbind(2))


def describe_backends() -> list[tuple[str, str]]:
    """Lines for a report: each backend with whether it can be used, then what ``"auto"`` picks and why."""
    rows = [
        ("plain", "available"),
        ("sdpa", "available"),
        ("triton", _attention_triton.status()),
        ("xformers", _xformers.status()),
    ]
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        rows += describe_choices(device)
    return rows


def _resolve(backend: str, q: Tensor, num_keys: int) -> str:
    check(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", backend)
    if backend == "auto":
        return choose_backend(q.device.type, q.dtype, num_keys, q.shape[-1]).backend
    if backend == "xformers":
        _xformers.require(q.device)
    if backend == "triton":
        why = _attention_triton.unfit(q.dtype, num_keys, q.shape[-1])
        if why is not None:
            raise ValueError(f"backend: 'triton' {why}")
    return backend


def _library(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if backend == "xformers":
        return _xformers.attend(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        fits = isinstance(tensor, Tensor) and tensor.ndim == 4 and tensor.is_floating_point()
        check(fits, name, "a floating-point tensor of shape (N, L, H, Dh)", tensor)
    n, _, heads, dim = q.shape
    for name, tensor in (("k", k), ("v", v)):
        fits = (tensor.shape[0], *tensor.shape[2:]) == (n, heads, dim) and tensor.shape[1] == k.shape[1]
        fits = fits and tensor.dtype == q.dtype and tensor.device == q.device
        if not fits:
            # Formatted here and not before: under torch.compile a size in a string becomes a constant of the graph.
            check(False, name, f"(N, Lk, H, Dh) to fit q, {q.dtype} {tuple(q.shape)} on {q.device}", tensor)
