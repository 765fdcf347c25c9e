"""Gather tokens by index: an encoder's visible tokens, or a decoder's masked ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmae.ops._check import check, check_floating, check_ids
from fastmae.ops._dispatch import load_kernels, takes_triton

_kernels = load_kernels("gather_tokens")


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """``out[n, k] = tokens[n, ids[n, k]]``: ``torch.gather`` with an expanded index, without the expanded index.

    Ids may repeat: the gradient then sums over the copies, in ascending k, in float32 (float64 for float64), so that it
    is the same in every run. (Ids of one masking never repeat; the general case costs them nothing but one scan of the
    ids, whereas a contract "unique" that nobody checks would cost its first offender a silently wrong gradient.)

    Args:
        tokens: floating point (N, L, D), any strides; N may be 0. Copied first unless the last dimension is contiguous.
        ids: int64 (N, K), values in [0, L), on the same device.

    Returns:
        (N, K, D), contiguous, of the same dtype. Differentiable with respect to tokens, once.

    Raises:
        ValueError: on a wrong shape, dtype or device. Values of ids are checked on the CPU only.
    """
    expected = "a floating point tensor of shape (N, L, D), L >= 1 and D >= 1"
    check_floating("tokens", tokens, expected)
    check(tokens.ndim == 3 and tokens.shape[1] > 0 and tokens.shape[2] > 0, "tokens", expected, tokens)
    check_ids("ids", ids, tokens.shape[0])
    check(ids.device == tokens.device, "ids", f"a tensor on {tokens.device}, as tokens", ids)
    return _gather_tokens(tokens, ids)


@torch.library.custom_op("fastmae::gather_tokens", mutates_args=())
def _gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    n, length, dim = tokens.shape
    k = ids.shape[1]
    check_values("ids", ids, length)
    if not takes_triton(tokens, _kernels):
        if tokens.is_contiguous():
            return tokens.view(n * length, dim).index_select(0, flat_rows(ids, length)).view(n, k, dim)
        return tokens[torch.arange(n, device=ids.device)[:, None], ids].contiguous()
    tokens = with_contiguous_rows(tokens)
    out = torch.empty(n, k, dim, dtype=tokens.dtype, device=tokens.device)
    tile = tile_of(dim, tokens.element_size())
    with torch.cuda.device_of(tokens):
        _kernels.gather_tokens_kernel[(-(-n * k // tile.rows), -(-dim // tile.columns))](
            out, tokens, ids.contiguous(), n * k, k, tokens.stride(0), tokens.stride(1),
            D=dim, ROWS=tile.rows, BLOCK_D=tile.columns, num_warps=4,
        )  # fmt: skip
    return out


@_gather_tokens.register_fake
def _(tokens, ids):
    return tokens.new_empty(ids.shape[0], ids.shape[1], tokens.shape[2])


@torch.library.custom_op("fastmae::gather_tokens_backward", mutates_args=())
def _gather_tokens_backward(grad: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    if takes_triton(grad, _kernels):
        return scatter_tokens(grad, ids, 0, num_tokens, grad.dtype)
    n, k, dim = grad.shape
    rows = sum_rows(grad.reshape(n * k, dim), flat_rows(ids, num_tokens), n * num_tokens)
    return rows.view(n, num_tokens, dim)


@_gather_tokens_backward.register_fake
def _(grad, ids, num_tokens):
    return grad.new_empty(grad.shape[0], num_tokens, grad.shape[2])


def _setup_context(ctx, inputs, output):
    tokens, ids = inputs
    ctx.save_for_backward(ids)
    ctx.num_tokens = tokens.shape[1]


def _backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    return (_gather_tokens_backward(grad, ids, ctx.num_tokens) if ctx.needs_input_grad[0] else None), None


_gather_tokens.register_autograd(_backward, setup_context=_setup_context)


class Tile(NamedTuple):
    """Rows and columns that one program handles, and ids that a scatter compares at a time, all powers of two."""

    rows: int
    columns: int
    scan: int = 0


def tile_of(dim: int, itemsize: int) -> Tile:
    """8 KB of rows for a program of four warps: four 128-bit loads in flight in each thread.

    The columns divide the width where a power of two from 64 on does, so that no lane idles at 192, 768 or 1280.
    """
    divisor = min(dim & -dim, 1024)
    columns = divisor if divisor >= 64 else min(1 << (dim - 1).bit_length(), 1024)
    return Tile(max(8192 // itemsize // columns, 1), columns)


def scatter_tile_of(dim: int, itemsize: int) -> Tile:
    """Sums are kept in at least float32; rows are compared with 256 pairs at a time, two a thread."""
    rows, columns, _ = tile_of(dim, max(itemsize, 4))
    rows = min(rows, 16)
    return Tile(rows, columns, max(16, min(64, 256 // rows)))


def scatter_tokens(source: Tensor, ids: Tensor, num_prefix: int, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """Launches the kernel of the same name: (N, P + K, D) and ids (N, K) to (N, P + L, D) of ``dtype``."""
    n, _, dim = source.shape
    source = with_contiguous_rows(source)
    out = torch.empty(n, num_prefix + num_tokens, dim, dtype=dtype, device=source.device)
    tile = scatter_tile_of(dim, source.element_size())
    # Left alone, ptxas spills a value or two to reach 56 or 72 registers. ROCm has no such option, nor the need.
    limit = {"maxnreg": 96} if torch.version.hip is None else {}
    with torch.cuda.device_of(source):
        _kernels.scatter_tokens_kernel[(n * -(-(num_prefix + num_tokens) // tile.rows), -(-dim // tile.columns))](
            out, source, ids.contiguous(), num_prefix, num_tokens, ids.shape[1], source.stride(0), source.stride(1),
            D=dim, ROWS=tile.rows, BLOCK_K=tile.scan, BLOCK_D=tile.columns, num_warps=4, **limit,
        )  # fmt: skip
    return out


def with_contiguous_rows(tokens: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, as the kernels need; else a copy."""
    return tokens if tokens.stride(-1) == 1 or tokens.shape[-1] == 1 else tokens.contiguous()


def flat_rows(ids: Tensor, length: int) -> Tensor:
    """Row numbers of ids (N, K) in the first two dimensions, flattened, of (N, length, D)."""
    return (ids + torch.arange(ids.shape[0], device=ids.device)[:, None] * length).flatten()


def sum_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """(num_rows, D): each the sum of ``rows[i]`` over ``index[i]`` equal to it, in at least float32; zero without."""
    if rows.device.type == "cpu":
        seen = torch.zeros(num_rows, dtype=torch.bool).index_fill_(0, index, True)
        if int(seen.sum()) == len(index):  # as in every masking: nothing to sum, so nothing to widen
            return rows.new_zeros(num_rows, rows.shape[1]).index_copy_(0, index, rows)
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(num_rows, rows.shape[1], dtype=wide, device=rows.device)
    if rows.is_cuda:
        out.index_put_((index,), rows.to(wide), accumulate=True)  # sorts; index_add_ adds by atomics, in any order
    else:
        out.index_add_(0, index, rows.to(wide))
    return out.to(rows.dtype)


def check_values(name: str, ids: Tensor, length: int) -> None:
    """Every id in [0, length), on the CPU; on CUDA a look would synchronise."""
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or high >= length:
            raise ValueError(f"{name}: expected values in [0, {length}), got values from {low} to {high}")
