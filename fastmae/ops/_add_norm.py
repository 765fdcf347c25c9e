"""The memory-bound half of ``norm_linear``: residual add and LayerNorm, both ways, by kernel or in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmae.ops._dispatch import load_kernels, takes_triton
from fastmae.ops._linear import chunk_rows

_kernels = load_kernels("norm_linear")

MAX_TRITON_DIM = 8192
"""Widest row that a program holds in registers."""


def runs_triton(x: Tensor) -> bool:
    """Double precision is for checking gradients, not for training: it has no kernel."""
    return takes_triton(x, _kernels) and x.dtype != torch.float64 and x.shape[-1] <= MAX_TRITON_DIM


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x + branch + branch_bias`` (x itself without a branch), its LayerNorm in ``dtype``, mean and 1 / std."""
    statistics = torch.promote_types(x.dtype, torch.float32)
    dim, x = x.shape[-1], x.contiguous()
    if not runs_triton(x):
        x_new = x
        if branch is not None:
            x_new = x + branch if branch_bias is None else x + branch + branch_bias
            x_new = x_new.to(x.dtype).contiguous()
        wide = (x_new.to(statistics), (dim,), weight.to(statistics), bias.to(statistics), eps)
        normed, mean, rstd = torch.native_layer_norm(*wide)
        return x_new, normed.to(dtype), mean.squeeze(-1), rstd.squeeze(-1)
    x_new = x if branch is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=statistics, device=x.device) for _ in range(2))
    rows, options = x.numel() // dim, _tile(dim, values=16)
    branch, branch_bias = (None if value is None else value.contiguous() for value in (branch, branch_bias))
    with torch.cuda.device_of(x):
        _kernels.add_norm_fwd_kernel[(-(-rows // options["ROWS"]),)](
            x_new, normed, mean, rstd, x, branch, branch_bias,
            weight.contiguous(), bias.contiguous(), rows, eps, **options,
        )  # fmt: skip
    return x_new, normed, mean, rstd


def add_norm_backward(
    grad_normed: Tensor,
    grad_x_new: Tensor | None,
    x_new: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From rows (R, D) and (R,): gradients of x and of the branch, the normalised rows, column sums (3, D).

    The branch's gradient is that of x in another dtype, and empty where ``branch_dtype`` is None. The sums are the
    gradients of weight, bias and branch_bias, in the statistics' dtype.
    """
    rows, dim = x_new.shape
    x_new = x_new.contiguous()
    if not runs_triton(x_new):
        weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
        x, statistics = x_new.to(mean.dtype), (mean[:, None], rstd[:, None])
        out, *sums = torch.ops.aten.native_layer_norm_backward(
            grad_normed.to(mean.dtype), x, (dim,), *statistics, weight, bias, (True, True, True)
        )
        out = out if grad_x_new is None else out + grad_x_new
        branch = x_new.new_empty(0) if branch_dtype is None else out.to(branch_dtype)
        normed = torch.addcmul(bias, (x - statistics[0]) * statistics[1], weight).to(grad_normed.dtype)
        return out.to(x_new.dtype).contiguous(), branch, normed, torch.stack([*sums, out.sum(0)])
    grad_x, normed = torch.empty_like(x_new), torch.empty_like(grad_normed, memory_format=torch.contiguous_format)
    shape = (0,) if branch_dtype is None else (rows, dim)
    grad_branch = torch.empty(shape, dtype=branch_dtype or x_new.dtype, device=x_new.device)
    chunk = chunk_rows(rows)
    # Three sums of a column are held beside the values, so half as many of these.
    options = _tile(dim, values=8)
    options["ROWS"] = min(options["ROWS"], chunk)
    partial = torch.empty(-(-rows // chunk), 3, dim, dtype=torch.float32, device=x_new.device)
    with torch.cuda.device_of(x_new):
        _kernels.add_norm_bwd_kernel[(len(partial),)](
            grad_x, None if branch_dtype is None else grad_branch, normed, partial, grad_normed.contiguous(),
            None if grad_x_new is None else grad_x_new.contiguous(), x_new, mean, rstd,
            weight.contiguous(), bias.contiguous(), rows, chunk, **options,
        )  # fmt: skip
    return grad_x, grad_branch, normed, partial.sum(0)


def _tile(dim: int, values: int) -> dict[str, int]:
    """Options of a launch of programs that hold about ``values`` values of a row or rows in each thread."""
    block = max(16, 1 << (dim - 1).bit_length())
    warps = min(16, max(4, block // (32 * values)))
    options = {"D": dim, "ROWS": max(1, 32 * warps * values // block), "BLOCK_D": block, "num_warps": warps}
    # Left alone, ptxas now and then spills a value or two to reach 56 registers. ROCm has no such option, nor the need.
    return options if torch.version.hip else options | {"maxnreg": 128}
