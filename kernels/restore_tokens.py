"""Put visible tokens back in place, mask tokens in the gaps, positions on all; and the mask token's gradient."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "P", "L", "K"])
def restore_tokens_kernel(
    out_ptr,
    visible_ptr,
    mask_token_ptr,
    ids_restore_ptr,
    pos_embed_ptr,
    num_rows,
    P,
    L,
    K,
    stride_n,
    stride_k,
    E: tl.constexpr,
    TABLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A program writes ROWS of the N * (P + L) rows, BLOCK_E columns of them.

    Args:
        out_ptr: (N, P + L, E), contiguous.
        visible_ptr: (N, P + K, E), strides stride_n, stride_k, 1.
        mask_token_ptr: (E,), contiguous, or (L, E) if TABLE: one for each position.
        ids_restore_ptr: int64 (N, L), contiguous.
        pos_embed_ptr: (P + L, E), contiguous, or None.
        num_rows: N * (P + L).
    """
    ACC: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_row = i_row < num_rows
    m_e = i_e < E
    i_n = (i_row // (P + L)).to(tl.int64)
    i_r = i_row % (P + L)
    i_k = tl.load(ids_restore_ptr + i_n * L + (i_r - P), mask=m_row & (i_r >= P), other=0)
    m_visible = (i_r < P) | (i_k < K)
    o_in = i_n * stride_n + tl.where(i_r < P, i_r, P + i_k) * stride_k
    m = m_row[:, None] & m_e[None, :]
    b_visible = tl.load(visible_ptr + o_in[:, None] + i_e[None, :], mask=m & m_visible[:, None], other=0.0).to(ACC)
    if TABLE:
        o_token = (i_r - P)[:, None] * E + i_e[None, :]
        b_token = tl.load(mask_token_ptr + o_token, mask=m & (m_visible == 0)[:, None], other=0.0).to(ACC)
    else:
        b_token = tl.load(mask_token_ptr + i_e, mask=m_e, other=0.0).to(ACC)[None, :]
    b_x = tl.where(m_visible[:, None], b_visible, b_token)
    if pos_embed_ptr is not None:
        b_x += tl.load(pos_embed_ptr + i_r[:, None] * E + i_e[None, :], mask=m, other=0.0).to(ACC)
    o_out = i_row.to(tl.int64)[:, None] * E + i_e[None, :]
    tl.store(out_ptr + o_out, b_x.to(out_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_rows", "P", "L", "K"])
def mask_token_grad_kernel(
    partial_ptr,
    grad_ptr,
    ids_restore_ptr,
    num_rows,
    P,
    L,
    K,
    stride_n,
    stride_r,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The sum of the gradients of CHUNK rows' mask tokens; rows of visible tokens are not read.

    Args:
        partial_ptr: (number of programs on axis 0, E), contiguous, float32 or float64.
        grad_ptr: (N, P + L, E), strides stride_n, stride_r, 1.
        ids_restore_ptr: int64 (N, L), contiguous.
        num_rows: N * L.
    """
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    i_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = i_e < E
    b_sum = tl.zeros((ROWS, BLOCK_E), dtype=ACC)
    for start in range(0, CHUNK, ROWS):
        i_row = tl.program_id(0) * CHUNK + start + tl.arange(0, ROWS)
        m_row = i_row < num_rows
        i_k = tl.load(ids_restore_ptr + i_row, mask=m_row, other=-1)
        o_in = (i_row // L).to(tl.int64) * stride_n + (P + i_row % L).to(tl.int64) * stride_r
        m = (m_row & (i_k >= K))[:, None] & m_e[None, :]
        b_sum += tl.load(grad_ptr + o_in[:, None] + i_e[None, :], mask=m, other=0.0).to(ACC)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * E + i_e, tl.sum(b_sum, axis=0), mask=m_e)


@triton.jit(do_not_specialize=["N", "P", "L", "K"])
def mask_table_grad_kernel(
    partial_ptr,
    grad_ptr,
    ids_restore_ptr,
    N,
    P,
    L,
    K,
    stride_n,
    stride_r,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The sum over CHUNK samples, in ascending order, of the gradients where ROWS positions are masked.

    Args:
        partial_ptr: (number of programs on axis 2, L, E), contiguous, float32 or float64.
        grad_ptr: (N, P + L, E), strides stride_n, stride_r, 1.
        ids_restore_ptr: int64 (N, L), contiguous.
    """
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    i_l = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_l, m_e = i_l < L, i_e < E
    o_row = (P + i_l).to(tl.int64)[:, None] * stride_r + i_e[None, :]
    b_sum = tl.zeros((ROWS, BLOCK_E), dtype=ACC)
    first = tl.program_id(2) * CHUNK
    for n in range(first, tl.minimum(first + CHUNK, N)):
        i_n = tl.full((), 0, tl.int64) + n
        i_k = tl.load(ids_restore_ptr + i_n * L + i_l, mask=m_l, other=-1)
        m = (m_l & (i_k >= K))[:, None] & m_e[None, :]
        b_sum += tl.load(grad_ptr + i_n * stride_n + o_row, mask=m, other=0.0).to(ACC)
    o_out = (tl.program_id(2).to(tl.int64) * L + i_l)[:, None] * E + i_e[None, :]
    tl.store(partial_ptr + o_out, b_sum, mask=m_l[:, None] & m_e[None, :])
