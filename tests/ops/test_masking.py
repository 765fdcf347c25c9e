"""Masks: their definitions, what they look like, the same bits on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from property_cases import plain_only

from fastmae.ops import masking as op
from fastmae.ops import masking_plain
from fastmae.ops.masking import Masking, masking_from_noise, random_masking, tube_masking
from fastmae.ops.philox import Stream, random_words

pytestmark = pytest.mark.ops


def plain(n, length, kept, strategy="random", grid=None, seed=0, epoch=0) -> tuple[torch.Tensor, ...]:
    """The plain path, whatever runs elsewhere in this process."""
    keys = masking_plain.keys_of_rows(n, seed, epoch, None, None, 0, 1, torch.device("cpu"))
    return masking_plain.draw_masks(keys, length, kept, strategy, *(grid or (1, length)))


def random_by_definition(n, length, ratio, seed, epoch) -> Masking:
    """The patches of the K smallest words stay, in a stable order."""
    words = random_words(seed, torch.full((n,), epoch), torch.arange(n), Stream.MASK, length, 0)
    kept = words.argsort(dim=1, stable=True)[:, : int(length * (1 - ratio))]
    return from_mask(torch.ones(n, length).scatter_(1, kept, 0.0))


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


def test_more_patches_than_a_block_of_the_kernels(device):
    """Longer random masks are sorted in parts, larger blocks grow in memory."""
    length = 2 * op._MAX_BLOCK + 77
    got = random_masking(1, length, 0.75, seed=11, epoch=5, device=device)
    assert_same(got, random_by_definition(1, length, 0.75, 11, 5))
    grid = (44, 53)
    assert op._MAX_BLOCK < 44 * 53 < 2 * op._MAX_BLOCK
    got = random_masking(1, 44 * 53, 0.8, seed=1, strategy="block", grid_size=grid, device=device)
    assert_same(got, from_mask(torch.from_numpy(block_by_definition(grid, 0.8, 1, 0, 0)).view(1, -1)))


@plain_only
def test_ties_keep_the_lower_index(monkeypatch):
    keys = torch.tensor([[7, 3, 3, 9, 3, 3]])
    monkeypatch.setattr(masking_plain, "random_words", lambda *_: keys)
    got = plain(1, 6, 2)
    assert got[0].tolist() == [[1, 2]]
    assert got[1].tolist() == [[0, 3, 4, 5]]


def test_mask_depends_on_the_sample_not_on_the_batch(device):
    ids = torch.tensor([9, 4, 1 << 40], device=device)
    whole = random_masking(3, 64, 0.75, seed=1, epoch=2, sample_ids=ids, device=device)
    for row in range(3):
        one = random_masking(1, 64, 0.75, seed=1, epoch=2, sample_ids=ids[row : row + 1])
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, one, strict=True))


@pytest.mark.parametrize("strategy", ["random", "block", "grid"])
def test_every_argument_changes_the_mask(device, strategy):
    def mask(seed=0, epoch=0, first=0, draw=0):
        ids = torch.arange(first, first + n, device=device)
        options = {"sample_ids": ids, "draw": draw, "strategy": strategy, "grid_size": 4}
        return random_masking(n, 16, 0.75, seed=seed, epoch=epoch, **options).mask

    n = 12 if strategy == "grid" else 2  # grids have four phases: of a dozen samples some differ
    masks = [mask(), mask(seed=1), mask(seed=1 << 32), mask(epoch=1), mask(first=n), mask(draw=1)]
    for i, a in enumerate(masks):
        assert not any(torch.equal(a, b) for b in masks[:i])


@plain_only
def test_where_blocks_run_out_the_first_patches_are_masked(monkeypatch):
    monkeypatch.setattr(masking_plain, "MAX_BLOCKS", 2)
    masked = plain(3, 196, 10, "block", (14, 14))[3] == 1
    monkeypatch.setattr(masking_plain, "MAX_BLOCKS", 0)
    nothing = plain(3, 196, 10, "block", (14, 14))[3] == 1
    assert masked.sum(1).tolist() == [186] * 3
    assert nothing[:, :186].all()
    assert not nothing[:, 186:].any()


def test_more_patches_than_a_block_of_the_grid(device):
    got = random_masking(1, 4 * 1024, 0.75, seed=2, strategy="grid", grid_size=(4, 1024), device=device)
    corners = got.ids_keep.cpu()
    assert corners.shape == (1, 1024)
    assert (corners % 2 == corners[0, 0] % 2).all()
    assert (corners // 1024 % 2 == corners[0, 0] // 1024).all()


def test_a_fixed_grid_is_always_the_same(device):
    ids = torch.tensor([5, 9], device=device)
    options = {"strategy": "fixed-grid", "grid_size": (4, 6), "masks_per_image": 2}
    got = random_masking(2, 24, 0.75, seed=3, epoch=1, sample_ids=ids, **options)
    assert got.ids_keep.tolist() == [[0, 2, 4, 12, 14, 16]] * 4
    assert_same(got, from_mask(got.mask))


def test_a_number_of_patches_in_place_of_a_ratio(device):
    got = random_masking(3, 20, num_keep=7, seed=1, device=device)
    assert_same(got, random_masking(3, 20, 0.65, seed=1, device=device))
    noise = torch.rand(3, 20, device=device)
    assert_same(masking_from_noise(noise, num_keep=7), masking_from_noise(noise, 0.65))
    random_masking(2, 36, num_keep=9, seed=1, strategy="grid", grid_size=6, device=device)


def test_tubes_hold_for_all_times(device):
    options = {"seed": 4, "epoch": 2, "sample_ids": torch.tensor([3, 8], device=device), "masks_per_image": 2}
    got, space = tube_masking(2, 3, 12, 0.75, **options), random_masking(2, 12, 0.75, **options)
    assert_same(got, Masking(got.ids_keep, got.ids_mask, got.ids_restore, space.mask.repeat(1, 3)))
    order = torch.cat([got.ids_keep, got.ids_mask], dim=1)
    assert torch.equal(order.gather(1, got.ids_restore), torch.arange(36, device=device).expand(4, -1))
    assert torch.equal(got.mask.gather(1, got.ids_mask), torch.ones_like(got.ids_mask, dtype=torch.float32))
    assert torch.equal(got.ids_keep[:, :3], space.ids_keep)
    with pytest.raises(ValueError, match="times: expected an int >= 1, got 0"):
        tube_masking(2, 0, 12, 0.75, seed=0)


def boundary(mask: torch.Tensor) -> float:
    """Mean number of pairs of neighbours of which one is masked and one is not."""
    edges = (mask[:, 1:] != mask[:, :-1]).sum((1, 2)) + (mask[:, :, 1:] != mask[:, :, :-1]).sum((1, 2))
    return float(edges.float().mean())


@plain_only
def test_what_masks_look_like():
    masks = {name: plain(512, 196, 49, name, (14, 14))[3].view(-1, 14, 14) for name in op.STRATEGIES}
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


def test_empty_batch(device):
    got = random_masking(0, 16, 0.75, seed=0, device=device)
    assert [tuple(t.shape) for t in got] == [(0, 4), (0, 12), (0, 16), (0, 16)]


def test_opcheck(device):
    ids = torch.tensor([3, 5], device=device)
    torch.library.opcheck(op._random_masking, (2, 16, 4, 1 << 40, 7, None, None, 0, device, 1, "random", 1, 16))
    torch.library.opcheck(op._random_masking, (2, 16, 4, 1, 0, ids, ids, 3, device, 2, "random", 4, 4))
    torch.library.opcheck(op._random_masking, (2, 16, 4, 1, 0, ids, ids, 3, device, 2, "block", 2, 8))
    torch.library.opcheck(op._random_masking, (2, 16, 4, 1, 0, ids, None, 3, device, 1, "grid", 4, 4))


@pytest.mark.parametrize(("strategy", "dynamic"), [("random", True), ("block", False), ("grid", None)])
def test_compiles(device, strategy, dynamic):
    def f(ids, seed, epoch):
        options = {"sample_ids": ids, "strategy": strategy, "grid_size": (4, 6), "masks_per_image": 2}
        got = random_masking(ids.shape[0], 24, 0.75, seed=seed, epoch=epoch, **options)
        return got.ids_keep * 2, got.mask

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, epoch in ((2, 0), (3, 1)):
        ids = torch.arange(n, device=device)
        assert all(map(torch.equal, compiled(ids, 4, epoch), f(ids, 4, epoch)))


def test_from_noise_compiles_and_takes_strides(device):
    noise = torch.rand(50, 2, device=device, requires_grad=True).t()
    compiled = torch.compile(masking_from_noise, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(noise, 0.6), masking_from_noise(noise.contiguous(), 0.6), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("n", {"n": -1}),
        ("n", {"n": 2.0}),
        ("num_patches", {"num_patches": 1}),
        ("mask_ratio", {"mask_ratio": 1.0}),
        ("mask_ratio", {"mask_ratio": 0.99}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 1 << 63}),
        ("epoch", {"epoch": -1}),
        ("epoch", {"epoch": 1 << 32}),
        ("epoch", {"epoch": torch.zeros(3, dtype=torch.int64)}),
        ("epoch", {"epoch": torch.tensor([0, -1])}),
        ("sample_ids", {"sample_ids": torch.zeros(2)}),
        ("sample_ids", {"sample_ids": torch.tensor([0, 1 << 48])}),
        ("sample_ids", {"sample_ids": torch.tensor([0, 1]), "device": "meta"}),
        ("draw", {"draw": 256}),
        ("masks_per_image", {"masks_per_image": 0}),
        ("masks_per_image", {"masks_per_image": 2, "draw": 255}),
        ("masks_per_image", {"masks_per_image": torch.tensor(2)}),
        ("strategy: expected one of random, block, grid, fixed-grid, got 'tube'", {"strategy": "tube"}),
        (r"grid_size: expected \(rows, columns\) .* 'block', got None", {"strategy": "block"}),
        ("grid_size: .* 'grid', got None", {"strategy": "grid"}),
        (r"grid_size: expected rows \* columns == num_patches \(16\), got \(4, 5\)", {"grid_size": (4, 5)}),
        ("grid_size: .* got 5", {"strategy": "block", "grid_size": 5}),
        ("grid_size: .* got 0", {"strategy": "block", "grid_size": 0}),
        ("mask_ratio: expected 0.75 for strategy 'grid'", {"strategy": "grid", "grid_size": 4, "mask_ratio": 0.5}),
        ("grid_size: expected even numbers", {"strategy": "grid", "grid_size": (1, 16)}),
    ],
)
def test_bad_arguments(name, changes):
    arguments = {"n": 2, "num_patches": 16, "mask_ratio": 0.75, "seed": 0} | changes
    with pytest.raises(ValueError, match=name):
        random_masking(**arguments)


@pytest.mark.parametrize(
    "noise", [torch.zeros(16), torch.zeros(2, 16, dtype=torch.int64), torch.full((2, 16), torch.nan)]
)
def test_bad_noise(noise):
    with pytest.raises(ValueError, match="noise"):
        masking_from_noise(noise, 0.75)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [49, 196, 256, 1024, 10_001])
def test_random_masks_of_a_gpu(length):
    ids = torch.arange(64) * 1_000_003
    want = random_masking(64, length, 0.75, seed=1 << 50, epoch=9, sample_ids=ids)
    got = random_masking(64, length, 0.75, seed=1 << 50, epoch=9, sample_ids=ids.cuda())
    assert_same(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["block", "grid"])
@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (8, 14 * 14), (100, 102), (256, 256)])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_blocks_and_grids_of_a_gpu(strategy, grid, ratio):
    """4,096 blocks at least: the floating point of their sizes must agree bit for bit."""
    ratio, n = (0.75 if strategy == "grid" else ratio), 512 if grid[0] * grid[1] <= 256 else 8
    ids = torch.arange(n) * 1_000_003
    options = {"seed": 1 << 50, "epoch": 9, "strategy": strategy, "grid_size": grid, "masks_per_image": 2}
    want = random_masking(n, grid[0] * grid[1], ratio, sample_ids=ids, **options)
    assert_same(random_masking(n, grid[0] * grid[1], ratio, sample_ids=ids.cuda(), **options), want)
