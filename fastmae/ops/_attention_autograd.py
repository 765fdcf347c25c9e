"""What the attention ops share as differentiable ops: the inputs and one more tensor are kept for the backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.library import CustomOpDef


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
