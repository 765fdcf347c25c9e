"""The one place that touches xformers: imported when asked for, never before."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor


def is_installed() -> bool:
    """Whether the package is there; not whether its operators load."""
    return find_spec("xformers") is not None


def status() -> str:
    """One line: whether xformers can be used here, and if not, why."""
    if not is_installed():
        return "not installed (pip install 'fastmae[xformers]')"
    if not torch.cuda.is_available():
        return f"{_version()} installed; it has no operator for the CPU"
    return f"{_version()} installed"


def require(device: torch.device) -> None:
    """Raise ``ValueError`` unless xformers can run on this device."""
    if not is_installed():
        raise ValueError("backend: 'xformers' was asked for but is not installed (pip install 'fastmae[xformers]')")
    if device.type != "cuda":
        raise ValueError(
            f"backend: 'xformers' has no operator for {device.type} tensors; use 'auto', 'plain' or 'sdpa'"
        )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(N, L, H, Dh) tensors through xformers' dispatcher."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


def _version() -> str:
    try:
        return version("xformers")
    except PackageNotFoundError:
        return "unknown version"
