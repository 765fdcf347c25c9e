"""Device functions that the patch kernels share: where a patch's pixels lie, and what their values are."""

import triton
import triton.language as tl


@triton.jit
def load_patches(
    images_ptr,
    mean_ptr,
    std_ptr,
    i_n,
    i_l,
    m_row,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    grid_w,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Patches ``i_l`` of images ``i_n``, normalised where they are bytes; 0 outside the mask and beyond the patch.

    Args:
        images_ptr: (N, C, H, W) uint8 or floating, any strides.
        mean_ptr, std_ptr: fp32 (C,), or None: bytes become ``(x / 255 - mean) / std``, or ``x / 255``.
        i_n, i_l, m_row: blocks of image index, patch index and mask, (R,).
        INNER: whether a patch's row of PW * C values is contiguous (channels-last memory).

    Returns:
        (R, BLOCK_P) block; fp32 for bytes, the images' dtype otherwise.
    """
    q = tl.arange(0, BLOCK_P)
    o_pixel = patch_pixel_offsets(q, stride_c, stride_h, stride_w, C, PW, INNER)
    o_patch = patch_offsets(i_n, i_l, stride_n, stride_h, stride_w, grid_w, C, PH, PW, INNER)
    m_patch = m_row[:, None] & (q < PH * PW * C)[None, :]
    b_x = tl.load(images_ptr + (o_patch[:, None] + o_pixel[None, :]), mask=m_patch, other=0)
    if images_ptr.dtype.element_ty == tl.uint8:
        b_x = b_x.to(tl.float32)
        if mean_ptr is not None:
            b_scale, b_shift = affine_of_values(mean_ptr, std_ptr, q, C, INNER, BLOCK_P)
            b_x = tl.where(m_patch, b_x * b_scale[None, :] + b_shift[None, :], 0.0)
        else:
            b_x = b_x * (1.0 / 255.0)
    return b_x


@triton.jit
def affine_of_values(mean_ptr, std_ptr, q, C: tl.constexpr, INNER: tl.constexpr, BLOCK_P: tl.constexpr):
    """Scale and shift of values ``q`` of a patch, fp32 (BLOCK_P,): ``(x / 255 - mean) / std`` as one multiply-add."""
    if C <= 8:
        b_channel = q % C
        if INNER:
            # Written so that it hangs on a thread's first value and on the place in a run of 16: a run being in one
            # thread, the compiler sees C different channels in it, not 16 divisions.
            b_channel = q // 16 * 16 % C + q % 16 % C
            b_channel = tl.where(b_channel >= C, b_channel - C, b_channel)
        b_scale = tl.zeros((BLOCK_P,), dtype=tl.float32)
        b_shift = tl.zeros((BLOCK_P,), dtype=tl.float32)
        for i_c in tl.static_range(C):
            scale = tl.div_rn(1.0, tl.load(std_ptr + i_c) * 255.0)
            shift = tl.load(mean_ptr + i_c) * scale * -255.0
            b_scale = tl.where(b_channel == i_c, scale, b_scale)
            b_shift = tl.where(b_channel == i_c, shift, b_shift)
    else:
        b_scale = tl.div_rn(1.0, tl.load(std_ptr + q % C) * 255.0)
        b_shift = tl.load(mean_ptr + q % C) * b_scale * -255.0
    return b_scale, b_shift


@triton.jit
def patch_offsets(
    i_n,
    i_l,
    stride_n,
    stride_h,
    stride_w,
    grid_w,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    INNER: tl.constexpr,
):
    """Element offset of the first pixel of patch ``i_l`` of image ``i_n``, int64."""
    # Written with PW * C where that is the stride: the compiler sees its divisibility, and with it wider loads.
    step_w = PW * C if INNER else PW * stride_w
    return (
        i_n.to(tl.int64) * stride_n
        + (i_l // grid_w).to(tl.int64) * (stride_h * PH)
        + (i_l % grid_w).to(tl.int64) * step_w
    )


@triton.jit
def patch_pixel_offsets(q, stride_c, stride_h, stride_w, C: tl.constexpr, PW: tl.constexpr, INNER: tl.constexpr):
    """Element offset of value ``q`` of a patch (order: row, column, channel) from the patch's first pixel, int64."""
    if INNER:
        # Splitting q further, into column and channel, hides from the compiler that this run is contiguous.
        o_pixel = (q // (PW * C)).to(tl.int64) * stride_h + q % (PW * C)
    else:
        o_pixel = (
            (q // (PW * C)).to(tl.int64) * stride_h
            + (q // C % PW).to(tl.int64) * stride_w
            + (q % C).to(tl.int64) * stride_c
        )
    return o_pixel
