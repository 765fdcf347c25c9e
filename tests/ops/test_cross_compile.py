"""The cross-compiler harness itself: it must see spills, wide accesses and the launcher's specialisation."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from cross_compile import assert_fits, compile_for, needs_compiler

pytestmark = needs_compiler


@triton.jit
def _copy(out_ptr, in_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + o, tl.load(in_ptr + o, mask=o < n), mask=o < n)


@triton.jit
def _center(out_ptr, in_ptr, n, BLOCK: tl.constexpr):
    # Every value stays alive across the sum.
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(in_ptr + o, mask=o < n)
    tl.store(out_ptr + o, b - tl.sum(b), mask=o < n)


def _floats(offset=0):
    return torch.empty(4096 + offset)[offset:]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_aligned_copy_is_wide(target):
    compiled = compile_for(target, _copy, (_floats(), _floats(), 4096), {"BLOCK": 1024})
    assert_fits(compiled, target, max_registers=64)
    assert set(compiled.loads) == {128}
    assert set(compiled.stores) == {128}


@pytest.mark.parametrize(("offset", "n"), [(1, 4096), (0, 4095)])
def test_misaligned_pointer_or_odd_length_is_narrow(offset, n):
    compiled = compile_for("sm_90", _copy, (_floats(), _floats(offset), n), {"BLOCK": 1024})
    assert set(compiled.loads) == {32}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_spills_are_seen(target):
    few_registers = {"waves_per_eu": 8} if target == "gfx942" else {"maxnreg": 32}
    compiled = compile_for(target, _center, (_floats(), _floats(), 4096), {"BLOCK": 8192}, num_warps=1, **few_registers)
    assert compiled.stack > 0
    assert compiled.spills > 0
    with pytest.raises(AssertionError):
        assert_fits(compiled, target)
