"""What the benchmarks of single ops share: how a case is stated, how it becomes a benchmark, and inputs.

A file ``bench_<op>.py`` makes an :class:`OpCase` for each shape. ``tests/benchmarks/test_op_benchmarks.py`` holds the
same cases to plain PyTorch's accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from benchmark import Benchmark, Unavailable, gradient
from torch import Tensor

from fastmae.model import IMAGENET_MEAN, IMAGENET_STD
from fastmae.reference import patchify

CUDA = torch.cuda.is_available()
# For fixed shapes: open sizes would be a handicap.
compiled = partial(torch.compile, dynamic=False, fullgraph=True)


@dataclass
class OpCase:
    """One op at one shape.

    Attributes:
        op, name: of the op and of the shape, for tables.
        inputs: tensors by name; gradients are those of the ones that require one.
        calls: functions of those inputs by competitor, or why there is none. ``...-compile`` gets compiled.
        moved: bytes that have to be moved, forward and backward.
        flops: forward and backward.
        sector_bytes: more bytes than those, in either direction, if whole 32-byte sectors are read.
        bias: names of an input and of the bias added where it was made, which eager PyTorch adds for nothing there.
        same: for each function of ours, the one in plain PyTorch that has the same results.
    """

    op: str
    name: str
    inputs: dict[str, Any]
    calls: dict[str, Callable[..., Any] | Unavailable]
    moved: tuple[int, int]
    flops: tuple[int, int] = (0, 0)
    sector_bytes: int = 0
    bias: tuple[str, str] | None = None
    same: dict[str, str] = field(default_factory=lambda: {"fastmae": "plain-compile"})

    def differentiable(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.inputs.items() if isinstance(x, Tensor) and x.requires_grad}


def build(
    make: Callable[..., OpCase], shape: tuple, direction: str, device: torch.device, dtype: torch.dtype
) -> Benchmark:
    """``direction``: "forward", "backward", or "" for an op without gradients. Under autocast, as in training."""
    case = make(shape, device, dtype)
    backward = direction == "backward"
    leaves = list(case.differentiable().values())
    bias = case.bias and tuple(case.inputs[name] for name in case.bias)

    def prepared(name: str, function: Callable[..., Any] | Unavailable):
        if isinstance(function, Unavailable):
            return function
        function = compiled(function) if name.endswith("-compile") else function
        call = under_autocast(partial(function, **case.inputs), device, dtype)
        return gradient(call, leaves, bias) if backward else call

    for leaf in leaves:
        leaf.requires_grad_(backward)
    return Benchmark(
        f"{case.op}, {case.name} {direction}".strip(),
        {name: prepared(name, function) for name, function in case.calls.items()},
        useful_bytes=case.moved[backward],
        sector_bytes=case.moved[backward] + case.sector_bytes,
        flops=case.flops[backward] or None,
        dtype=dtype if case.inputs else None,
    )


def op_benchmark(
    make: Callable[..., OpCase],
    shapes: Sequence[tuple],
    competitors: Sequence[str] = ("fastmae", "plain", "plain-compile"),
    directions: Sequence[str] = ("forward", "backward"),
) -> Callable:
    """The benchmark of an op, for pytest; a shape begins with its name."""

    @pytest.mark.parametrize("competitor", competitors)
    @pytest.mark.parametrize("direction", directions)
    @pytest.mark.parametrize("shape", shapes, ids=lambda shape: shape[0])
    def bench(compete, device, dtype, shape, direction, competitor):
        compete(build, make, shape, direction, device, dtype)

    return bench


def under_autocast(call: Callable[[], object], device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """The call with autocast around it (none for float32): weights are cast anew in each, as in a training step."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)(call)


def apex_layer_norm(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor] | Unavailable:
    """LayerNorm of NVIDIA's apex, of (x, weight, bias). The package of that name on PyPI is another one."""
    if device.type != "cuda":
        return Unavailable("apex's LayerNorm is for CUDA")
    try:
        import fused_layer_norm_cuda  # noqa: F401
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine
    except Exception as error:  # an unrelated package, or extensions built for another torch
        return Unavailable(f"NVIDIA's apex does not load: {error}")
    return lambda x, weight, bias: fused_layer_norm_affine(x, weight, bias, (x.shape[-1],), 1e-6)


# --- Inputs, and what ops replace, as facebookresearch/mae and timm write it ------------------------------------------


def choose(n: int, length: int, count: int, device: torch.device) -> Tensor:
    """Ascending ids (N, count), different for every image."""
    return torch.rand(n, length, device=device).argsort(1)[:, :count].sort(1).values


def pick(x: Tensor, ids: Tensor) -> Tensor:
    """Rows ids (N, K) of x (N, L, D)."""
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1]))


def images_of(name: str, n: int, side: int, device: torch.device) -> Tensor:
    """Raw bytes, channels last in memory, as decoders deliver them; or normalised ones where the name says float32."""
    if "float32" in name:
        return torch.randn(n, 3, side, side, device=device)
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)


def mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(IMAGENET_MEAN, device=device), torch.tensor(IMAGENET_STD, device=device)


def normalised_patches(images: Tensor, patch_size: int, mean: Tensor, std: Tensor) -> Tensor:
    """All patches of a batch, through a float image if it comes as bytes."""
    if images.dtype == torch.uint8:
        images = (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    return patchify(images, (patch_size, patch_size))


def wasted_sector_bytes(images: Tensor, patch_size: int, patches: int) -> int:
    """Bytes that patches do not need of the 32-byte sectors they lie in, as if no two patches shared one.

    A row of a patch starts at a multiple of its own length from the start of a sector.
    """
    channels = images.shape[1]
    rows, values = (patch_size, patch_size * channels) if images.stride(1) == 1 else (patch_size * channels, patch_size)
    size = values * images.element_size()
    touched = sum((start + size + 31) // 32 - start // 32 for start in range(0, 32 * size, size))
    return patches * rows * (touched - size)  # sectors of 32 rows are bytes of one
