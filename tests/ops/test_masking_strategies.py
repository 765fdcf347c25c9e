"""Block-wise and grid-wise masks: their definition, written once more patch by patch, and what they look like."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae.ops import masking as op
from fastmae.ops import masking_plain
from fastmae.ops._dispatch import is_interpreted, load_kernels
from fastmae.ops.masking import Masking, random_masking
from fastmae.ops.philox import Stream, random_words

pytestmark = pytest.mark.ops

TRITON = load_kernels("masking") is not None
INTERPRETED = TRITON and is_interpreted()


def block_by_definition(grid, ratio, seed, epoch, sample_id, draw=0) -> np.ndarray:
    """bool (rows, columns), True for masked."""
    (rows, columns), length = grid, grid[0] * grid[1]
    left_to_mask, smallest = length - int(length * (1 - ratio)), min(16, max(1, length // 12))
    masked, block = np.zeros(grid, dtype=bool), 0
    while left_to_mask:
        key = np.array([epoch]), np.array([sample_id])
        w = [int(v) for v in random_words(seed, *key, Stream.MASK, 4 * block + 4, draw)[0, 4 * block :]]
        area = np.float32(smallest + (w[0] * (max(left_to_mask - smallest, 0) + 1) >> 32))
        aspect, growth = np.float32(0.3), np.float32((1 / 0.09) ** (1 / 255))
        for bit in range(8):
            aspect = aspect * growth if w[1] >> (24 + bit) & 1 else aspect
            growth = growth * growth
        h = min(max(int(np.sqrt(area * aspect) + np.float32(0.5)), 1), rows)
        w_ = min(max(int(np.sqrt(area / aspect) + np.float32(0.5)), 1), columns)
        top, left = w[2] * (rows - h + 1) >> 32, w[3] * (columns - w_ + 1) >> 32
        for i in range(top, top + h):
            for j in range(left, left + w_):
                if not masked[i, j] and left_to_mask:
                    masked[i, j] = True
                    left_to_mask -= 1
        block += 1
    return masked


def from_mask(mask: torch.Tensor) -> Masking:
    """The index tensors of a mask (N, L) with equally many ones in each row."""
    order = mask.argsort(dim=1, stable=True)
    kept = int((mask[0] == 0).sum())
    return Masking(order[:, :kept], order[:, kept:], order.argsort(dim=1), mask.float())


def assert_same(got: Masking, want: Masking):
    for name, a, b in zip(Masking._fields, got, want, strict=True):
        assert torch.equal(a.cpu(), b.cpu()), name
        assert a.is_contiguous()


@settings(max_examples=8 if INTERPRETED else 25, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 16), st.integers(2, 16)),
    ratio=st.floats(0.1, 0.95),
    seed=st.integers(0, (1 << 63) - 1),
    epoch=st.integers(0, (1 << 32) - 1),
    first=st.integers(0, (1 << 48) - 2),
    draw=st.integers(0, 255),
)
def test_blocks_are_those_of_the_definition(grid, ratio, seed, epoch, first, draw):
    length = grid[0] * grid[1]
    if not 0 < int(length * (1 - ratio)) < length:
        return
    ids = torch.tensor([first, first + 1])
    got = random_masking(
        2, length, ratio, seed=seed, epoch=epoch, sample_ids=ids, draw=draw, strategy="block", grid_size=grid
    )
    masks = [block_by_definition(grid, ratio, seed, epoch, int(i), draw) for i in ids]
    assert_same(got, from_mask(torch.from_numpy(np.stack(masks)).flatten(1)))


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_blocks_at_the_paper_s_grid(device, ratio):
    got = random_masking(4, 196, ratio, seed=3, strategy="block", grid_size=14, device=device)
    assert got.ids_keep.shape == (4, int(196 * (1 - ratio)))
    masks = [block_by_definition((14, 14), ratio, 3, 0, i) for i in range(4)]
    assert_same(got, from_mask(torch.from_numpy(np.stack(masks)).flatten(1)))


def test_more_patches_than_the_kernel_holds(device):
    """On the kernel's path the mask grows in memory."""
    grid = (44, 53)
    assert op._MAX_BLOCK < 44 * 53 < 2 * op._MAX_BLOCK
    got = random_masking(1, 44 * 53, 0.8, seed=1, strategy="block", grid_size=grid, device=device)
    assert_same(got, from_mask(torch.from_numpy(block_by_definition(grid, 0.8, 1, 0, 0)).view(1, -1)))


def test_large_grids_on_the_plain_path():
    grid, kept = (8 * 14, 14 * 14), 15_000
    keys = masking_plain.keys_of_rows(2, 0, 0, None, None, 0, 1, torch.device("cpu"))
    got = masking_plain.draw_masks(keys, 112 * 196, kept, "block", *grid)
    assert got[0].shape == (2, kept)
    assert got[3].sum(1).tolist() == [112 * 196 - kept] * 2


def test_where_blocks_run_out_the_first_patches_are_masked(monkeypatch):
    monkeypatch.setattr(masking_plain, "MAX_BLOCKS", 2)
    keys = masking_plain.keys_of_rows(3, 0, 0, None, None, 0, 1, torch.device("cpu"))
    masked = masking_plain.draw_masks(keys, 196, 10, "block", 14, 14)[3] == 1
    monkeypatch.setattr(masking_plain, "MAX_BLOCKS", 0)
    nothing = masking_plain.draw_masks(keys, 196, 10, "block", 14, 14)[3] == 1
    assert masked.sum(1).tolist() == [186] * 3
    assert nothing[:, :186].all()
    assert not nothing[:, 186:].any()


