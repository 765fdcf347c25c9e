"""Residual add, LayerNorm and matrix product as one differentiable step that saves the residual stream, no more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmae.ops._add_norm import add_norm, add_norm_backward
from fastmae.ops._check import check, check_floating
from fastmae.ops._dispatch import fuses, load_kernels
from fastmae.ops._linear import (
    bias_gradient,
    check_vector,
    check_weight,
    compute_dtype,
    linear,
    operand,
    weight_gradient,
)

_kernels = load_kernels("norm_linear")


def norm_linear(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_cast: Tensor | None = None,
    bias_cast: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The step from one product of a pre-norm Transformer to the next::

        x_new = x + branch + branch_bias
        out = LayerNorm(x_new) @ weight.T + bias

    ``branch`` is the product before (attention's or the MLP's output projection, its bias left to this op), ``x`` the
    residual stream. The add, the norm and the rounding to the compute dtype are one pass. For the backward only
    ``x_new`` and two numbers a row are kept: the normalised rows are made again in the pass that computes the
    gradient of x and the column sums for norm_weight, norm_bias and branch_bias; no product is computed twice. Where no
    kernel runs (on the CPU, in float64) it is the composition of PyTorch's operators, which autograd differentiates.

    Args:
        x: residual stream (..., D), floating point; its dtype is that of the stream.
        branch: (..., D) or None to add nothing. branch_bias: (D,) or None; needs a branch.
        norm_weight, norm_bias: (D,), of the LayerNorm.
        weight: (F, D). bias: (F,) or None.
        eps: added to the variance.
        weight_cast, bias_cast: copies of weight and bias in the compute dtype, so that they need not be cast; no
            gradient flows to them.

    Returns:
        x_new (..., D) of x's dtype (x itself without a branch), and out (..., F) in the compute dtype: autocast's
        where active, else the weight's. Statistics are float32 (float64 for float64 x). Differentiable once where the
        kernel runs.

    Raises:
        ValueError: on a wrong shape, dtype or device.
    """
    check_floating("x", x, "a floating point tensor of shape (..., D)")
    check(x.ndim >= 2 and x.shape[-1] > 0, "x", "shape (..., D), D >= 1", x)
    dim, device = x.shape[-1], x.device
    if branch is not None:
        expected = f"a floating point tensor of shape {tuple(x.shape)} on {device}, as x"
        check_floating("branch", branch, expected)
        check(branch.shape == x.shape and branch.device == device, "branch", expected, branch)
    check(branch_bias is None or branch is not None, "branch_bias", "None without a branch", branch_bias)
    for name, vector in (("branch_bias", branch_bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_vector(name, vector, dim, device)
    check_weight("weight", weight, weight_cast, dim, device)
    check_vector("bias", bias, weight.shape[0], device)
    check_vector("bias_cast", bias_cast, weight.shape[0], device)
    check(eps >= 0, "eps", "a number >= 0", eps)
    dtype = compute_dtype(x, weight)
    if not fuses(x, _kernels):
        x = x if branch is None else (x + branch).to(x.dtype)
        x = x if branch_bias is None else (x + branch_bias).to(x.dtype)
        statistics = torch.promote_types(x.dtype, torch.float32)
        normed = F.layer_norm(x.to(statistics), x.shape[-1:], norm_weight.to(statistics), norm_bias.to(statistics), eps)
        return x, linear(normed, weight, bias)
    parameters = (norm_weight, norm_bias, weight, bias, weight_cast, bias_cast, float(eps), dtype)
    if branch is None:
        return x, _norm_linear(x, *parameters)[0]
    return _add_norm_linear(x, branch, branch_bias, *parameters)[:2]


@torch.library.custom_op("fastmae::norm_linear", mutates_args=())
def _norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_cast: Tensor | None,
    bias_cast: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, and the mean and reciprocal standard deviation of each row."""
    _, normed, mean, rstd = add_norm(x, None, None, norm_weight, norm_bias, eps, dtype)
    return _product(normed, weight, bias, weight_cast, bias_cast), mean, rstd


@torch.library.custom_op("fastmae::add_norm_linear", mutates_args=())
def _add_norm_linear(
    x: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_cast: Tensor | None,
    bias_cast: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_new, out, and the mean and reciprocal standard deviation of each row."""
    x_new, normed, mean, rstd = add_norm(x, branch, branch_bias, norm_weight, norm_bias, eps, dtype)
    return x_new, _product(normed, weight, bias, weight_cast, bias_cast), mean, rstd


def _product(
    normed: Tensor, weight: Tensor, bias: Tensor | None, weight_cast: Tensor | None, bias_cast: Tensor | None
) -> Tensor:
    bias = None if bias is None else operand(bias, bias_cast, normed.dtype)
    return F.linear(normed, operand(weight, weight_cast, normed.dtype), bias)


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


@_norm_linear.register_fake
def _(x, norm_weight, norm_bias, weight, bias, weight_cast, bias_cast, eps, dtype):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype), _statistics(x), _statistics(x)


@_add_norm_linear.register_fake
def _(x, branch, branch_bias, norm_weight, norm_bias, weight, bias, weight_cast, bias_cast, eps, dtype):
    out = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    return x.new_empty(x.shape), out, _statistics(x), _statistics(x)


@torch.library.custom_op("fastmae::norm_linear_backward", mutates_args=())
def _norm_linear_backward(
    grad_out: Tensor,
    grad_x_new: Tensor | None,
    x_new: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the branch (empty unless its dtype is another), of three vectors (3, D), weight and bias."""
    dim = x_new.shape[-1]
    rows = grad_out.reshape(-1, grad_out.shape[-1])
    grad_normed = rows @ weight.to(rows.dtype)
    if grad_x_new is not None:
        grad_x_new = grad_x_new.reshape(-1, dim)
    stream = x_new.reshape(-1, dim), mean.view(-1), rstd.view(-1)
    separate = branch_dtype if branch_dtype is not None and branch_dtype != x_new.dtype else None
    grad_x, grad_branch, normed, vectors = add_norm_backward(
        grad_normed, grad_x_new, *stream, norm_weight, norm_bias, separate
    )
    grad_weight = weight_gradient(rows, normed, weight_dtype)
    grad_bias = rows.new_empty(0) if bias_dtype is None else bias_gradient(rows, bias_dtype)
    shape = x_new.shape if separate else (0,)
    return grad_x.view(x_new.shape), grad_branch.view(shape), vectors, grad_weight, grad_bias


@_norm_linear_backward.register_fake
def _(grad_out, grad_x_new, x_new, mean, rstd, norm_weight, norm_bias, weight, weight_dtype, bias_dtype, branch_dtype):
    separate = branch_dtype is not None and branch_dtype != x_new.dtype
    branch = x_new.new_empty(x_new.shape, dtype=branch_dtype) if separate else x_new.new_empty(0)
    bias = grad_out.new_empty(0) if bias_dtype is None else grad_out.new_empty(grad_out.shape[-1], dtype=bias_dtype)
    vectors = mean.new_empty(3, x_new.shape[-1])
    return x_new.new_empty(x_new.shape), branch, vectors, weight.new_empty(weight.shape, dtype=weight_dtype), bias


def _setup(ctx, x_new, mean, rstd, branch, branch_bias, norm_weight, norm_bias, weight, bias, weight_cast):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_new, mean, rstd, norm_weight, norm_bias, weight if weight_cast is None else weight_cast)
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype, None if branch is None else branch.dtype
    ctx.branch_bias_dtype = None if branch_bias is None else branch_bias.dtype


def _setup_norm(ctx, inputs, output):
    x, norm_weight, norm_bias, weight, bias, weight_cast, *_ = inputs
    _setup(ctx, x, *output[1:], None, None, norm_weight, norm_bias, weight, bias, weight_cast)


def _setup_add_norm(ctx, inputs, output):
    _, *rest, _, _, _ = inputs
    x_new, _, mean, rstd = output
    _setup(ctx, x_new, mean, rstd, *rest)


def _gradients(ctx, grad_x_new, grad_out, wants_bias):
    """Of x, branch, branch_bias, norm_weight, norm_bias, weight, bias."""
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no more
    norm_weight, norm_bias = saved[3:5]
    weight_dtype, bias_dtype, branch_dtype = ctx.dtypes
    # Attention computes the gradient of its projection's bias: a pass over grad_out less.
    bias_dtype = bias_dtype if wants_bias else None
    if grad_out is None:  # nothing but the residual stream was used
        branch = None if branch_dtype is None or grad_x_new is None else grad_x_new.to(branch_dtype)
        has_bias = ctx.branch_bias_dtype is not None and grad_x_new is not None
        branch_bias = bias_gradient(grad_x_new.flatten(0, -2), ctx.branch_bias_dtype) if has_bias else None
        return grad_x_new, branch, branch_bias, None, None, None, None
    x, branch, vectors, weight, bias = _norm_linear_backward(
        grad_out, grad_x_new, *saved, weight_dtype, bias_dtype, branch_dtype
    )
    norm_weight, norm_bias = vectors[0].to(norm_weight.dtype), vectors[1].to(norm_bias.dtype)
    branch_bias = None if ctx.branch_bias_dtype is None else vectors[2].to(ctx.branch_bias_dtype)
    if branch_dtype is None:
        branch = None
    elif branch_dtype == x.dtype:
        branch = x
    return x, branch, branch_bias, norm_weight, norm_bias, weight, None if bias_dtype is None else bias


def _backward_norm(ctx, grad_out, _grad_mean, _grad_rstd):
    x, _, _, *parameters = _gradients(ctx, None, grad_out, ctx.needs_input_grad[4])
    return x, *parameters, None, None, None, None


def _backward_add_norm(ctx, grad_x_new, grad_out, _grad_mean, _grad_rstd):
    return *_gradients(ctx, grad_x_new, grad_out, ctx.needs_input_grad[6]), None, None, None, None


_norm_linear.register_autograd(_backward_norm, setup_context=_setup_norm)
_add_norm_linear.register_autograd(_backward_add_norm, setup_context=_setup_add_norm)
