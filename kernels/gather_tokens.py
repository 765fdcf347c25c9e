"""Gather rows of token sequences by index, and the gradient, rows added back where they came from."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "K"])
def gather_tokens_kernel(
    out_ptr,
    tokens_ptr,
    ids_ptr,
    num_rows,
    K,
    stride_n,
    stride_l,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[n, k] = tokens[n, ids[n, k]]``; a program writes ROWS rows of BLOCK_D columns.

    Args:
        out_ptr: (N, K, D), contiguous.
        tokens_ptr: (N, L, D), strides stride_n, stride_l, 1.
        ids_ptr: int64 (N, K), contiguous.
        num_rows: N * K.
    """
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_row = i_row < num_rows
    m = m_row[:, None] & (i_d < D)[None, :]
    i_l = tl.load(ids_ptr + i_row, mask=m_row, other=0)
    o_in = (i_row // K).to(tl.int64) * stride_n + i_l * stride_l
    b_x = tl.load(tokens_ptr + o_in[:, None] + i_d[None, :], mask=m)
    tl.store(out_ptr + i_row.to(tl.int64)[:, None] * D + i_d[None, :], b_x, mask=m)


@triton.jit(do_not_specialize=["P", "L", "K"])
def scatter_tokens_kernel(
    out_ptr,
    in_ptr,
    ids_ptr,
    P,
    L,
    K,
    stride_n,
    stride_k,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[n, P + l]`` = the sum of ``in[n, P + k]`` over every k with ``ids[n, k] == l``, ascending; zero without.

    The first P rows are copied; ids from L on add nowhere. A program writes ROWS rows of one sample: going through the
    output writes each element once, needs no zeroed memory and no atomics, and is right and repeatable for repeated
    ids.

    Args:
        out_ptr: (N, P + L, D), contiguous.
        in_ptr: (N, P + K, D), strides stride_n, stride_k, 1.
        ids_ptr: int64 (N, K), contiguous.
    """
    ACC: tl.constexpr = tl.float64 if in_ptr.dtype.element_ty == tl.float64 else tl.float32
    num_blocks = tl.cdiv(P + L, ROWS)
    i_n = (tl.program_id(0) // num_blocks).to(tl.int64)
    i_r = (tl.program_id(0) % num_blocks) * ROWS + tl.arange(0, ROWS)
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = (i_d < D)[None, :]

    b_next, b_copies = _first_source(ids_ptr + i_n * K, i_r - P, K, ROWS, BLOCK_K)
    b_source = tl.where(i_r < P, i_r, P + b_next)
    # Rows beyond the last may be ids too, of tokens that add nowhere.
    b_copies = tl.where(i_r < P, 1, tl.where(i_r < P + L, b_copies, 0))
    b_x = tl.zeros((ROWS, BLOCK_D), dtype=ACC)
    num_passes = tl.max(b_copies)
    for i_pass in range(num_passes):
        o_in = i_n * stride_n + b_source.to(tl.int64) * stride_k
        m_in = (i_pass < b_copies)[:, None] & m_d
        b_x += tl.load(in_ptr + o_in[:, None] + i_d[None, :], mask=m_in, other=0.0).to(ACC)
        if i_pass + 1 < num_passes:
            m_more = i_pass + 1 < b_copies
            b_next = _next_source(ids_ptr + i_n * K, i_r - P, b_next, m_more, K, ROWS, BLOCK_K)
            b_source = P + b_next
    o_out = (i_n * (P + L) + i_r) * D
    tl.store(
        out_ptr + o_out[:, None] + i_d[None, :], b_x.to(out_ptr.dtype.element_ty), mask=(i_r < P + L)[:, None] & m_d
    )


@triton.jit
def _first_source(ids_ptr, b_l, K, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """For each wanted id the smallest k with ``ids[k] == id`` (K without one), and the number of such k."""
    b_next = tl.full((ROWS,), 0, tl.int32) + K
    b_count = tl.full((ROWS,), 0, tl.int32)
    for start in range(0, K, BLOCK_K):
        i_k = start + tl.arange(0, BLOCK_K)
        b_ids = tl.load(ids_ptr + i_k, mask=i_k < K, other=-1)
        m = (b_ids[None, :] == b_l[:, None]) & (i_k < K)[None, :]
        b_next = tl.minimum(b_next, tl.min(tl.where(m, i_k[None, :], K), axis=1))
        b_count += tl.sum(m.to(tl.int32), axis=1)
    return b_next, b_count


@triton.jit
def _next_source(ids_ptr, b_l, b_after, m_wanted, K, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """For each wanted row the smallest k > after with ``ids[k] == id``; reads no further than to the last of them."""
    b_next = tl.full((ROWS,), 0, tl.int32) + K
    start = tl.min(tl.where(m_wanted, b_after, K)) // BLOCK_K * BLOCK_K
    while (start < K) & (tl.max((m_wanted & (b_next == K)).to(tl.int32)) == 1):
        i_k = start + tl.arange(0, BLOCK_K)
        b_ids = tl.load(ids_ptr + i_k, mask=i_k < K, other=-1)
        m = (b_ids[None, :] == b_l[:, None]) & (i_k < K)[None, :] & (i_k[None, :] > b_after[:, None])
        b_next = tl.minimum(b_next, tl.min(tl.where(m, i_k[None, :], K), axis=1))
        start += BLOCK_K
    return b_next
