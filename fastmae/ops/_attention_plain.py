"""The plain backend of attention: softmax over the whole score matrix, in batched products.

One copy puts every head's rows together, so that the products are plain batched ones; it is saved with the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(N, H, L, D) each, any strides: output (N, L, H, D), weights (N*H, Lq, Lk)."""
    n, heads, length, dim = q.shape
    q, k, v = (x.reshape(n * heads, -1, dim) for x in (q, k, v))
    # Low-level softmax: it keeps the dtype (statistics in fp32) whatever autocast is active around the op.
    scores = torch.baddbmm(q.new_zeros(1), q, k.transpose(1, 2), beta=0, alpha=dim**-0.5)
    weights = _aten._softmax(scores, -1, False)
    out = torch.bmm(weights, v).view(n, heads, length, dim).permute(0, 2, 1, 3)
    return out.clone(memory_format=torch.contiguous_format), weights


def _backward(
    grad: Tensor, weights: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Inputs and their gradients, which are written, as (N, H, L, D), the gradients contiguous."""
    n, heads, _, dim = q.shape
    grad, q, k, v = (x.reshape(n * heads, -1, dim) for x in (grad.permute(0, 2, 1, 3), q, k, v))
    dq, dk, dv = (x.view(n * heads, -1, dim) for x in (dq, dk, dv))
    torch.bmm(weights.transpose(1, 2), grad, out=dv)
    grad_weights = torch.bmm(grad, v.transpose(1, 2))
    grad_scores = _aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    scale, none = dim**-0.5, q.new_zeros(1)
    torch.baddbmm(none, grad_scores, k, beta=0, alpha=scale, out=dq)
    torch.baddbmm(none, grad_scores.transpose(1, 2), q, beta=0, alpha=scale, out=dk)


def _heads_first(x: Tensor) -> Tensor:
    """(N, L, H, D) to (N, H, L, D), (N, L, P, H, D) to (P, N, H, L, D), copied."""
    x = x.transpose(1, 2) if x.ndim == 4 else x.permute(2, 0, 3, 1, 4)
    return x.clone(memory_format=torch.contiguous_format)


def _tokens_first(x: Tensor) -> Tensor:
    """The way back."""
    x = x.transpose(1, 2) if x.ndim == 4 else x.permute(1, 3, 0, 2, 4)
    return x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("fastmae::plain_attention", mutates_args=())
def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (N, Lq, H, Dh), and for the backward the weights (N*H, Lq, Lk) and q, k, v as (N, H, L, Dh)."""
    first = tuple(_heads_first(x) for x in (q, k, v))
    return *_forward(*first), *first


@torch.library.custom_op("fastmae::plain_attention_backward", mutates_args=())
def plain_attention_backward(
    grad: Tensor, weights: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    _backward(grad, weights, q, k, v, *grads)
    dq, dk, dv = (_tokens_first(x) for x in grads)
    return dq, dk, dv


@torch.library.custom_op("fastmae::plain_attention_qkvpacked", mutates_args=())
def plain_attention_qkvpacked(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output (N, L, H, Dh), and for the backward the weights (N*H, L, L) and qkv as (3, N, H, L, Dh)."""
    first = _heads_first(qkv)
    return *_forward(*first), first


@torch.library.custom_op("fastmae::plain_attention_qkvpacked_backward", mutates_args=())
def plain_attention_qkvpacked_backward(grad: Tensor, weights: Tensor, heads_first: Tensor) -> Tensor:
    packed = torch.empty_like(heads_first)
    _backward(grad, weights, *heads_first, *packed)
    return _tokens_first(packed)


@torch.library.custom_op("fastmae::plain_attention_kvpacked", mutates_args=())
def plain_attention_kvpacked(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (N, Lq, H, Dh), and for the backward the weights and q and kv as (N, H, Lq, Dh) and (2, N, H, Lk, Dh)."""
    q, kv = _heads_first(q), _heads_first(kv)
    return *_forward(q, *kv), q, kv


@torch.library.custom_op("fastmae::plain_attention_kvpacked_backward", mutates_args=())
def plain_attention_kvpacked_backward(grad: Tensor, weights: Tensor, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    dq, dkv = torch.empty_like(q), torch.empty_like(kv)
    _backward(grad, weights, q, *kv, dq, *dkv)
    return _tokens_first(dq), _tokens_first(dkv)


def _fake_first(x: Tensor) -> Tensor:
    return x.new_empty([x.shape[i] for i in ((0, 2, 1, 3) if x.ndim == 4 else (2, 0, 3, 1, 4))])


def _fake_tokens(x: Tensor) -> Tensor:
    return x.new_empty([x.shape[i] for i in ((0, 2, 1, 3) if x.ndim == 4 else (1, 3, 0, 2, 4))])


def _fake_forward(n: int, queries: int, keys: int, heads: int, like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_empty(n, queries, heads, like.shape[-1]), like.new_empty(n * heads, queries, keys)


@plain_attention.register_fake
def _(q, k, v):
    out = _fake_forward(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q)
    return *out, *(_fake_first(x) for x in (q, k, v))


@plain_attention_qkvpacked.register_fake
def _(qkv):
    n, length, _, heads, _ = qkv.shape
    return *_fake_forward(n, length, length, heads, qkv), _fake_first(qkv)


@plain_attention_kvpacked.register_fake
def _(q, kv):
    return *_fake_forward(q.shape[0], q.shape[1], kv.shape[1], q.shape[2], q), _fake_first(q), _fake_first(kv)


plain_attention_backward.register_fake(lambda grad, weights, *first: tuple(_fake_tokens(x) for x in first))
plain_attention_kvpacked_backward.register_fake(lambda grad, weights, *first: tuple(_fake_tokens(x) for x in first))
plain_attention_qkvpacked_backward.register_fake(lambda grad, weights, first: _fake_tokens(first))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])


plain_attention.register_autograd(
    lambda ctx, grad, *_: plain_attention_backward(grad, *ctx.saved_tensors), setup_context=_save
)
plain_attention_qkvpacked.register_autograd(
    lambda ctx, grad, *_: plain_attention_qkvpacked_backward(grad, *ctx.saved_tensors), setup_context=_save
)
plain_attention_kvpacked.register_autograd(
    lambda ctx, grad, *_: plain_attention_kvpacked_backward(grad, *ctx.saved_tensors), setup_context=_save
)