@pytest.mark.parametrize("grid", [(14, 14), (4, 6), (2, 2), (2, 30)])
def test_grid_keeps_one_corner_of_every_cell(device, grid):
    length = grid[0] * grid[1]
    ids = torch.arange(40 if not INTERPRETED else 12, device=device)
    got = random_masking(len(ids), length, 0.75, seed=2, epoch=6, sample_ids=ids, strategy="grid", grid_size=grid)
    words = random_words(2, torch.full_like(ids, 6), ids, Stream.MASK, 1)[:, 0].tolist()
    want = torch.ones(len(ids), *grid)
    for mask, word in zip(want, words, strict=True):
        corner = word >> 30
        mask[corner // 2 :: 2, corner % 2 :: 2] = 0
    assert_same(got, from_mask(want.flatten(1)))
    assert {word >> 30 for word in words} == {0, 1, 2, 3}


def test_more_patches_than_a_block_of_the_grid(device):
    got = random_masking(1, 4 * 1024, 0.75, seed=2, strategy="grid", grid_size=(4, 1024), device=device)
    corners = got.ids_keep.cpu()
    assert corners.shape == (1, 1024)
    assert (corners % 2 == corners[0, 0] % 2).all()
    assert (corners // 1024 % 2 == corners[0, 0] // 1024).all()


@pytest.mark.parametrize("strategy", ["block", "grid"])
def test_a_mask_hangs_on_its_sample_and_draw_alone(device, strategy):
    def masks(ids, seed=1, epoch=2, **options):
        ids = torch.tensor(ids, device=device)
        options |= {"strategy": strategy, "grid_size": (8, 10)}
        return random_masking(len(ids), 80, 0.75, seed=seed, epoch=epoch, sample_ids=ids, **options)

    whole = masks([9, 1 << 40], draw=3, masks_per_image=2)
    for row in range(4):
        one = masks([[9, 1 << 40][row // 2]], draw=3 + row % 2)
        assert_same(Masking(*(t[row : row + 1] for t in whole)), one)
    # Grids have four phases: of a dozen samples some differ.
    n = 12 if strategy == "grid" else 2
    many = [masks(range(n), **change).mask for change in ({}, {"seed": 5}, {"epoch": 3}, {"draw": 1})]
    many.append(masks(range(n, 2 * n)).mask)
    for i, a in enumerate(many):
        assert not any(torch.equal(a, b) for b in many[:i])


def boundary(mask: torch.Tensor) -> float:
    """Mean number of pairs of neighbours of which one is masked and one is not."""
    edges = (mask[:, 1:] != mask[:, :-1]).sum((1, 2)) + (mask[:, :, 1:] != mask[:, :, :-1]).sum((1, 2))
    return float(edges.float().mean())


def test_what_masks_look_like():
    keys = masking_plain.keys_of_rows(512, 0, 0, None, None, 0, 1, torch.device("cpu"))
    masks = {name: masking_plain.draw_masks(keys, 196, 49, name, 14, 14)[3].view(-1, 14, 14) for name in op.STRATEGIES}
    # Of 364 pairs: a random one differs with probability 2 * 3/4 * 1/4 * 196/195; a kept grid patch has 3.7 neighbours.
    assert boundary(masks["random"]) == pytest.approx(137, abs=2)
    assert boundary(masks["block"]) < 0.5 * boundary(masks["random"])
    assert boundary(masks["grid"]) == pytest.approx(182, abs=1)
    # Blocks lie inside the grid, and so cover its middle more often than its corners; no patch is always or never seen.
    share = masks["block"].mean(0)
    assert share[6:8, 6:8].min() > 0.9
    assert share[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 0.3
    assert share.min() > 0.05
    assert share.max() < 1
    torch.testing.assert_close(share, share.t(), rtol=0, atol=0.1)
    torch.testing.assert_close(masks["grid"].mean(0), torch.full((14, 14), 0.75), rtol=0, atol=0.08)


@pytest.mark.parametrize("strategy", ["block", "grid"])
def test_compiles(device, strategy):
    def f(ids):
        got = random_masking(
            ids.shape[0], 24, 0.75, seed=1, sample_ids=ids, strategy=strategy, grid_size=(4, 6), masks_per_image=2
        )
        return got.ids_keep * 2, got.mask

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for n in (1, 2):
        ids = torch.arange(n, device=device)
        for a, b in zip(compiled(ids), f(ids), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["block", "grid"])
@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (8, 14 * 14), (100, 102), (256, 256)])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_gpu_equals_cpu(strategy, grid, ratio):
    """4,096 blocks at least: the floating point of their sizes must agree bit for bit."""
    ratio, n = (0.75 if strategy == "grid" else ratio), 512 if grid[0] * grid[1] <= 256 else 8
    ids = torch.arange(n) * 1_000_003
    options = {"seed": 1 << 50, "epoch": 9, "strategy": strategy, "grid_size": grid, "masks_per_image": 2}
    want = random_masking(n, grid[0] * grid[1], ratio, sample_ids=ids, **options)
    assert_same(random_masking(n, grid[0] * grid[1], ratio, sample_ids=ids.cuda(), **options), want)


if TRITON:
    from cross_compile import assert_fits, needs_compiler, record_launches

    @needs_compiler
    @pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
    def test_cross_compiles_for_many_patches(monkeypatch, target):
        launches = record_launches(monkeypatch, op)
        ids = torch.arange(4)
        options = {"strategy": "block", "grid_size": (100, 100), "masks_per_image": 2}
        random_masking(4, 100 * 100, 0.75, seed=1, sample_ids=ids, **options)
        (launch,) = launches
        assert launch.grid == (8,)
        assert_fits(launch.compile(target), target, max_registers=192)
