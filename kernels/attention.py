"""Attention over short sequences: a head's keys and values stay in one program, the gradient takes a single pass.

Counted for bfloat16 at 3 TB/s and 600 TFLOP/s, a head, forward + backward. 50 tokens of 64: 26 + 45 KB = 24 ns against
6 ns of products, so bytes decide; the backward reads q, k, v and the gradient, and neither the output nor a separate
delta. 197 tokens of 32: 51 + 89 KB = 47 ns against 45 ns of products and 34 ns of exponentials on padded tiles, so the
backward takes five products and one exponential where two passes, for dq and for dk and dv, would take seven and two.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["H", "LQ", "LK", "scale"])
def attention_fwd_kernel(
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    H,
    LQ,
    LK,
    scale,
    stride_qn,
    stride_ql,
    stride_qh,
    stride_kn,
    stride_kl,
    stride_kh,
    stride_vn,
    stride_vl,
    stride_vh,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FULL_K: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """``softmax(q k^T / sqrt(D)) v``; a program does BLOCK_Q queries of one head.

    Args:
        out_ptr: (N, LQ, H, D), contiguous.
        lse_ptr: fp32 (N, H, LQ), contiguous: the logarithm, to base 2, of each row's sum of exponentials.
        q_ptr, k_ptr, v_ptr: (N, L, H, D), inner stride 1.
        LK: at most BLOCK_K, or with EXTRA exactly one more: that key (2^k patches and a class token) goes through
            vector arithmetic instead of doubling every tile.
        FULL_K: at most LK. Keys below it are known to exist, so only the scores of the last few are masked.
        scale: log2(e) / sqrt(D).
    """
    # A head's blocks of queries run one after the other: its keys and values come from the cache for all but the first.
    num_blocks = tl.cdiv(LQ, BLOCK_Q)
    i_nh = tl.program_id(0) // num_blocks
    i_n = (i_nh // H).to(tl.int64)
    i_h = i_nh % H
    q_ptr += i_n * stride_qn + i_h.to(tl.int64) * stride_qh
    k_ptr += i_n * stride_kn + i_h.to(tl.int64) * stride_kh
    v_ptr += i_n * stride_vn + i_h.to(tl.int64) * stride_vh
    i_k = tl.arange(0, BLOCK_K)
    b_k = _load_rows(k_ptr, i_k, LK, stride_kl, D, BLOCK_D)
    b_v = _load_rows(v_ptr, i_k, LK, stride_vl, D, BLOCK_D)
    i_q = tl.program_id(0) % num_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_q = _load_rows(q_ptr, i_q, LQ, stride_ql, D, BLOCK_D)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_s = tl.where(((i_k < FULL_K) | (i_k < LK))[None, :], b_s, float("-inf"))
    b_max = tl.max(b_s, axis=1)
    if EXTRA:
        b_ke = _load_row(k_ptr, BLOCK_K, stride_kl, D, BLOCK_D)
        b_ve = _load_row(v_ptr, BLOCK_K, stride_vl, D, BLOCK_D)
        b_se = tl.sum(b_q.to(tl.float32) * b_ke[None, :], axis=1)
        b_max = tl.maximum(b_max, b_se)
    b_max *= scale
    b_p = tl.exp2(b_s * scale - b_max[:, None])
    b_sum = tl.sum(b_p, axis=1)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    if EXTRA:
        b_pe = tl.exp2(b_se * scale - b_max)
        b_sum += b_pe
        b_out += b_pe[:, None] * b_ve[None, :]
    b_out *= tl.div_rn(1.0, b_sum)[:, None]
    o_out = i_n * LQ * H * D + i_h * D
    _store_rows(out_ptr + o_out, b_out, i_q, LQ, H * D, D, BLOCK_D)
    o_lse = i_nh.to(tl.int64) * LQ
    tl.store(lse_ptr + o_lse + i_q, b_max + tl.log2(b_sum), mask=i_q < LQ)


@triton.jit(do_not_specialize=["H", "LQ", "LK", "scale", "softmax_scale"])
def attention_bwd_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    bias_ptr,
    grad_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    H,
    LQ,
    LK,
    scale,
    softmax_scale,
    stride_gn,
    stride_gl,
    stride_gh,
    stride_qn,
    stride_ql,
    stride_qh,
    stride_kn,
    stride_kl,
    stride_kh,
    stride_vn,
    stride_vl,
    stride_vh,
    stride_dqn,
    stride_dql,
    stride_dkn,
    stride_dkl,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FULL_K: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """The gradients of q, k and v; a program does a whole head, so that nothing is summed across programs.

    Scores are kept with keys in the rows: the weights are then the left operand of the products for dk and dv as they
    stand. ``delta`` is the row sum of weights times their gradients, which in one program equals out times grad, in
    fp32.

    Args:
        dq_ptr: (N, LQ, H, D), strides stride_dqn, stride_dql, D, 1.
        dk_ptr, dv_ptr: (N, LK, H, D), strides stride_dkn, stride_dkl, D, 1.
        bias_ptr: fp32 (N, 3, H, D), contiguous, or None: an image's part of the gradient of a bias that was added to
            queries, keys and values. The queries' is the sum of dq. The keys' is 0, since such a bias moves all scores
            of a query alike. The values' is the sum of grad, since the weights of a query sum to 1.
        grad_ptr: (N, LQ, H, D), the gradient of the output, inner stride 1.
        lse_ptr, q_ptr, k_ptr, v_ptr, LK, FULL_K, scale: as in the forward pass.
        softmax_scale: 1 / sqrt(D).
    """
    i_n = (tl.program_id(0) // H).to(tl.int64)
    i_h = (tl.program_id(0) % H).to(tl.int64)
    q_ptr += i_n * stride_qn + i_h * stride_qh
    k_ptr += i_n * stride_kn + i_h * stride_kh
    v_ptr += i_n * stride_vn + i_h * stride_vh
    grad_ptr += i_n * stride_gn + i_h * stride_gh
    lse_ptr += tl.program_id(0).to(tl.int64) * LQ
    dq_ptr += i_n * stride_dqn + i_h * D
    dk_ptr += i_n * stride_dkn + i_h * D
    dv_ptr += i_n * stride_dkn + i_h * D
    i_d = tl.arange(0, BLOCK_D)
    if bias_ptr is not None:
        # Before anything else, when all registers are free; the loop below then finds grad in the cache.
        b_grads = tl.zeros((32, BLOCK_D), dtype=tl.float32)
        for start in range(0, LQ, 32):
            b_grads += _load_rows(grad_ptr, start + tl.arange(0, 32), LQ, stride_gl, D, BLOCK_D)
        bias_ptr += i_n * 3 * H * D + i_h * D
        tl.store(bias_ptr + 2 * H * D + i_d, tl.sum(b_grads, axis=0), mask=i_d < D)
        b_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
        tl.store(bias_ptr + H * D + i_d, b_sum, mask=i_d < D)
    i_k = tl.arange(0, BLOCK_K)
    b_k = _load_rows(k_ptr, i_k, LK, stride_kl, D, BLOCK_D)
    b_v = _load_rows(v_ptr, i_k, LK, stride_vl, D, BLOCK_D)
    b_dk = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    b_dv = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    if EXTRA:
        b_dke = tl.zeros((BLOCK_D,), dtype=tl.float32)
        b_dve = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, LQ, BLOCK_Q):
        i_q = start + tl.arange(0, BLOCK_Q)
        b_q = _load_rows(q_ptr, i_q, LQ, stride_ql, D, BLOCK_D)
        b_grad = _load_rows(grad_ptr, i_q, LQ, stride_gl, D, BLOCK_D)
        b_lse = tl.load(lse_ptr + i_q, mask=i_q < LQ, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_p = tl.where(((i_k < FULL_K) | (i_k < LK))[:, None], tl.exp2(b_s * scale - b_lse[None, :]), 0.0)
        b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision="ieee")
        b_delta = tl.sum(b_p * b_dp, axis=0)
        if EXTRA:
            b_ke = _load_row(k_ptr, BLOCK_K, stride_kl, D, BLOCK_D)
            b_ve = _load_row(v_ptr, BLOCK_K, stride_vl, D, BLOCK_D)
            b_pe = tl.exp2(tl.sum(b_q.to(tl.float32) * b_ke[None, :], axis=1) * scale - b_lse)
            b_dpe = tl.sum(b_grad.to(tl.float32) * b_ve[None, :], axis=1)
            b_delta += b_pe * b_dpe
            b_dse = b_pe * (b_dpe - b_delta)
        b_dv = tl.dot(b_p.to(b_q.dtype), b_grad, b_dv, input_precision="ieee")
        if EXTRA:
            b_dve += tl.sum(b_pe[:, None] * b_grad.to(tl.float32), axis=0)
            b_dke += tl.sum(b_dse[:, None] * b_q.to(tl.float32), axis=0)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")
        b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision="ieee")
        if EXTRA:
            b_dq += b_dse[:, None] * b_ke[None, :]
        b_dq *= softmax_scale
        if bias_ptr is not None:
            b_sum += tl.sum(b_dq, axis=0)
        _store_rows(dq_ptr, b_dq, i_q, LQ, stride_dql, D, BLOCK_D)
    _store_rows(dk_ptr, b_dk * softmax_scale, i_k, LK, stride_dkl, D, BLOCK_D)
    _store_rows(dv_ptr, b_dv, i_k, LK, stride_dkl, D, BLOCK_D)
    if EXTRA:
        o_extra = tl.full((), BLOCK_K, tl.int64) * stride_dkl
        tl.store(dk_ptr + o_extra + i_d, (b_dke * softmax_scale).to(dk_ptr.dtype.element_ty), mask=i_d < D)
        tl.store(dv_ptr + o_extra + i_d, b_dve.to(dv_ptr.dtype.element_ty), mask=i_d < D)
    if bias_ptr is not None:
        tl.store(bias_ptr + i_d, b_sum, mask=i_d < D)


@triton.jit
def _load_row(ptr, i_l, stride_l, D: tl.constexpr, BLOCK_D: tl.constexpr):
    i_d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + tl.full((), i_l, tl.int64) * stride_l + i_d, mask=i_d < D, other=0.0).to(tl.float32)


@triton.jit
def _load_rows(ptr, i_l, L, stride_l, D: tl.constexpr, BLOCK_D: tl.constexpr):
    i_d = tl.arange(0, BLOCK_D)
    m = (i_l < L)[:, None]
    if D < BLOCK_D:
        m = m & (i_d < D)[None, :]
    return tl.load(ptr + (i_l.to(tl.int64)[:, None] * stride_l + i_d[None, :]), mask=m, other=0.0)


@triton.jit
def _store_rows(ptr, b_x, i_l, L, stride_l, D: tl.constexpr, BLOCK_D: tl.constexpr):
    i_d = tl.arange(0, BLOCK_D)
    m = (i_l < L)[:, None]
    if D < BLOCK_D:
        m = m & (i_d < D)[None, :]
    tl.store(ptr + (i_l.to(tl.int64)[:, None] * stride_l + i_d[None, :]), b_x.to(ptr.dtype.element_ty), mask=m)
