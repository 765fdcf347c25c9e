"""Matrix products inside the fused ops: operands in the compute dtype, weight gradients in the weight's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmae.ops._check import check
from fastmae.ops._dispatch import fuses, load_kernels

kernels = load_kernels("norm_linear")
"""Any of the kernels will do to ask whether kernels run here."""


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is active, else the weight's."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def check_weight(name: str, weight: Tensor, cast: Tensor | None, inputs: int, device: torch.device) -> None:
    """A floating point (F, inputs) on the device, and its low-precision copy of the same shape."""
    expected = f"a floating point tensor of shape (F, {inputs}) on {device}"
    valid = isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2
    check(valid and weight.shape[1] == inputs and weight.device == device, name, expected, weight)
    if cast is not None:
        check(cast.shape == weight.shape and cast.device == device, f"{name}_cast", f"a copy of {name}", cast)


def check_vector(name: str, vector: Tensor | None, size: int, device: torch.device) -> None:
    """A floating point (size,) on the device, or None."""
    if vector is not None:
        expected = f"a floating point tensor of shape ({size},) on {device}"
        valid = isinstance(vector, Tensor) and vector.is_floating_point()
        check(valid and tuple(vector.shape) == (size,) and vector.device == device, name, expected, vector)


def operand(weight: Tensor, cast: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A weight or bias in ``dtype``: its copy where there is one of that dtype, else cast here."""
    return cast if cast is not None and cast.dtype == dtype else weight.to(dtype)


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad^T @ x`` for rows (R, F) and (R, D), as (F, D) of ``dtype``.

    On CUDA the product writes float32 from its float32 accumulator: no rounding to bfloat16 and no cast afterwards.
    """
    if grad.is_cuda and dtype == torch.float32 and grad.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(grad.t(), x, out_dtype=torch.float32)
    return torch.mm(grad.t(), x).to(dtype)


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the rows of (R, F), accumulated in at least float32.

    On the CPU rounded once to the gradient's dtype, as autograd's is: its float32 result is not vectorised there.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.sum(0, dtype=None if grad.device.type == "cpu" else wide).to(dtype)


def chunk_rows(num_rows: int) -> int:
    """Rows that one program of a column sum goes through: about a thousand programs, whatever the device.

    A function of the shape alone, so that the order of the sum is the same everywhere.
    """
    wanted = max(num_rows // 1024, 1)
    return min(max(1 << (wanted - 1).bit_length(), 16), 128)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    weight_cast: Tensor | None = None,
    *,
    wanted: bool = True,
) -> Tensor:
    """``x @ weight.T + bias`` in the compute dtype: ``F.linear`` that takes the weight's low-precision copy along.

    Args:
        x: (..., D), floating point.
        weight: (F, D). bias: (F,) or None.
        weight_cast: a copy of weight in the compute dtype, so that it need not be cast; no gradient flows to it.
        wanted: False where only what the op keeps for its backward is: where a kernel runs, the result is not written.

    Returns:
        (..., F) in the compute dtype (autocast's where active, else the weight's).

    Raises:
        ValueError: on a wrong shape, dtype or device.
    """
    check(isinstance(x, Tensor) and x.is_floating_point(), "x", "a floating point tensor of shape (..., D)", x)
    check_weight("weight", weight, weight_cast, x.shape[-1], x.device)
    check_vector("bias", bias, weight.shape[0], x.device)
    dtype = compute_dtype(x, weight)
    if not fuses(x, kernels):
        return F.linear(x.to(dtype), weight, bias)
    return _linear(x.to(dtype), weight, bias, weight_cast, wanted)


@torch.library.custom_op("fastmae::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, weight_cast: Tensor | None, wanted: bool = True) -> Tensor:
    if not wanted:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, operand(weight, weight_cast, x.dtype), bias)


@_linear.register_fake
def _(x, weight, bias, weight_cast, wanted=True):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("fastmae::linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight (in ``dtype``) and of the bias (empty where ``bias_dtype`` is None)."""
    rows = grad.reshape(-1, grad.shape[-1])
    grad_weight = weight_gradient(rows, x.reshape(-1, x.shape[-1]), dtype)
    grad_bias = rows.new_empty(0) if bias_dtype is None else bias_gradient(rows, bias_dtype)
    return (rows @ weight.to(rows.dtype)).view(x.shape), grad_weight, grad_bias


@_linear_backward.register_fake
def _(grad, x, weight, dtype, bias_dtype):
    bias = grad.new_empty(0) if bias_dtype is None else grad.new_empty(grad.shape[-1], dtype=bias_dtype)
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=dtype), bias


def _setup_context(ctx, inputs, output):
    x, weight, bias, weight_cast, _ = inputs
    ctx.save_for_backward(x, weight if weight_cast is None else weight_cast)
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad):
    grad_x, grad_weight, grad_bias = _linear_backward(grad, *ctx.saved_tensors, *ctx.dtypes)
    return grad_x, grad_weight, None if ctx.dtypes[1] is None else grad_bias, None, None


_linear.register_autograd(_backward, setup_context=_setup_context)
