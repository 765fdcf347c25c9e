"""Every op moves what its byte budget says, counted in Triton's interpreter; and the published table is that count."""

from __future__ import annotations

import json
from math import ceil

import pytest

pytest.importorskip("triton")

import counted
import torch
from traffic import SECTOR, Moved, counted_traffic
from traffic_cases import OPS, VIT_B, Op, Sizes

from fastmae.ops import _dispatch

pytestmark = pytest.mark.ops
interpreted = pytest.mark.skipif(not _dispatch.is_interpreted(), reason="counts the accesses of Triton's interpreter")

SLACK = 1.1
# An encoder of 16 patches and a decoder of 64, 16 heads each.
SIZES = Sizes(N=1, side=128, patch=16, D=256, E=256)


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
    call = op.call(SIZES)
    with counted_traffic() as traffic:
        call()
    assert traffic.launches == 1
    assert not excess(op, SIZES, traffic.reads, op.reads(SIZES))
    assert not excess(op, SIZES, traffic.writes, op.writes(SIZES))


RESULTS = json.loads(counted.TRAFFIC.read_text())["models"]["ViT-B/16"]


def test_the_published_table_has_every_op_at_its_budget():
    assert set(RESULTS) == set(OPS)
    small, large = VIT_B._replace(N=counted.SMALL), VIT_B._replace(N=counted.LARGE)
    for name, op in OPS.items():
        budgets = [sum(op.reads(s).values()) + sum(op.writes(s).values()) for s in (small, large)]
        assert RESULTS[name]["fastmae"]["budget"] == (budgets[1] - budgets[0]) / (large.N - small.N), name
        assert RESULTS[name]["fastmae"]["bytes"] <= SLACK * RESULTS[name]["fastmae"]["budget"] or op.again(small), name


@interpreted
def test_the_published_table_is_what_is_counted():
    assert counted.op_traffic("random_masking", VIT_B, "fastmae") == RESULTS["random_masking"]["fastmae"]


@pytest.mark.skipif(_dispatch.is_interpreted(), reason="the same in both processes")
def test_the_published_table_is_what_is_counted_of_others():
    published = json.loads(counted.TRAFFIC.read_text())
    if torch.__version__.split("+")[0] != published["torch"]:
        pytest.skip(f"counted with torch {published['torch']}")
    for who in ("eager", "compiled"):
        assert counted.op_traffic("restore_tokens", VIT_B, who) == RESULTS["restore_tokens"][who]
