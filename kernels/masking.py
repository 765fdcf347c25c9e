"""Masks of a sample by three strategies; one program a row, one launch for keep, mask, restore and the mask."""

import triton
import triton.language as tl

from .mask_rows import counter_of_row, store_masking
from .philox import philox4x32

MAX_BLOCKS = tl.constexpr(4096)
"""Blocks after which what is left is masked row by row. At a mask ratio of 0.75 a 14 x 14 grid takes 12."""


@triton.jit(do_not_specialize=["L", "K", "R", "key_low", "key_high", "epoch", "stream_draw"])
def random_masking_kernel(
    ids_keep_ptr,
    ids_mask_ptr,
    ids_restore_ptr,
    mask_ptr,
    sample_ids_ptr,
    epochs_ptr,
    L,
    K,
    R,
    key_low,
    key_high,
    epoch,
    stream_draw,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The K patches of the smallest Philox keys stay visible, found by selection instead of a sort.

    Args:
        ids_keep_ptr, ids_mask_ptr, ids_restore_ptr: int64 (N * R, K), (N * R, L - K), (N * R, L), contiguous.
        mask_ptr: float32 (N * R, L), contiguous.
        sample_ids_ptr: int64 (N,), or None for 0 .. N - 1.
        epochs_ptr: int64 (N,), or None for ``epoch`` everywhere.
        R: rows a sample, draws that follow each other.
        key_low, key_high, epoch, stream_draw: 32-bit words as signed integers, so that their type, and with it the
            compiled code, does not hang on their value.
        SINGLE: L <= BLOCK; the keys stay in registers. Otherwise each pass draws them again.
        BLOCK: patches at a time, a power of two and at least 4.
    """
    i_row = tl.program_id(0).to(tl.int64)
    c1, c2, c3 = counter_of_row(i_row, R, sample_ids_ptr, epochs_ptr, epoch, stream_draw)
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
        if not SINGLE:
            b_keys = _keys(start, c1, c2, c3, k0, k1, BLOCK)
        b_equal = ((b_keys == threshold) & (i_l < L)).to(tl.int32)
        b_rank = num_equal + tl.cumsum(b_equal) - b_equal
        m_keep = (b_keys < threshold) | ((b_equal == 1) & (b_rank < num_ties))
        num_kept = store_masking(
            ids_keep_ptr, ids_mask_ptr, ids_restore_ptr, mask_ptr, i_row, i_l, m_keep, num_kept, L, K
        )
        num_equal += tl.sum(b_equal)


@triton.jit(
    do_not_specialize=["L", "K", "R", "grid_h", "grid_w", "min_area", "key_low", "key_high", "epoch", "stream_draw"]
)
def block_masking_kernel(
    ids_keep_ptr,
    ids_mask_ptr,
    ids_restore_ptr,
    mask_ptr,
    sample_ids_ptr,
    epochs_ptr,
    L,
    K,
    R,
    grid_h,
    grid_w,
    min_area,
    key_low,
    key_high,
    epoch,
    stream_draw,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Random rectangles are masked one after the other until L - K patches are; arguments as above, and:

    Args:
        grid_h, grid_w: rows and columns of patches, L in all.
        min_area: smallest area that is drawn.
        SINGLE: L <= BLOCK; the mask stays in registers. Otherwise it grows in ``mask_ptr``.
    """
    i_row = tl.program_id(0).to(tl.int64)
    c1, c2, c3 = counter_of_row(i_row, R, sample_ids_ptr, epochs_ptr, epoch, stream_draw)
    k0, k1 = key_low.to(tl.uint32), key_high.to(tl.uint32)
    i_l = tl.arange(0, BLOCK)
    m_masked = tl.zeros((BLOCK,), dtype=tl.int1)
    p_mask = mask_ptr + i_row * L
    if not SINGLE:
        for start in range(0, L, BLOCK):
            tl.store(p_mask + start + i_l, 0.0, mask=start + i_l < L)
        tl.debug_barrier()

    num_masked = tl.full((), 0, tl.int32)
    i_block = tl.full((), 0, tl.int32)
    fits = tl.full((), 1, tl.int32)
    top = tl.full((), 0, tl.int32)
    left = tl.full((), 0, tl.int32)
    h = tl.full((), 0, tl.int32)
    w = tl.full((), 0, tl.int32)
    while (fits == 1) & (num_masked < L - K) & (i_block < MAX_BLOCKS):
        remaining = L - K - num_masked
        top, left, h, w = _draw_block(i_block, c1, c2, c3, k0, k1, remaining, min_area, grid_h, grid_w)
        num_new = tl.full((), 0, tl.int32)
        if SINGLE:
            m_block = _in_block(i_l, grid_w, top, left, h, w) & (i_l < L)
            num_new += tl.sum((m_block & (m_masked == 0)).to(tl.int32))
            fits = (num_new <= remaining).to(tl.int32)
            m_masked = m_masked | (m_block & (fits == 1))
        else:
            first = top * grid_w // BLOCK * BLOCK
            end = (top + h) * grid_w
            for start in range(first, end, BLOCK):
                m_block = _in_block(start + i_l, grid_w, top, left, h, w)
                b_mask = tl.load(p_mask + start + i_l, mask=m_block, other=1.0)
                num_new += tl.sum((b_mask == 0.0).to(tl.int32))
            fits = (num_new <= remaining).to(tl.int32)
            for start in range(first, end, BLOCK):
                m_block = _in_block(start + i_l, grid_w, top, left, h, w)
                tl.store(p_mask + start + i_l, 1.0, mask=m_block & (fits == 1))
            tl.debug_barrier()
        num_masked += num_new * fits
        i_block += 1

    # A last block that holds too many new patches gives its first ones; so does the whole grid, where blocks ran out.
    top = tl.where(fits == 1, 0, top)
    left = tl.where(fits == 1, 0, left)
    h = tl.where(fits == 1, grid_h, h)
    w = tl.where(fits == 1, grid_w, w)
    remaining = L - K - num_masked
    num_kept = tl.full((), 0, tl.int32)
    num_new = tl.full((), 0, tl.int32)
    for start in range(0, L, BLOCK):
        i_l = start + tl.arange(0, BLOCK)
        if not SINGLE:
            m_masked = tl.load(p_mask + i_l, mask=i_l < L, other=0.0) == 1.0
        b_new = (_in_block(i_l, grid_w, top, left, h, w) & (m_masked == 0) & (i_l < L)).to(tl.int32)
        b_rank = num_new + tl.cumsum(b_new) - b_new
        m_keep = (m_masked == 0) & ((b_new == 0) | (b_rank >= remaining))
        num_kept = store_masking(
            ids_keep_ptr, ids_mask_ptr, ids_restore_ptr, mask_ptr, i_row, i_l, m_keep, num_kept, L, K
        )
        num_new += tl.sum(b_new)


@triton.jit(do_not_specialize=["L", "K", "R", "grid_w", "key_low", "key_high", "epoch", "stream_draw"])
def grid_masking_kernel(
    ids_keep_ptr,
    ids_mask_ptr,
    ids_restore_ptr,
    mask_ptr,
    sample_ids_ptr,
    epochs_ptr,
    L,
    K,
    R,
    grid_w,
    key_low,
    key_high,
    epoch,
    stream_draw,
    BLOCK: tl.constexpr,
):
    """One corner of every 2 x 2 cell stays visible, the same one in all cells of a row; arguments as above."""
    i_row = tl.program_id(0).to(tl.int64)
    c1, c2, c3 = counter_of_row(i_row, R, sample_ids_ptr, epochs_ptr, epoch, stream_draw)
    c0 = tl.full((1,), 0, tl.uint32)
    b_word, _, _, _ = philox4x32(c0, c1, c2, c3, key_low.to(tl.uint32), key_high.to(tl.uint32))
    corner = tl.max((b_word >> 30).to(tl.int32), axis=0)
    num_kept = tl.full((), 0, tl.int32)
    for start in range(0, L, BLOCK):
        i_l = start + tl.arange(0, BLOCK)
        m_keep = ((i_l // grid_w) % 2 == corner // 2) & ((i_l % grid_w) % 2 == corner % 2)
        num_kept = store_masking(
            ids_keep_ptr, ids_mask_ptr, ids_restore_ptr, mask_ptr, i_row, i_l, m_keep, num_kept, L, K
        )


@triton.jit
def _keys(start, c1, c2, c3, k0, k1, BLOCK: tl.constexpr):
    """Words ``start`` to ``start + BLOCK`` of a row, uint32 (BLOCK,)."""
    c0 = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))


@triton.jit
def _draw_block(i_block, c1, c2, c3, k0, k1, remaining, min_area, grid_h, grid_w):
    """Top, left, height and width of a block, int32, from the four words of one counter."""
    c0 = tl.full((1,), 0, tl.uint32) + i_block.to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1)
    b_area = (min_area + _below(w0, tl.maximum(remaining - min_area, 0) + 1)).to(tl.float32)
    # 0.3 times a power of (1 / 0.09) ** (1 / 255), from 0 to 255: no logarithm, whose last bit hangs on the device.
    b_aspect = tl.full((1,), 0.3, tl.float32)
    b_growth = tl.full((1,), 1.00948765, tl.float32)
    b_power = w1 >> 24
    for _ in tl.static_range(8):
        b_aspect = tl.where((b_power & 1) == 1, b_aspect * b_growth, b_aspect)
        b_growth = b_growth * b_growth
        b_power = b_power >> 1
    b_h = (tl.sqrt_rn(b_area * b_aspect) + 0.5).to(tl.int32)
    b_w = (tl.sqrt_rn(tl.div_rn(b_area, b_aspect)) + 0.5).to(tl.int32)
    b_h = tl.minimum(tl.maximum(b_h, 1), grid_h)
    b_w = tl.minimum(tl.maximum(b_w, 1), grid_w)
    b_top = _below(w2, grid_h - b_h + 1)
    b_left = _below(w3, grid_w - b_w + 1)
    return tl.max(b_top, axis=0), tl.max(b_left, axis=0), tl.max(b_h, axis=0), tl.max(b_w, axis=0)


@triton.jit
def _below(b_word, n):
    """A 32-bit word as an integer in [0, n), int32."""
    return ((b_word.to(tl.int64) * n) >> 32).to(tl.int32)


@triton.jit
def _in_block(i_l, grid_w, top, left, h, w):
    b_row = i_l // grid_w
    b_col = i_l % grid_w
    return (b_row >= top) & (b_row < top + h) & (b_col >= left) & (b_col < left + w)
