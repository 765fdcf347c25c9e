"""The memory-bound half of ``norm_linear``: residual add and LayerNorm, both ways, by kernel or in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmae.ops._dispatch import load_kernels, takes_triton
from fastmae.ops._linear import chunk_rows

_kernels = load_kernels("norm_linear")

MAX_TRITON_DIM = 8192
"""Widest row that a program holds in registers."""
_PLAIN_VALUES = 1 << 17
"""Values that the plain path handles at a time on the CPU: its temporaries then stay in the second-level cache."""


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
    x = x.contiguous()
    x_new = x if branch is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    dim = x.shape[-1]
    rows = x.numel() // dim
    if not runs_triton(x):
        branch = None if branch is None else branch.reshape(-1, dim)
        weight, bias = weight.to(statistics), bias.to(statistics)
        found = []
        for part in _parts(rows, dim, x.device):
            chunk = x.view(-1, dim)[part]
            if branch is not None:
                chunk = torch.add(chunk, branch[part], out=x_new.view(-1, dim)[part])
                if branch_bias is not None:
                    chunk += branch_bias
            out, *pair = torch.native_layer_norm(chunk.to(statistics), (dim,), weight, bias, eps)
            normed.view(-1, dim)[part] = out
            found.append(pair)
        mean, rstd = (torch.cat(values).view(x.shape[:-1]) for values in zip(*found, strict=True))
        return x_new, normed, mean, rstd
    mean, rstd = (torch.empty(x.shape[:-1], dtype=statistics, device=x.device) for _ in range(2))
    options = _tile(dim, values=16)
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
    grad_x, normed = torch.empty_like(x_new), torch.empty_like(grad_normed)
    shape = (0,) if branch_dtype is None else (rows, dim)
    grad_branch = torch.empty(shape, dtype=branch_dtype or x_new.dtype, device=x_new.device)
    if not runs_triton(x_new):
        weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
        sums = []
        for part in _parts(rows, dim, x_new.device):
            x, grad = x_new[part].to(mean.dtype), grad_normed[part].to(mean.dtype)
            statistics = mean[part, None], rstd[part, None]
            out, *sums_of_norm = torch.ops.aten.native_layer_norm_backward(
                grad, x, (dim,), *statistics, weight, bias, (True, True, True)
            )
            if grad_x_new is not None:
                out += grad_x_new[part]
            grad_x[part] = out
            if branch_dtype is not None:
                grad_branch[part] = out
            sums.append(torch.stack([*sums_of_norm, out.sum(0)]))
            normed[part] = torch.sub(x, statistics[0], out=out).mul_(statistics[1]).mul_(weight).add_(bias)
        return grad_x, grad_branch, normed, torch.stack(sums).sum(0)
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


def _parts(rows: int, dim: int, device: torch.device) -> list[slice]:
    """Ranges of rows for the plain path; all at once where temporaries cost no cache."""
    size = max(1, _PLAIN_VALUES // dim) if device.type == "cpu" else max(rows, 1)
    return [slice(start, start + size) for start in range(0, rows, size)]
