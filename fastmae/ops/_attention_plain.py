"""The plain backend of attention: softmax over the whole score matrix, in batched products.

On the CPU a few samples at a time, so that the score matrix and all that is made of it stay in the cache between one
product and the next: at 197 tokens and more that is a third to a half of the time. Saved for the backward are the
inputs and the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmae.ops._attention_autograd import differentiate

_aten = torch.ops.aten
_CACHE_BYTES = 1 << 20
"""Of scores for each thread: a core's level 2 cache on the machines of today."""


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(N, L, H, D) each, any strides: output (N, Lq, H, D), weights (N*H, Lq, Lk)."""
    n, queries, heads, dim = q.shape
    out, none = q.new_empty(n, queries, heads, dim), q.new_zeros(1)
    weights = q.new_empty(n * heads, queries, k.shape[1])
    for part, rows in _parts(q, weights):
        b_q, b_k, b_v = (_heads_first(x[part]) for x in (q, k, v))
        scores = torch.baddbmm(none, b_q, b_k.transpose(1, 2), beta=0, alpha=dim**-0.5)
        # Low-level softmax: it keeps the dtype (statistics in fp32) whatever autocast is active around the op.
        _aten._softmax.out(scores, -1, False, out=weights[rows])
        _put(out[part], torch.bmm(weights[rows], b_v))
    return out, weights


def _backward(
    grad: Tensor, weights: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Writes dq, dk and dv, of the shapes of q, k and v, any strides."""
    scale, none = q.shape[-1] ** -0.5, q.new_zeros(1)
    for part, rows in _parts(q, weights):
        b_grad, b_q, b_k, b_v = (_heads_first(x[part]) for x in (grad, q, k, v))
        b_weights = weights[rows]
        _put(dv[part], torch.bmm(b_weights.transpose(1, 2), b_grad))
        grad_weights = torch.bmm(b_grad, b_v.transpose(1, 2))
        grad_scores = _aten._softmax_backward_data(grad_weights, b_weights, -1, b_weights.dtype)
        _put(dq[part], torch.baddbmm(none, grad_scores, b_k, beta=0, alpha=scale))
        _put(dk[part], torch.baddbmm(none, grad_scores.transpose(1, 2), b_q, beta=0, alpha=scale))


def _parts(q: Tensor, weights: Tensor) -> Iterator[tuple[tuple[slice, ...], slice]]:
    """Pieces of (N, L, H, D), each with its rows of the weights: several samples, or some heads of one."""
    n, _, heads, _ = q.shape
    samples, some = max(n, 1), heads
    if q.device.type == "cpu" and n:
        head = weights.shape[1] * weights.shape[2] * weights.element_size()
        limit = _CACHE_BYTES * torch.get_num_threads()
        # Equal parts, and none where two would do: a small rest costs its calls and gains nothing.
        parts = n * heads * head // (2 * limit) + 1
        samples = -(-n // min(parts, n))
        if head * heads >= 2 * limit:
            some = max(1, limit // head)
    for i in range(0, n, samples):
        for j in range(0, heads, some):
            many, last = min(samples, n - i), min(j + some, heads)
            yield (slice(i, i + many), slice(None), slice(j, last)), slice(i * heads + j, (i + many - 1) * heads + last)


def _heads_first(x: Tensor) -> Tensor:
    """(N, L, H, D) to (N*H, L, D): every head's rows together, so that the products are plain batched ones."""
    n, length, heads, dim = x.shape
    return x.transpose(1, 2).reshape(n * heads, length, dim)


def _put(target: Tensor, x: Tensor) -> None:
    """The way back, into a view."""
    n, length, heads, dim = target.shape
    target.copy_(x.view(n, heads, length, dim).transpose(1, 2))


@torch.library.custom_op("fastmae::plain_attention", mutates_args=())
def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output (N, Lq, H, Dh), and for the backward the weights (N*H, Lq, Lk)."""
    return _forward(q, k, v)


@torch.library.custom_op("fastmae::plain_attention_backward", mutates_args=())
def plain_attention_backward(
    grad: Tensor, weights: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    _backward(grad, weights, q, k, v, dq, dk, dv)
    return dq, dk, dv


@torch.library.custom_op("fastmae::plain_attention_qkvpacked", mutates_args=())
def plain_attention_qkvpacked(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`plain_attention`, from (N, L, 3, H, Dh)."""
    return _forward(*qkv.unbind(2))


@torch.library.custom_op("fastmae::plain_attention_qkvpacked_backward", mutates_args=())
def plain_attention_qkvpacked_backward(grad: Tensor, weights: Tensor, qkv: Tensor) -> Tensor:
    packed = qkv.new_empty(qkv.shape)
    _backward(grad, weights, *qkv.unbind(2), *packed.unbind(2))
    return packed


@torch.library.custom_op("fastmae::plain_attention_kvpacked", mutates_args=())
def plain_attention_kvpacked(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`plain_attention`, with keys and values from (N, Lk, 2, H, Dh)."""
    return _forward(q, *kv.unbind(2))


@torch.library.custom_op("fastmae::plain_attention_kvpacked_backward", mutates_args=())
def plain_attention_kvpacked_backward(grad: Tensor, weights: Tensor, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    dq, dkv = q.new_empty(q.shape), kv.new_empty(kv.shape)
    _backward(grad, weights, q, *kv.unbind(2), dq, *dkv.unbind(2))
    return dq, dkv


def _fake_forward(n: int, queries: int, keys: int, heads: int, like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_empty(n, queries, heads, like.shape[-1]), like.new_empty(n * heads, queries, keys)


plain_attention.register_fake(lambda q, k, v: _fake_forward(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q))
plain_attention_kvpacked.register_fake(lambda q, kv: _fake_forward(q.shape[0], q.shape[1], kv.shape[1], q.shape[2], q))
plain_attention_qkvpacked.register_fake(
    lambda qkv: _fake_forward(qkv.shape[0], qkv.shape[1], qkv.shape[1], qkv.shape[3], qkv)
)
plain_attention_backward.register_fake(lambda grad, weights, *inputs: tuple(x.new_empty(x.shape) for x in inputs))
plain_attention_kvpacked_backward.register_fake(
    lambda grad, weights, *inputs: tuple(x.new_empty(x.shape) for x in inputs)
)
plain_attention_qkvpacked_backward.register_fake(lambda grad, weights, qkv: qkv.new_empty(qkv.shape))


differentiate(plain_attention, plain_attention_backward)
differentiate(plain_attention_qkvpacked, plain_attention_qkvpacked_backward)
differentiate(plain_attention_kvpacked, plain_attention_kvpacked_backward)
