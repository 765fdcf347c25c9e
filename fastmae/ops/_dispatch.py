"""Where an op runs: Triton on CUDA tensors, plain PyTorch elsewhere.

The one exception is Triton's interpreter: a kernel that Triton itself made interpreted runs on CPU tensors, so that
the tests exercise the whole launch path without a GPU. No environment variable is read here.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch


def load_kernels(stem: str) -> ModuleType | None:
    """The module ``fastmae.kernels.<stem>``, or None where Triton is not installed."""
    return import_module(f"fastmae.kernels.{stem}") if find_spec("triton") else None


def takes_triton(tensor: torch.Tensor, kernels: ModuleType | None) -> bool:
    """Whether an op on this tensor launches a Triton kernel."""
    if kernels is None:
        return False
    return tensor.is_cuda or is_interpreted()


def fuses(tensor: torch.Tensor, kernels: ModuleType | None) -> bool:
    """Whether a chain of products and memory-bound steps is worth an op of its own for this tensor.

    Only where the steps are kernels: PyTorch's own operators on the CPU gain nothing from being called from an op, and
    the compiler there fuses them better when it sees them.
    """
    return tensor.dtype != torch.float64 and takes_triton(tensor, kernels)


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter (decided by Triton when the kernels were defined)."""
    from triton.runtime.interpreter import InterpretedFunction

    from fastmae.kernels import philox

    return isinstance(philox.philox4x32, InterpretedFunction)
