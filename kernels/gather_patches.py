"""Gather patches from images, normalising bytes on the way; and the gradient, patches added back into images."""

import triton
import triton.language as tl

from .patches import load_patches, patch_offsets, patch_pixel_offsets


@triton.jit(do_not_specialize=["num_rows", "K", "grid_w"])
def gather_patches_fwd_kernel(
    out_ptr,
    images_ptr,
    ids_ptr,
    mean_ptr,
    std_ptr,
    num_rows,
    K,
    grid_w,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``out[n, k] = patch ids[n, k] of images[n]``; a program writes ROWS of the N * K patches.

    Where an image has several rows of ids, K counts the ids of them all.

    Args:
        out_ptr: (N, K, P), contiguous, any floating dtype.
        ids_ptr: int64 (N, K), contiguous.
        num_rows: N * K.
    """
    P: tl.constexpr = PH * PW * C
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = i_row < num_rows
    i_l = tl.load(ids_ptr + i_row, mask=m_row, other=0).to(tl.int32)
    b_x = load_patches(
        images_ptr, mean_ptr, std_ptr, i_row // K, i_l, m_row,
        stride_n, stride_c, stride_h, stride_w, grid_w, C, PH, PW, INNER, BLOCK_P,
    )  # fmt: skip
    q = tl.arange(0, BLOCK_P)
    o_out = i_row.to(tl.int64)[:, None] * P + q[None, :]
    tl.store(out_ptr + o_out, b_x.to(out_ptr.dtype.element_ty), mask=m_row[:, None] & (q < P)[None, :])


@triton.jit(do_not_specialize=["K", "L", "grid_w"])
def gather_patches_bwd_kernel(
    grad_images_ptr,
    grad_ptr,
    ids_ptr,
    K,
    L,
    grid_w,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A program writes one patch of one gradient image: the sum, in ascending k, of the gradients of its copies.

    Where an image has several rows of ids, K counts the ids of them all.

    Going through the images writes every pixel once, needs no zeroed memory and adds repeated ids in a fixed order.

    Args:
        grad_images_ptr: (N, C, H, W), the strides given.
        grad_ptr: (N, K, P), contiguous.
        ids_ptr: int64 (N, K), contiguous.
    """
    P: tl.constexpr = PH * PW * C
    i_n = tl.program_id(0) // L
    i_l = tl.program_id(0) % L
    q = tl.arange(0, BLOCK_P)
    b_grad = tl.zeros((BLOCK_P,), dtype=tl.float32)
    i_k = _next_copy(ids_ptr, i_n, i_l, -1, K, BLOCK_K)
    while i_k < K:
        o_grad = (i_n.to(tl.int64) * K + i_k) * P + q
        b_grad += tl.load(grad_ptr + o_grad, mask=q < P, other=0.0).to(tl.float32)
        i_k = _next_copy(ids_ptr, i_n, i_l, i_k, K, BLOCK_K)
    o_image = patch_offsets(i_n, i_l, stride_n, stride_h, stride_w, grid_w, C, PH, PW, INNER)
    o_image += patch_pixel_offsets(q, stride_c, stride_h, stride_w, C, PW, INNER)
    tl.store(grad_images_ptr + o_image, b_grad.to(grad_images_ptr.dtype.element_ty), mask=q < P)


@triton.jit
def _next_copy(ids_ptr, i_n, i_l, after, K, BLOCK_K: tl.constexpr):
    """The smallest k > after with ids[n, k] == l, or K."""
    b_next = tl.full((BLOCK_K,), K, dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        i_k = start + tl.arange(0, BLOCK_K)
        b_ids = tl.load(ids_ptr + i_n.to(tl.int64) * K + i_k, mask=i_k < K, other=-1)
        b_next = tl.minimum(b_next, tl.where((b_ids == i_l) & (i_k > after), i_k, K))
    return tl.min(b_next, axis=0)
