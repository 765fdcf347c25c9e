"""Device functions that the masking kernels share: a row's random counter, and what is written about its patches."""

import triton
import triton.language as tl


@triton.jit
def counter_of_row(i_row, R, sample_ids_ptr, epochs_ptr, epoch, stream_draw):
    """The upper three counter words of a row, uint32 (1,)."""
    i_n = i_row // R
    i_sample = i_n
    if sample_ids_ptr is not None:
        i_sample = tl.load(sample_ids_ptr + i_n)
    zero = tl.full((1,), 0, tl.uint32)
    c1 = zero + epoch.to(tl.uint32)
    if epochs_ptr is not None:
        c1 = zero + tl.load(epochs_ptr + i_n).to(tl.uint32)
    c2 = zero + i_sample.to(tl.uint32)
    # Draws do not carry beyond their 8 bits: the last one is at most 255.
    c3 = zero + stream_draw.to(tl.uint32) + ((i_row % R) << 24).to(tl.uint32)
    return c1, c2, c3 | ((i_sample >> 32) & 0xFFFF).to(tl.uint32)


@triton.jit
def store_masking(ids_keep_ptr, ids_mask_ptr, ids_restore_ptr, mask_ptr, i_row, i_l, m_keep, num_kept, L, K):
    """Write what is to be said about patches ``i_l``; ``num_kept`` before them goes in, after them comes out."""
    m_l = i_l < L
    m_keep = m_keep & m_l
    b_keep = m_keep.to(tl.int32)
    o_keep = num_kept + tl.cumsum(b_keep) - b_keep
    o_mask = i_l - o_keep
    tl.store(ids_keep_ptr + i_row * K + o_keep, i_l.to(tl.int64), mask=m_keep)
    tl.store(ids_mask_ptr + i_row * (L - K) + o_mask, i_l.to(tl.int64), mask=m_l & (b_keep == 0))
    tl.store(ids_restore_ptr + i_row * L + i_l, tl.where(m_keep, o_keep, K + o_mask).to(tl.int64), mask=m_l)
    tl.store(mask_ptr + i_row * L + i_l, (1 - b_keep).to(tl.float32), mask=m_l)
    return num_kept + tl.sum(b_keep)
