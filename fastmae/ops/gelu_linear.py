"""Bias, exact GELU and matrix product as one differentiable step that saves what came before the bias, no more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmae.ops._check import check, check_floating
from fastmae.ops._dispatch import fuses, load_kernels, takes_triton
from fastmae.ops._linear import (
    bias_gradient,
    check_vector,
    check_weight,
    chunk_rows,
    compute_dtype,
    linear,
    operand,
    weight_gradient,
)

_kernels = load_kernels("gelu_linear")


def gelu_linear(
    h: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    out_bias: Tensor | None = None,
    *,
    weight_cast: Tensor | None = None,
    wanted: bool = True,
) -> Tensor:
    """The second half of an MLP, ``GELU(h + bias) @ weight.T + out_bias``, with the exact (erf) GELU.

    ``h`` is the first product, its bias left to this op. Bias, activation and rounding are one pass. For the backward
    only h is kept: the activated values are made again in the pass that computes the gradient of h and the column sum
    for bias; no product is computed twice. Where no kernel runs (on the CPU, in float64) it is the composition of
    PyTorch's operators, which autograd differentiates.

    Args:
        h: (..., F), floating point.
        bias: (F,) or None.
        weight: (D, F). out_bias: (D,) or None.
        weight_cast: a copy of weight in the compute dtype, so that it need not be cast; no gradient flows to it.
        wanted: False where only what the op keeps for its backward is: where a kernel runs, the result is not written.

    Returns:
        (..., D) in the compute dtype: autocast's where active, else the weight's. The kernel computes in float32.
        Differentiable once where it runs.

    Raises:
        ValueError: on a wrong shape, dtype or device.
    """
    check_floating("h", h, "a floating point tensor of shape (..., F)")
    check(h.ndim >= 2 and h.shape[-1] > 0, "h", "shape (..., F), F >= 1", h)
    check_vector("bias", bias, h.shape[-1], h.device)
    check_weight("weight", weight, weight_cast, h.shape[-1], h.device)
    check_vector("out_bias", out_bias, weight.shape[0], h.device)
    dtype = compute_dtype(h, weight)
    if not fuses(h, _kernels):
        h = h if bias is None else (h + bias).to(h.dtype)
        return linear(F.gelu(h), weight, out_bias)
    return _gelu_linear(h, bias, weight, out_bias, weight_cast, dtype, wanted)


@torch.library.custom_op("fastmae::gelu_linear", mutates_args=())
def _gelu_linear(
    h: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    out_bias: Tensor | None,
    weight_cast: Tensor | None,
    dtype: torch.dtype,
    wanted: bool = True,
) -> Tensor:
    if not wanted:
        return h.new_empty(*h.shape[:-1], weight.shape[0], dtype=dtype)
    activated = _bias_gelu(h, bias, dtype)
    out_bias = None if out_bias is None else out_bias.to(dtype)
    return F.linear(activated, operand(weight, weight_cast, dtype), out_bias)


@_gelu_linear.register_fake
def _(h, bias, weight, out_bias, weight_cast, dtype, wanted=True):
    return h.new_empty(*h.shape[:-1], weight.shape[0], dtype=dtype)


@torch.library.custom_op("fastmae::gelu_linear_backward", mutates_args=())
def _gelu_linear_backward(
    grad: Tensor,
    h: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    weight_dtype: torch.dtype,
    out_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, of bias (empty without one), of the weight and of out_bias (empty without one)."""
    rows = grad.reshape(-1, grad.shape[-1])
    grad_activated = rows @ weight.to(rows.dtype)
    grad_h, activated, grad_bias = _bias_gelu_backward(grad_activated, h.reshape(grad_activated.shape), bias)
    grad_weight = weight_gradient(rows, activated, weight_dtype)
    grad_out_bias = rows.new_empty(0) if out_bias_dtype is None else bias_gradient(rows, out_bias_dtype)
    return grad_h.view(h.shape), grad_bias, grad_weight, grad_out_bias


