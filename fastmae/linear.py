"""The linear layer of the blocks, and low-precision copies of all its parameters, made at once for many forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastmae.ops._dispatch import fuses
from fastmae.ops._linear import kernels


class Linear(nn.Linear):
    """``nn.Linear`` with low-precision copies of its parameters while :func:`cast_weights` provides them."""

    weight_cast: Tensor | None = None
    bias_cast: Tensor | None = None
    wanted: bool = True
    """False while a forward is repeated for what it keeps: the layer's own result is not needed then."""


@contextmanager
def cast_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Gives every :class:`Linear` of the model copies of its weight and bias in ``dtype`` while the context lasts.

    One multi-tensor launch makes all copies, where autocast would launch a cast per tensor, and they serve every
    forward and backward inside, for example those of one accumulated step. The weights must not change inside. Layers
    whose weight has the dtype already, is sharded, or is used where no kernel runs get no copies.
    """
    wants = [m for m in model.modules() if isinstance(m, Linear) and m.weight.dtype != dtype]
    wants = [m for m in wants if fuses(m.weight, kernels)]
    wants = [m for m in wants if m.weight_cast is None and not hasattr(m.weight, "to_local")]
    parameters = [p for m in wants for p in (m.weight, m.bias)]
    with torch.no_grad():
        copies = [torch.empty_like(p, dtype=dtype) for p in parameters]
        if copies:
            torch._foreach_copy_(copies, parameters)
    for module, weight, bias in zip(wants, copies[::2], copies[1::2], strict=True):
        module.weight_cast, module.bias_cast = weight, bias
    try:
        yield
    finally:
        for module in wants:
            module.weight_cast = module.bias_cast = None
