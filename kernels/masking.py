"""Random masks: the K patches of the smallest Philox keys of each sample, found by selection instead of a sort."""

import triton
import triton.language as tl

from .philox import philox4x32


@triton.jit(do_not_specialize=["L", "K", "key_low", "key_high", "epoch", "stream_draw"])
def random_masking_kernel(
    ids_keep_ptr,
    ids_mask_ptr,
    ids_restore_ptr,
    mask_ptr,
    sample_ids_ptr,
    epochs_ptr,
    L,
    K,
    key_low,
    key_high,
    epoch,
    stream_draw,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program masks one sample.

    Args:
        ids_keep_ptr, ids_mask_ptr, ids_restore_ptr: int64 (N, K), (N, L - K), (N, L), contiguous.
        mask_ptr: float32 (N, L), contiguous.
        sample_ids_ptr: int64 (N,), or None for 0 .. N - 1.
        epochs_ptr: int64 (N,), or None for ``epoch`` everywhere.
        key_low, key_high, epoch, stream_draw: 32-bit words as signed integers, so that their type, and with it the
            compiled code, does not hang on their value.
        SINGLE: L <= BLOCK; the keys stay in registers. Otherwise each pass draws them again.
        BLOCK: patches at a time, a power of two and at least 4.
    """
    i_n = tl.program_id(0).to(tl.int64)
    i_sample = i_n
    if sample_ids_ptr is not None:
        i_sample = tl.load(sample_ids_ptr + i_n)
    c1 = tl.full((1,), 0, tl.uint32) + epoch.to(tl.uint32)
    if epochs_ptr is not None:
        c1 = tl.full((1,), 0, tl.uint32) + tl.load(epochs_ptr + i_n).to(tl.uint32)
    c2 = tl.full((1,), 0, tl.uint32) + i_sample.to(tl.uint32)
    c3 = ((i_sample >> 32) & 0xFFFF).to(tl.uint32) | stream_draw.to(tl.uint32)
    c3 = tl.full((1,), 0, tl.uint32) + c3
    k0, k1 = key_low.to(tl.uint32), key_high.to(tl.uint32)

    # The K-th smallest key, one bit at a time from the highest: the largest value with fewer than K keys below it.
    if SINGLE:
        b_keys = _keys(0, c1, c2, c3, k0, k1, BLOCK)
    threshold = tl.full((), 0, tl.uint32)
    num_below = tl.full((), 0, tl.int32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = threshold | bit
        count = tl.full((), 0, tl.int32)
        if SINGLE:
            i_l = tl.arange(0, BLOCK)
            count += tl.sum(((b_keys < candidate) & (i_l < L)).to(tl.int32))
        else:
            for start in range(0, L, BLOCK):
                i_l = start + tl.arange(0, BLOCK)
                b_chunk = _keys(start, c1, c2, c3, k0, k1, BLOCK)
                count += tl.sum(((b_chunk < candidate) & (i_l < L)).to(tl.int32))
        accepted = count < K
        threshold = tl.where(accepted, candidate, threshold)
        num_below = tl.where(accepted, count, num_below)
        bit = bit >> 1

    # Of the keys equal to the threshold the first ones are kept.
    num_ties = K - num_below
    num_kept = tl.full((), 0, tl.int32)
    num_equal = tl.full((), 0, tl.int32)
    for start in range(0, L, BLOCK):
        i_l = start + tl.arange(0, BLOCK)
        m_l = i_l < L
        if not SINGLE:
            b_keys = _keys(start, c1, c2, c3, k0, k1, BLOCK)
        b_equal = ((b_keys == threshold) & m_l).to(tl.int32)
        b_rank = num_equal + tl.cumsum(b_equal) - b_equal
        m_keep = m_l & ((b_keys < threshold) | ((b_equal == 1) & (b_rank < num_ties)))
        b_keep = m_keep.to(tl.int32)
        o_keep = num_kept + tl.cumsum(b_keep) - b_keep
        o_mask = i_l - o_keep
        m_mask = m_l & (b_keep == 0)
        tl.store(ids_keep_ptr + i_n * K + o_keep, i_l.to(tl.int64), mask=m_keep)
        tl.store(ids_mask_ptr + i_n * (L - K) + o_mask, i_l.to(tl.int64), mask=m_mask)
        tl.store(ids_restore_ptr + i_n * L + i_l, tl.where(m_keep, o_keep, K + o_mask).to(tl.int64), mask=m_l)
        tl.store(mask_ptr + i_n * L + i_l, (1 - b_keep).to(tl.float32), mask=m_l)
        num_kept += tl.sum(b_keep)
        num_equal += tl.sum(b_equal)


@triton.jit
def _keys(start, c1, c2, c3, k0, k1, BLOCK: tl.constexpr):
    """Words ``start`` to ``start + BLOCK`` of a sample, uint32 (BLOCK,)."""
    c0 = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
