"""Philox-4x32-10 in device code: the same words as ``fastmae.ops.philox``, bit for bit.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox-4x32.

    Args:
        c0, c1, c2, c3: counter words, uint32 blocks or scalars of broadcastable shapes.
        k0, k1: key words, uint32 scalars.

    Returns:
        Four uint32 blocks of the broadcast shape.
    """
    for _ in tl.static_range(10):
        # One widening multiplication gives both halves of the product; umulhi beside a low product costs two.
        b_a = c0.to(tl.uint64) * 0xD2511F53
        b_b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b_b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (b_a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b_b.to(tl.uint32)
        c3 = b_a.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3