@_gelu_linear_backward.register_fake
def _(grad, h, bias, weight, weight_dtype, out_bias_dtype):
    grad_bias = h.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    out_bias = grad.new_empty(0) if out_bias_dtype is None else grad.new_empty(grad.shape[-1], dtype=out_bias_dtype)
    return h.new_empty(h.shape), grad_bias, weight.new_empty(weight.shape, dtype=weight_dtype), out_bias


def _setup_context(ctx, inputs, output):
    h, bias, weight, out_bias, weight_cast, *_ = inputs
    ctx.save_for_backward(h, bias, weight if weight_cast is None else weight_cast)
    ctx.dtypes = weight.dtype, None if out_bias is None else out_bias.dtype


def _backward(ctx, grad):
    h, bias, weight = ctx.saved_tensors
    grad_h, grad_bias, grad_weight, grad_out_bias = _gelu_linear_backward(grad, h, bias, weight, *ctx.dtypes)
    grad_bias = None if bias is None else grad_bias
    return grad_h, grad_bias, grad_weight, None if ctx.dtypes[1] is None else grad_out_bias, None, None, None


_gelu_linear.register_autograd(_backward, setup_context=_setup_context)


def _runs_triton(h: Tensor) -> bool:
    """Double precision is for checking gradients, not for training: it has no kernel."""
    return takes_triton(h, _kernels) and h.dtype != torch.float64


def _bias_gelu(h: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``GELU(h + bias)`` in ``dtype``."""
    if not _runs_triton(h):
        return F.gelu(_with_bias(h, bias, dtype))
    h, bias = h.contiguous(), None if bias is None else bias.contiguous()
    out = torch.empty_like(h, dtype=dtype)
    size = h.shape[-1]
    rows = h.numel() // size
    block, tile = _tile(size, 4096)
    with torch.cuda.device_of(h):
        _kernels.bias_gelu_fwd_kernel[(-(-rows // tile), -(-size // block))](
            out, h, bias, rows, F=size, ROWS=tile, BLOCK_F=block, num_warps=4
        )
    return out


def _bias_gelu_backward(grad: Tensor, h: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """From rows (R, F): gradient of h, ``GELU(h + bias)`` in the gradient's dtype, gradient of bias (or empty)."""
    rows, size = h.shape
    h, grad, bias = h.contiguous(), grad.contiguous(), None if bias is None else bias.contiguous()
    if not _runs_triton(h):
        x = _with_bias(h, bias, grad.dtype)
        grad_h = torch.ops.aten.gelu_backward(grad, x).to(h.dtype)
        return grad_h, F.gelu(x), h.new_empty(0) if bias is None else bias_gradient(grad_h, bias.dtype)
    grad_h, activated = torch.empty_like(h), torch.empty_like(grad)
    chunk = chunk_rows(rows)
    block, tile = _tile(size, 2048)
    tile = min(tile, chunk)
    shape = (-(-rows // chunk), size)
    partial = None if bias is None else torch.empty(shape, dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):
        _kernels.bias_gelu_bwd_kernel[(shape[0], -(-size // block))](
            grad_h, activated, partial, grad, h, bias, rows, chunk, F=size, ROWS=tile, BLOCK_F=block, num_warps=4
        )
    return grad_h, activated, h.new_empty(0) if bias is None else partial.sum(0).to(bias.dtype)


def _with_bias(h: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In the compute dtype: PyTorch's GELU is vectorised for bfloat16 on the CPU, many times faster than float32's."""
    return (h if bias is None else h + bias.to(h.dtype)).to(dtype)


def _tile(size: int, values: int) -> tuple[int, int]:
    """BLOCK_F and rows of a program of four warps, ``values`` values; columns divide the width if they can."""
    divisor = min(size & -size, 1024)
    block = divisor if divisor >= 128 else min(max(16, 1 << (size - 1).bit_length()), 1024)
    return block, max(1, values // block)
