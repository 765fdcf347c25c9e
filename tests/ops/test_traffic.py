"""Every op moves what its byte budget says, counted in Triton's interpreter; and the published table is that count."""

from __future__ import annotations

import json
from math import ceil

import pytest

pytest.importorskip("triton")

import count_traffic
import torch
import triton
import triton.language as tl
from traffic import SECTOR, Moved, Traffic, counted_traffic
from traffic_cases import OPS, Op
from traffic_eager import EagerTraffic
from traffic_inputs import VIT_B, Sizes

from fastmae.ops import _dispatch

pytestmark = pytest.mark.ops
interpreted = pytest.mark.skipif(not _dispatch.is_interpreted(), reason="counts the accesses of Triton's interpreter")

SLACK = 1.1
# An encoder of 16 patches and a decoder of 64, 16 heads each.
SIZES = Sizes(N=1, side=128, patch=16, D=256, E=256)


def count(op: Op, sizes: Sizes) -> Traffic:
    call = op.make(sizes)
    with counted_traffic() as traffic:
        call()
    return traffic


def excess(op: Op, sizes: Sizes, counted: dict[str, Moved], budget: dict[str, int]) -> list[str]:
    """What is not as budgeted, in words. Less than the budget is wrong too: then something was not counted.

    Sectors: storages start at one; a contiguous run whose length is no multiple of a sector starts at a multiple of
    16 bytes.
    """
    found = [f"{name}: moved, but not in the budget" for name in counted.keys() - budget.keys()]
    for name, allowed in budget.items():
        moved = counted.get(name, Moved())
        number = moved.unique if name in op.tables else moved.accessed
        accesses = allowed + op.again(sizes).get(name, 0)
        if not accesses <= number <= SLACK * accesses:
            found.append(f"{name}: {number} bytes, budget {accesses}")
        run = op.runs(sizes).get(name)
        sectors = allowed / run * ((run + 16 + SECTOR - 1) // SECTOR) if run else ceil(allowed / SECTOR)
        if moved.sectors > SLACK * sectors:
            found.append(f"{name}: {moved.sectors} sectors, budget {sectors:.0f}")
    return found


@interpreted
@pytest.mark.parametrize("name", OPS)
def test_moves_what_the_budget_says(name):
    op = OPS[name]
    traffic = count(op, SIZES)
    assert len(traffic.launches) == op.kernels
    assert not excess(op, SIZES, traffic.reads(), op.reads(SIZES))
    assert not excess(op, SIZES, traffic.writes(), op.writes(SIZES))


@triton.jit
def copy_kernel(out_ptr, in_ptr, n, STRIDE: tl.constexpr, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(TIMES):
        x = tl.load(in_ptr + o * STRIDE, mask=o < n)
    tl.store(out_ptr + o, x, mask=o < n)


@interpreted
@pytest.mark.parametrize(
    ("stride", "times", "want"),
    [(1, 1, Moved(400, 400, 13)), (1, 2, Moved(800, 400, 13)), (8, 1, Moved(400, 400, 100))],
    ids=["once", "twice", "strided"],
)
def test_the_counter_counts(stride, times, want):
    x, out = torch.randn(100 * stride), torch.empty(100)
    with counted_traffic() as traffic:
        copy_kernel[(2,)](out, x, 100, STRIDE=stride, TIMES=times, BLOCK=64)
    assert torch.equal(out, x[::stride])
    assert len(traffic.launches) == 1
    assert traffic.reads() == {"in": want}
    assert traffic.writes() == {"out": Moved(400, 400, 13)}
    op = Op(lambda s: None, lambda s: {"in": 400}, lambda s: {}, lambda s: None)
    assert bool(excess(op, SIZES, traffic.reads(), {"in": 400})) == (want != Moved(400, 400, 13))


@interpreted
def test_memory_of_no_argument_is_refused():
    from triton.runtime.errors import InterpreterError

    x, out = torch.randn(64), torch.empty(64)
    with pytest.raises(InterpreterError, match="outside"), counted_traffic():
        copy_kernel[(1,)](out, x, 64, STRIDE=1 << 20, TIMES=1, BLOCK=64)


def test_eager_operators_are_charged_inputs_and_outputs():
    x, index = torch.randn(4, 8), torch.tensor([[0, 1]]).expand(4, 2)
    with EagerTraffic() as traffic:
        (x.t() + 1).reshape(8, 4)
        torch.zeros_like(x)
        x.gather(1, index)
    assert traffic.bytes == 2 * 128 + 128 + 2 * 32 + 16
    assert traffic.launches == 3


def test_an_op_is_looked_into():
    op, sizes = OPS["gather_tokens"], SIZES
    call = op.make(sizes)
    with EagerTraffic() as traffic:
        call()
    assert not any("fastmae" in name for name in traffic.by_op)
    with EagerTraffic({torch.ops.fastmae.gather_tokens.default: lambda *_: 17}) as traffic:
        call()
    assert traffic.by_op == {"fastmae.gather_tokens.default": 17}


RESULTS = json.loads(count_traffic.RESULT.read_text())["models"]["ViT-B/16"]


def test_the_published_table_has_every_op_at_its_budget():
    assert set(RESULTS) == set(OPS)
    small, large = VIT_B._replace(N=count_traffic.SMALL), VIT_B._replace(N=count_traffic.LARGE)
    for name, op in OPS.items():
        budgets = [sum(op.reads(s).values()) + sum(op.writes(s).values()) for s in (small, large)]
        assert RESULTS[name]["fastmae"]["budget"] == (budgets[1] - budgets[0]) / (large.N - small.N), name
        assert RESULTS[name]["fastmae"]["bytes"] <= SLACK * RESULTS[name]["fastmae"]["budget"] or op.again(small), name


@interpreted
def test_the_published_table_is_what_is_counted():
    assert count_traffic.count("random_masking", VIT_B, "fastmae") == RESULTS["random_masking"]["fastmae"]


@pytest.mark.skipif(_dispatch.is_interpreted(), reason="the same in both processes")
def test_the_published_table_is_what_is_counted_of_others():
    published = json.loads(count_traffic.RESULT.read_text())
    if torch.__version__.split("+")[0] != published["torch"]:
        pytest.skip(f"counted with torch {published['torch']}")
    for who in ("eager", "compiled"):
        assert count_traffic.count("restore_tokens", VIT_B, who) == RESULTS["restore_tokens"][who]
