"""Bias and exact GELU in front of a matrix product, and their gradient with the bias's sum in the same pass."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def bias_gelu_fwd_kernel(
    out_ptr,
    h_ptr,
    bias_ptr,
    num_rows,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """``out = gelu(h + bias)``, the erf form; a program does ROWS rows of BLOCK_F columns.

    Args:
        out_ptr, h_ptr: (R, F), contiguous.
        bias_ptr: (F,), or None for zero.
        num_rows: R.
    """
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = i_f < F
    m = (i_row < num_rows)[:, None] & m_f[None, :]
    o = i_row.to(tl.int64)[:, None] * F + i_f[None, :]
    b_h = tl.load(h_ptr + o, mask=m, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        b_h += tl.load(bias_ptr + i_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + o, (b_h * _normal_cdf(b_h)).to(out_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_rows", "chunk"])
def bias_gelu_bwd_kernel(
    grad_h_ptr,
    activated_ptr,
    partial_ptr,
    grad_ptr,
    h_ptr,
    bias_ptr,
    num_rows,
    chunk,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The gradient of h, the activated values again, and partial sums of the bias's gradient.

    Args:
        grad_h_ptr, activated_ptr: (R, F). The latter is what the forward's product read; made again instead of saved.
        partial_ptr: fp32 (programs on axis 0, F), or None without a bias.
        grad_ptr, h_ptr: (R, F), contiguous.
        chunk: rows that a program goes through, in steps of ROWS.
    """
    i_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = i_f < F
    b_bias = tl.zeros((BLOCK_F,), dtype=tl.float32)
    if bias_ptr is not None:
        b_bias = tl.load(bias_ptr + i_f, mask=m_f, other=0.0).to(tl.float32)
    b_sum = tl.zeros((ROWS, BLOCK_F), dtype=tl.float32)
    for start in range(0, chunk, ROWS):
        i_row = tl.program_id(0) * chunk + start + tl.arange(0, ROWS)
        m = (i_row < num_rows)[:, None] & m_f[None, :]
        o = i_row.to(tl.int64)[:, None] * F + i_f[None, :]
        b_grad = tl.load(grad_ptr + o, mask=m, other=0.0).to(tl.float32)
        b_h = tl.load(h_ptr + o, mask=m, other=0.0).to(tl.float32) + b_bias[None, :]
        b_cdf = _normal_cdf(b_h)
        # 1 / sqrt(2 pi); exp(-h^2 / 2) as a power of two.
        b_pdf = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * b_h * b_h)
        b_grad = b_grad * (b_cdf + b_h * b_pdf)
        b_sum += b_grad
        tl.store(grad_h_ptr + o, b_grad.to(grad_h_ptr.dtype.element_ty), mask=m)
        tl.store(activated_ptr + o, (b_h * b_cdf).to(activated_ptr.dtype.element_ty), mask=m)
    if partial_ptr is not None:
        o_partial = tl.program_id(0).to(tl.int64) * F + i_f
        tl.store(partial_ptr + o_partial, tl.sum(b_sum, axis=0), mask=m_f)


@triton.jit
def _normal_cdf(b_h):
    """The normal distribution function in float32, absolute error below 3e-7.

    ``erfc(z) = t exp(-z^2) 2^q(t)`` with ``t = 1 / (1 + z / 2)``, q the Chebyshev interpolant of degree 8 for |h| < 15.
    Fewer instructions than the library's erf, which evaluates two polynomials and would make the pass wait for
    arithmetic; and in the lower tail, where 1 + erf cancels, it keeps its digits.
    """
    b_t = 1.0 / (1.0 + 0.3535533905932738 * tl.abs(b_h))
    b_q = 0.11109660565853119 * b_t - 0.787206768989563
    b_q = b_q * b_t + 2.0945959091186523
    b_q = b_q * b_t - 2.526339292526245
    b_q = b_q * b_t + 1.1949107646942139
    b_q = b_q * b_t - 0.32405054569244385
    b_q = b_q * b_t + 0.6290597915649414
    b_q = b_q * b_t + 1.433262825012207
    b_q = b_q * b_t - 1.8253294229507446
    b_tail = 0.5 * b_t * tl.exp2(b_q - 0.7213475204444817 * b_h * b_h)
    return tl.where(b_h < 0.0, b_tail, 1.0 - b_tail)
