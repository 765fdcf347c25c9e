"""The decoder's input: visible tokens in their places, the mask token in the others, positions on all."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmae.ops._check import check, check_floating
from fastmae.ops._dispatch import load_kernels, takes_triton
from fastmae.ops.gather_tokens import check_values, scatter_tokens, sum_rows, tile_of, with_contiguous_rows

_kernels = load_kernels("restore_tokens")

_CHUNK = 128
"""Rows that one partial sum of the mask token's gradient covers; fixed, so that the order of the sum is."""

_SAMPLES = 32
"""Samples that one partial sum of a table of mask tokens covers. All of them would leave too few programs to hide the
wait for each row; few would write as many partial sums as there are gradients."""


def restore_tokens(
    visible: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    pos_embed: Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Unshuffle, fill with the mask token and add positions, in one pass (He et al. 2022, section 3, "MAE decoder").

    With P prefix tokens (the class token), K visible patches and L patches::

        out[n, p]     = visible[n, p]                       + pos_embed[0, p]       for p < P
        out[n, P + l] = visible[n, P + ids_restore[n, l]]   + pos_embed[0, P + l]   where ids_restore[n, l] < K
        out[n, P + l] = mask_token                          + pos_embed[0, P + l]   elsewhere

    With a token for each position, ``mask_token[0, l]`` takes its place: what masked tokens become that is the same in
    every image (their positions added, or normalised and projected too) can then be computed once a batch.

    Args:
        visible: floating point (N, P + K, E), any strides; N may be 0. Copied first unless the last dimension is
            contiguous.
        mask_token: (1, 1, E) or (E,), or (1, L, E): one for each position.
        ids_restore: int64 (N, L), values in [0, L), L >= K: a permutation in each row, as ``Masking`` has it. (Rows
            that are none are treated as the formula says, gradients included.)
        pos_embed: (1, P + L, E), or None to add nothing.
        num_prefix_tokens: P.

    Returns:
        (N, P + L, E), contiguous. The dtype is what ``cat`` and ``+`` would give: ``torch.promote_types`` over the
        three tensors, so bfloat16 tokens with float32 tables become float32. Differentiable once, with respect to
        visible, mask_token and pos_embed; the gradients of the tables are summed in float32 (float64 for float64), in
        a fixed order.

    Raises:
        ValueError: on a wrong shape, dtype or device. Values of ids_restore are checked on the CPU only.
    """
    p = num_prefix_tokens
    check(isinstance(p, int) and not isinstance(p, bool) and p >= 0, "num_prefix_tokens", "an int >= 0", p)
    expected = f"a floating point tensor of shape (N, {p} + K, E), K >= 1 and E >= 1"
    check_floating("visible", visible, expected)
    check(visible.ndim == 3 and visible.shape[1] > p and visible.shape[2] > 0, "visible", expected, visible)
    n, rows, dim = visible.shape
    device = visible.device
    expected = lambda: f"an int64 tensor of shape ({n}, L), L >= K = {rows - p}, on {device}"  # noqa: E731
    valid = isinstance(ids_restore, Tensor) and ids_restore.dtype == torch.int64 and ids_restore.ndim == 2
    check(valid, "ids_restore", expected, ids_restore)
    length = ids_restore.shape[1]
    valid = ids_restore.shape[0] == n and length >= rows - p and ids_restore.device == device
    check(valid, "ids_restore", expected, ids_restore)
    expected = lambda: (  # noqa: E731
        f"a floating point tensor of shape (1, 1, {dim}), ({dim},) or (1, {length}, {dim}) on {device}"
    )
    check_floating("mask_token", mask_token, expected)
    valid = tuple(mask_token.shape) in ((1, 1, dim), (dim,), (1, length, dim)) and mask_token.device == device
    check(valid, "mask_token", expected, mask_token)
    if pos_embed is not None:
        expected = lambda: f"a floating point tensor of shape (1, {p + length}, {dim}) on {device}"  # noqa: E731
        check_floating("pos_embed", pos_embed, expected)
        valid = tuple(pos_embed.shape) == (1, p + length, dim) and pos_embed.device == device
        check(valid, "pos_embed", expected, pos_embed)
        pos_embed = pos_embed[0]
    return _restore_tokens(visible, mask_token.reshape(-1, dim), ids_restore, pos_embed, p)


def _result_dtype(visible: Tensor, mask_token: Tensor, pos_embed: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(visible.dtype, mask_token.dtype)
    return dtype if pos_embed is None else torch.promote_types(dtype, pos_embed.dtype)


@torch.library.custom_op("fastmae::restore_tokens", mutates_args=())
def _restore_tokens(
    visible: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor | None, num_prefix: int
) -> Tensor:
    n, rows, dim = visible.shape
    length, p = ids_restore.shape[1], num_prefix
    check_values("ids_restore", ids_restore, length)
    dtype = _result_dtype(visible, mask_token, pos_embed)
    if not takes_triton(visible, _kernels):
        # The mask tokens follow the rows of all samples, so that one index serves visible and masked patches.
        table = torch.cat([visible.reshape(n * rows, dim), mask_token])
        index = torch.arange(p + length, device=ids_restore.device).expand(n, -1).clone()
        index[:, p:] = ids_restore + p
        index += torch.arange(n, device=index.device)[:, None] * rows
        token = torch.arange(len(mask_token), device=index.device) + n * rows
        index[:, p:] = torch.where(ids_restore < rows - p, index[:, p:], token)
        out = table.index_select(0, index.view(-1)).view(n, p + length, dim).to(dtype)
        return out if pos_embed is None else out.add_(pos_embed)
    visible = with_contiguous_rows(visible)
    out = torch.empty(n, p + length, dim, dtype=dtype, device=visible.device)
    num_rows = n * (p + length)
    tile = tile_of(dim, out.element_size())
    with torch.cuda.device_of(visible):
        _kernels.restore_tokens_kernel[(-(-num_rows // tile.rows), -(-dim // tile.columns))](
            out, visible, mask_token.contiguous(), ids_restore.contiguous(),
            None if pos_embed is None else pos_embed.contiguous(),
            num_rows, p, length, rows - p, visible.stride(0), visible.stride(1),
            E=dim, TABLE=len(mask_token) > 1, ROWS=tile.rows, BLOCK_E=tile.columns, num_warps=4,
        )  # fmt: skip
    return out


@_restore_tokens.register_fake
def _(visible, mask_token, ids_restore, pos_embed, num_prefix):
    shape = (visible.shape[0], num_prefix + ids_restore.shape[1], visible.shape[2])
    return visible.new_empty(shape, dtype=_result_dtype(visible, mask_token, pos_embed))


@torch.library.custom_op("fastmae::restore_tokens_backward_visible", mutates_args=())
def _backward_visible(
    grad: Tensor, ids_restore: Tensor, num_prefix: int, num_visible: int, dtype: torch.dtype
) -> Tensor:
    if takes_triton(grad, _kernels):
        return scatter_tokens(grad, ids_restore, num_prefix, num_visible, dtype)
    n, _, dim = grad.shape
    sample, patch = (ids_restore < num_visible).nonzero(as_tuple=True)
    rows = sum_rows(
        grad[sample, num_prefix + patch], sample * num_visible + ids_restore[sample, patch], n * num_visible
    )
    return torch.cat([grad[:, :num_prefix], rows.view(n, num_visible, dim)], dim=1).to(dtype)


@_backward_visible.register_fake
def _(grad, ids_restore, num_prefix, num_visible, dtype):
    return grad.new_empty(grad.shape[0], num_prefix + num_visible, grad.shape[2], dtype=dtype)


@torch.library.custom_op("fastmae::restore_tokens_backward_mask_token", mutates_args=())
def _backward_mask_token(
    grad: Tensor, ids_restore: Tensor, num_prefix: int, num_visible: int, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    """(num_tokens, E): one row, or one for each position."""
    (n, _, dim), length = grad.shape, ids_restore.shape[1]
    accumulate = torch.promote_types(grad.dtype, torch.float32)
    if not takes_triton(grad, _kernels):
        return _backward_mask_token_plain(grad, ids_restore, num_prefix, num_visible, num_tokens, accumulate).to(dtype)
    grad = with_contiguous_rows(grad)
    tile = tile_of(dim, accumulate.itemsize)
    strides, columns = (grad.stride(0), grad.stride(1)), -(-dim // tile.columns)
    chunks, rows = (-(-n // _SAMPLES), length) if num_tokens > 1 else (-(-n * length // _CHUNK), 1)
    out = torch.empty(chunks, rows, dim, dtype=accumulate, device=grad.device)
    options = {"E": dim, "BLOCK_E": tile.columns, "num_warps": 4}
    with torch.cuda.device_of(grad):
        if num_tokens > 1:
            _kernels.mask_table_grad_kernel[(-(-length // tile.rows), columns, chunks)](
                out, grad, ids_restore.contiguous(), n, num_prefix, length, num_visible, *strides,
                CHUNK=_SAMPLES, ROWS=tile.rows, **options,
            )  # fmt: skip
            return out.sum(0).to(dtype)
        _kernels.mask_token_grad_kernel[(chunks, columns)](
            out, grad, ids_restore.contiguous(), n * length, num_prefix, length, num_visible, *strides,
            CHUNK=_CHUNK, ROWS=min(tile.rows, _CHUNK), **options,
        )  # fmt: skip
    return out.sum(0).to(dtype)


def _backward_mask_token_plain(grad, ids_restore, num_prefix, num_visible, num_tokens, accumulate):
    if num_tokens > 1:
        out = torch.zeros(num_tokens, grad.shape[2], dtype=accumulate, device=grad.device)
        masked = (ids_restore >= num_visible)[..., None]
        for rows, chosen in zip(grad[:, num_prefix:].split(16), masked.split(16), strict=True):
            out += torch.where(chosen, rows, 0).sum(0, dtype=accumulate)
        return out
    sample, patch = (ids_restore >= num_visible).nonzero(as_tuple=True)
    return grad[sample, num_prefix + patch].sum(0, keepdim=True, dtype=accumulate)


@_backward_mask_token.register_fake
def _(grad, ids_restore, num_prefix, num_visible, num_tokens, dtype):
    return grad.new_empty(num_tokens, grad.shape[2], dtype=dtype)


def _setup_context(ctx, inputs, output):
    visible, mask_token, ids_restore, pos_embed, ctx.num_prefix = inputs
    ctx.save_for_backward(ids_restore)
    ctx.num_visible, ctx.num_tokens = visible.shape[1] - ctx.num_prefix, mask_token.shape[0]
    ctx.dtypes = (visible.dtype, mask_token.dtype, None if pos_embed is None else pos_embed.dtype)


def _backward(ctx, grad):
    (ids_restore,) = ctx.saved_tensors
    args = (grad, ids_restore, ctx.num_prefix, ctx.num_visible)
    visible = mask_token = pos_embed = None
    if ctx.needs_input_grad[0]:
        visible = _backward_visible(*args, ctx.dtypes[0])
    if ctx.needs_input_grad[1]:
        mask_token = _backward_mask_token(*args, ctx.num_tokens, ctx.dtypes[1])
    if ctx.needs_input_grad[3]:
        accumulate = torch.promote_types(grad.dtype, torch.float32)
        pos_embed = grad.sum(0, dtype=accumulate).to(ctx.dtypes[2])
    return visible, mask_token, None, pos_embed, None


_restore_tokens.register_autograd(_backward, setup_context=_setup_context)
