"""A kernel around the device function under test; Triton reads its source, so it stands at the top of a module."""

import triton
import triton.language as tl

from fastmae.kernels.philox import philox4x32


@triton.jit
def philox_kernel(out_ptr, in_ptr):
    """One counter and one key, six 32-bit words, to four words."""
    i = tl.arange(0, 1)
    c0, c1 = tl.load(in_ptr + i).to(tl.uint32), tl.load(in_ptr + 1 + i).to(tl.uint32)
    c2, c3 = tl.load(in_ptr + 2 + i).to(tl.uint32), tl.load(in_ptr + 3 + i).to(tl.uint32)
    k0, k1 = tl.load(in_ptr + 4).to(tl.uint32), tl.load(in_ptr + 5).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + i, w0.to(tl.int32))
    tl.store(out_ptr + 1 + i, w1.to(tl.int32))
    tl.store(out_ptr + 2 + i, w2.to(tl.int32))
    tl.store(out_ptr + 3 + i, w3.to(tl.int32))
