"""Activation checkpointing of a part of a block: what it keeps for the backward is computed again there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmae.linear import Linear

T = TypeVar("T")


def recomputed(module: nn.Module, last: Linear, function: Callable[..., T], *args: object) -> T:
    """``function(*args)``, of whose intermediate values none is kept: the backward computes them again.

    The same values, to the bit: nothing in a block is random, and both times the same weights are read. ``last``'s
    product is not among what is computed again, since nothing inside needs it.

    Args:
        module: whose weights the function reads.
        last: the layer of it that the function ends with.
        function: any tensors that it only passes on had better not be among its arguments, which are kept.
    """
    # In a compiled block copies are inputs of the graph, and what is not needed is left out by the compiler.
    if not torch.compiler.is_compiling():
        function = _Repeatable(module, last, function)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class _Repeatable:
    """A function for a forward and its repetition in the backward.

    That comes when :func:`fastmae.linear.cast_weights` has ended: the copies of the module's weights are held until
    then, as they are where nothing is computed again.
    """

    def __init__(self, module: nn.Module, last: Linear, function: Callable[..., object]):
        self._copies = [(m, _casts(m)) for m in module.modules() if isinstance(m, Linear)]
        self._last, self._function, self._again = last, function, False

    def __call__(self, *args: object) -> object:
        before = [_casts(layer) for layer, _ in self._copies]
        for layer, casts in self._copies:
            layer.weight_cast, layer.bias_cast = casts
        self._last.wanted, self._again = not self._again, True
        try:
            return self._function(*args)
        finally:
            self._last.wanted = True
            for (layer, _), casts in zip(self._copies, before, strict=True):
                layer.weight_cast, layer.bias_cast = casts


def _casts(layer: Linear) -> tuple[Tensor | None, Tensor | None]:
    return layer.weight_cast, layer.bias_cast
