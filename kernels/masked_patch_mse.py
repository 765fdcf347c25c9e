"""Squared error between predicted and true patches, the targets made from the images in registers and never stored."""

import triton
import triton.language as tl

from .patches import load_patches


@triton.jit(do_not_specialize=["num_rows", "M", "R", "grid_w", "eps"])
def masked_patch_mse_fwd_kernel(
    loss_ptr,
    pred_ptr,
    images_ptr,
    ids_ptr,
    mean_ptr,
    std_ptr,
    num_rows,
    M,
    R,
    grid_w,
    eps,
    stride_pn,
    stride_pl,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    INNER: tl.constexpr,
    FULL: tl.constexpr,
    NORM_PIX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``loss[n, m] = mean((pred - target) ** 2)`` of masked patch ``ids[n, m]``; a program does ROWS of the N * M.

    Args:
        loss_ptr: fp32 (N, M), contiguous.
        pred_ptr: (N, L, P) if FULL, else (N, M, P) in the order of ids; inner stride 1.
        ids_ptr: int64 (N, M), contiguous.
        num_rows: N * M.
        R: rows of pred and ids an image; row n is of image n // R.
    """
    P: tl.constexpr = PH * PW * C
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = i_row < num_rows
    i_n = i_row // M
    i_l = tl.load(ids_ptr + i_row, mask=m_row, other=0).to(tl.int32)
    i_pred = i_l if FULL else i_row % M
    b_pred = _load_pred(pred_ptr, i_n, i_pred, m_row, stride_pn, stride_pl, P, BLOCK_P)
    b_x = load_patches(
        images_ptr, mean_ptr, std_ptr, i_n // R, i_l, m_row,
        stride_n, stride_c, stride_h, stride_w, grid_w, C, PH, PW, INNER, BLOCK_P,
    )  # fmt: skip
    b_error = b_pred.to(tl.float32) - _target(b_x.to(tl.float32), eps, P, BLOCK_P, NORM_PIX)
    b_loss = tl.div_rn(tl.sum(b_error * b_error, axis=1), 1.0 * P)
    tl.store(loss_ptr + i_row, b_loss, mask=m_row)


@triton.jit(do_not_specialize=["num_rows", "M", "L", "R", "grid_w", "eps", "stride_gn", "stride_gm"])
def masked_patch_mse_bwd_kernel(
    grad_pred_ptr,
    grad_ptr,
    pred_ptr,
    images_ptr,
    ids_ptr,
    mean_ptr,
    std_ptr,
    num_rows,
    M,
    L,
    R,
    grid_w,
    eps,
    stride_gn,
    stride_gm,
    stride_pn,
    stride_pl,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    INNER: tl.constexpr,
    FULL: tl.constexpr,
    NORM_PIX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``grad_pred = grad * 2 / P * (pred - target)``, 0 for visible patches; a program writes ROWS rows of it.

    Args:
        grad_pred_ptr: (N, L, P) if FULL, else (N, M, P), contiguous.
        grad_ptr: fp32 (N, M), any strides: the gradient of the per-patch losses.
        num_rows: rows of grad_pred: N * L if FULL, else N * M.
        R: rows of pred and ids an image; row n is of image n // R.
    """
    P: tl.constexpr = PH * PW * C
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = i_row < num_rows
    if FULL:
        i_n = i_row // L
        i_pred = i_row % L
        i_l = i_pred
        m_masked, b_grad = _find_grad(grad_ptr, ids_ptr, i_n, i_l, m_row, M, stride_gn, stride_gm, ROWS, BLOCK_M)
    else:
        i_n = i_row // M
        i_pred = i_row % M
        i_l = tl.load(ids_ptr + i_row, mask=m_row, other=0).to(tl.int32)
        m_masked = m_row
        o_grad = i_n.to(tl.int64) * stride_gn + i_pred.to(tl.int64) * stride_gm
        b_grad = tl.load(grad_ptr + o_grad, mask=m_row, other=0.0)
    b_pred = _load_pred(pred_ptr, i_n, i_pred, m_masked, stride_pn, stride_pl, P, BLOCK_P)
    b_x = load_patches(
        images_ptr, mean_ptr, std_ptr, i_n // R, i_l, m_masked,
        stride_n, stride_c, stride_h, stride_w, grid_w, C, PH, PW, INNER, BLOCK_P,
    )  # fmt: skip
    b_error = b_pred.to(tl.float32) - _target(b_x.to(tl.float32), eps, P, BLOCK_P, NORM_PIX)
    b_grad_pred = tl.where(m_masked[:, None], b_error * (b_grad * (2.0 / P))[:, None], 0.0)
    q = tl.arange(0, BLOCK_P)
    o_out = i_row.to(tl.int64)[:, None] * P + q[None, :]
    m_out = m_row[:, None] & (q < P)[None, :]
    tl.store(grad_pred_ptr + o_out, b_grad_pred.to(grad_pred_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def _load_pred(pred_ptr, i_n, i_pred, m_row, stride_pn, stride_pl, P: tl.constexpr, BLOCK_P: tl.constexpr):
    q = tl.arange(0, BLOCK_P)
    o_row = i_n.to(tl.int64) * stride_pn + i_pred.to(tl.int64) * stride_pl
    m_pred = m_row[:, None] & (q < P)[None, :]
    return tl.load(pred_ptr + (o_row[:, None] + q[None, :]), mask=m_pred, other=0.0)


@triton.jit
def _target(b_x, eps, P: tl.constexpr, BLOCK_P: tl.constexpr, NORM_PIX: tl.constexpr):
    """Patches (R, BLOCK_P) in fp32, 0 beyond P, normalised by their own mean and unbiased variance if NORM_PIX."""
    if NORM_PIX:
        # The plain division and root compile to approximations, which the interpreter would hide.
        m_q = tl.arange(0, BLOCK_P) < P
        b_mean = tl.div_rn(tl.sum(b_x, axis=1), 1.0 * P)
        b_x = tl.where(m_q[None, :], b_x - b_mean[:, None], 0.0)
        b_var = tl.div_rn(tl.sum(b_x * b_x, axis=1), 1.0 * (P - 1))
        b_x = b_x * tl.div_rn(1.0, tl.sqrt_rn(b_var + eps))[:, None]
    return b_x


@triton.jit
def _find_grad(grad_ptr, ids_ptr, i_n, i_l, m_row, M, stride_gn, stride_gm, ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether patch ``i_l`` is among its image's masked ids, and the sum of the gradients at its places there."""
    b_found = tl.zeros((ROWS, BLOCK_M), dtype=tl.int32)
    b_grad = tl.zeros((ROWS, BLOCK_M), dtype=tl.float32)
    i_n64 = i_n.to(tl.int64)[:, None]
    for start in range(0, M, BLOCK_M):
        i_m = (start + tl.arange(0, BLOCK_M))[None, :]
        m_m = m_row[:, None] & (i_m < M)
        b_ids = tl.load(ids_ptr + (i_n64 * M + i_m), mask=m_m, other=-1)
        m_hit = b_ids == i_l[:, None]
        b_found |= m_hit.to(tl.int32)
        b_grad += tl.load(grad_ptr + (i_n64 * stride_gn + i_m.to(tl.int64) * stride_gm), mask=m_hit, other=0.0)
    return tl.max(b_found, axis=1) > 0, tl.sum(b_grad, axis=1)
