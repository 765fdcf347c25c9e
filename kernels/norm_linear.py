"""Residual add and LayerNorm around a matrix product: all that is not the product, one pass each way."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "eps"])
def add_norm_fwd_kernel(
    x_new_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    x_ptr,
    branch_ptr,
    branch_bias_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``x_new = x + branch + branch_bias`` and its LayerNorm; a program does ROWS of the rows.

    Args:
        x_new_ptr: (R, D) of x's dtype, or None without a branch: x is then its own sum.
        normed_ptr: (R, D).
        mean_ptr, rstd_ptr: fp32 (R,).
        x_ptr, branch_ptr: (R, D), contiguous; branch may be None.
        branch_bias_ptr: (D,) or None.
        weight_ptr, bias_ptr: (D,), of the norm.
        num_rows: R.
    """
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_d = tl.arange(0, BLOCK_D)
    m_row, m_d = i_row < num_rows, i_d < D
    m = m_row[:, None] & m_d[None, :]
    o = i_row.to(tl.int64)[:, None] * D + i_d[None, :]
    b_x = tl.load(x_ptr + o, mask=m, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        b_x += tl.load(branch_ptr + o, mask=m, other=0.0).to(tl.float32)
        if branch_bias_ptr is not None:
            b_x += tl.load(branch_bias_ptr + i_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        # The statistics are those of what is stored, which the backward reads again.
        b_stored = b_x.to(x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + o, b_stored, mask=m)
        b_x = b_stored.to(tl.float32)
    b_mean = tl.div_rn(tl.sum(b_x, axis=1), 1.0 * D)
    b_x = tl.where(m_d[None, :], b_x - b_mean[:, None], 0.0)
    b_var = tl.div_rn(tl.sum(b_x * b_x, axis=1), 1.0 * D)
    b_rstd = tl.div_rn(1.0, tl.sqrt_rn(b_var + eps))
    tl.store(mean_ptr + i_row, b_mean, mask=m_row)
    tl.store(rstd_ptr + i_row, b_rstd, mask=m_row)
    b_weight = tl.load(weight_ptr + i_d, mask=m_d, other=0.0).to(tl.float32)
    b_bias = tl.load(bias_ptr + i_d, mask=m_d, other=0.0).to(tl.float32)
    b_normed = b_x * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(normed_ptr + o, b_normed.to(normed_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_rows", "chunk"])
def add_norm_bwd_kernel(
    grad_x_ptr,
    grad_branch_ptr,
    normed_ptr,
    partial_ptr,
    grad_normed_ptr,
    grad_x_new_ptr,
    x_new_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    chunk,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of x (and of the branch), the normalised rows again, and partial sums for three vectors.

    A program goes through ``chunk`` rows in steps of ROWS and keeps the sums of its columns in registers, so that no
    gradient is read a second time for the sake of a bias.

    Args:
        grad_x_ptr: (R, D) of x's dtype.
        grad_branch_ptr: (R, D) of the branch's dtype, or None: the same values rounded for the matrix product.
        normed_ptr: (R, D), what the forward's product read; made again instead of saved.
        partial_ptr: fp32 (programs, 3, D): sums of the gradients of the norm's weight, its bias, and of x.
        grad_normed_ptr: (R, D). grad_x_new_ptr: (R, D) of x's dtype, or None for zero.
        x_new_ptr, mean_ptr, rstd_ptr: from the forward.
    """
    i_d = tl.arange(0, BLOCK_D)
    m_d = i_d < D
    b_weight = tl.load(weight_ptr + i_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(bias_ptr + i_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_sum_weight = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    b_sum_bias = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    b_sum_x = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for start in range(0, chunk, ROWS):
        i_row = tl.program_id(0) * chunk + start + tl.arange(0, ROWS)
        m_row = i_row < num_rows
        m = m_row[:, None] & m_d[None, :]
        o = i_row.to(tl.int64)[:, None] * D + i_d[None, :]
        b_grad = tl.load(grad_normed_ptr + o, mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(x_new_ptr + o, mask=m, other=0.0).to(tl.float32)
        b_rstd = tl.load(rstd_ptr + i_row, mask=m_row, other=0.0)[:, None]
        b_mean = tl.load(mean_ptr + i_row, mask=m_row, other=0.0)[:, None]
        b_hat = tl.where(m, (b_x - b_mean) * b_rstd, 0.0)
        tl.store(normed_ptr + o, (b_hat * b_weight + b_bias).to(normed_ptr.dtype.element_ty), mask=m)
        b_sum_weight += b_grad * b_hat
        b_sum_bias += b_grad
        b_grad = b_grad * b_weight
        b_slope = tl.div_rn(tl.sum(b_grad * b_hat, axis=1), 1.0 * D)[:, None]
        b_level = tl.div_rn(tl.sum(b_grad, axis=1), 1.0 * D)[:, None]
        b_grad = tl.where(m, (b_grad - b_hat * b_slope - b_level) * b_rstd, 0.0)
        if grad_x_new_ptr is not None:
            b_grad += tl.load(grad_x_new_ptr + o, mask=m, other=0.0).to(tl.float32)
        b_sum_x += b_grad
        tl.store(grad_x_ptr + o, b_grad.to(grad_x_ptr.dtype.element_ty), mask=m)
        if grad_branch_ptr is not None:
            tl.store(grad_branch_ptr + o, b_grad.to(grad_branch_ptr.dtype.element_ty), mask=m)
    o_partial = tl.program_id(0).to(tl.int64) * (3 * D) + i_d
    tl.store(partial_ptr + o_partial, tl.sum(b_sum_weight, axis=0), mask=m_d)
    tl.store(partial_ptr + o_partial + D, tl.sum(b_sum_bias, axis=0), mask=m_d)
    tl.store(partial_ptr + o_partial + 2 * D, tl.sum(b_sum_x, axis=0), mask=m_d)
