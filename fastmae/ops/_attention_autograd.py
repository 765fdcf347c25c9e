"""What the attention ops share as differentiable ops: the inputs and one more tensor are kept for the backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import CustomOpDef

from fastmae.ops._linear import bias_gradient


def differentiate(op: CustomOpDef, backward: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
    """Registers ``backward(grad, second output, *inputs)``, the gradients of all inputs of an op of two outputs."""

    def save(ctx, inputs, output) -> None:
        # Nobody differentiates the second output: zeros for its gradient would be written for nothing.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], *inputs)

    def formula(ctx, grad, _):
        kept, *inputs = ctx.saved_tensors
        if grad is None:
            return None if len(inputs) == 1 else (None,) * len(inputs)
        return backward(grad, kept, *inputs)

    op.register_autograd(formula, setup_context=save)


def differentiate_with_bias(op: CustomOpDef, backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """As :func:`differentiate`, for an op whose last input is a bias that is in the others already, or None.

    ``backward`` takes the dtype of the bias's gradient behind the inputs, None where no gradient is wanted, and returns
    that gradient last.
    """

    def save(ctx, inputs, output) -> None:
        *inputs, bias = inputs
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(output[1], *inputs)

    def formula(ctx, grad, _):
        kept, *inputs = ctx.saved_tensors
        if grad is None:
            return (None,) * (len(inputs) + 1)
        dtype = ctx.bias_dtype if ctx.needs_input_grad[-1] else None
        *gradients, bias = backward(grad, kept, *inputs, dtype)
        return *gradients, None if dtype is None else bias

    op.register_autograd(formula, setup_context=save)


class AddedBias(torch.autograd.Function):
    """``x`` (N, L, ..., H, Dh) as it is. A bias (... * H * Dh,) that is in it already gets the sum of its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor) -> Tensor:
        ctx.bias_dtype = bias.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        if not ctx.needs_input_grad[1]:
            return grad, None
        return grad, bias_gradient(grad.flatten(2).flatten(0, 1), ctx.bias_dtype)
