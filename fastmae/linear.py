"""The linear layer of the blocks, and low-precision copies of all weights, made at once for many forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastmae.ops._dispatch import fuses
from fastmae.ops._linear import kernels


class Linear(nn.Linear):
    """``nn.Linear`` that takes a low-precision copy of its weight along while :func:`cast_weights` provides one."""

    weight_cast: Tensor | None = None
    wanted: bool = True
    """False while a forward is repeated for what it keeps: the layer's own result is not needed then."""


@contextmanager
def cast_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Gives every :class:`Linear` of the model a copy of its weight in ``dtype`` for as long as the context lasts.

    All copies are made in one multi-tensor launch, where autocast would cast weight after weight, and serve every
    forward and backward inside, as those of one accumulated step. The weights must not change inside. Weights that
    have the dtype already, or are sharded, or run where no kernel does, are left alone.
    """
    wants = [m for m in model.modules() if isinstance(m, Linear) and m.weight.dtype != dtype]
    wants = [m for m in wants if fuses(m.weight, kernels)]
    wants = [m for m in wants if m.weight_cast is None and not hasattr(m.weight, "to_local")]
    with torch.no_grad():
        copies = [torch.empty_like(m.weight, dtype=dtype) for m in wants]
        if copies:
            torch._foreach_copy_(copies, [m.weight for m in wants])
    for module, copy in zip(wants, copies, strict=True):
        module.weight_cast = copy
    try:
        yield
    finally:
        for module in wants:
            module.weight_cast = None
