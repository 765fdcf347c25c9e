"""Masks: the definition, its distribution, the same bits on every path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae.ops import masking as op
from fastmae.ops import masking_plain
from fastmae.ops._dispatch import is_interpreted, load_kernels
from fastmae.ops.masking import Masking, masking_from_noise, random_masking
from fastmae.ops.philox import Stream, random_words

pytestmark = pytest.mark.ops

TRITON = load_kernels("masking") is not None


def plain(n, length, kept, seed, epoch, draw=0, masks_per_image=1) -> tuple[torch.Tensor, ...]:
    """The plain path, whatever runs elsewhere in this process."""
    keys = masking_plain.keys_of_rows(n, seed, epoch, None, None, draw, masks_per_image, torch.device("cpu"))
    return masking_plain.draw_masks(keys, length, kept, "random", 1, length)


EXAMPLES = 8 if TRITON and is_interpreted() else 25


def by_definition(n, length, ratio, seed, epoch, ids, draw=0) -> Masking:
    """Stable sort of the keys; the K smallest stay, ids ascending."""
    kept = int(length * (1 - ratio))
    words = random_words(seed, epoch, ids, Stream.MASK, length, draw)
    order = words.argsort(dim=1, stable=True)
    ids_keep, ids_mask = order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values
    ids_restore = torch.cat([ids_keep, ids_mask], dim=1).argsort(dim=1)
    mask = torch.zeros(n, length).scatter_(1, ids_mask, 1.0)
    return Masking(ids_keep, ids_mask, ids_restore, mask)


def assert_same(got: Masking, want: Masking):
    for name, a, b in zip(Masking._fields, got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert a.is_contiguous()


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.95])
@pytest.mark.parametrize(("n", "length"), [(1, 196), (3, 50), (2, 257), (1, 21)])
def test_definition(device, n, length, ratio):
    ids, epoch = torch.arange(n), torch.full((n,), 5)
    got = random_masking(n, length, ratio, seed=11, epoch=5, device=device)
    assert_same(got, by_definition(n, length, ratio, 11, epoch, ids))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 3),
    length=st.integers(2, 256),
    ratio=st.floats(0.1, 0.95),
    seed=st.integers(0, (1 << 63) - 1),
    epoch=st.integers(0, (1 << 32) - 1),
    first=st.integers(0, (1 << 48) - 4),
    draw=st.integers(0, 255),
)
def test_definition_everywhere(n, length, ratio, seed, epoch, first, draw):
    if not 0 < int(length * (1 - ratio)) < length:
        return
    ids, epochs = first + torch.arange(n), (epoch + torch.arange(n)) % (1 << 32)
    got = random_masking(n, length, ratio, seed=seed, epoch=epochs, sample_ids=ids, draw=draw)
    assert_same(got, by_definition(n, length, ratio, seed, epochs, ids, draw))


def test_more_patches_than_a_block():
    length = 2 * op._MAX_BLOCK + 77
    got = random_masking(1, length, 0.75, seed=3)
    assert_same(got, by_definition(1, length, 0.75, 3, torch.zeros(1, dtype=torch.int64), torch.arange(1)))


def test_ties_keep_the_lower_index(monkeypatch):
    keys = torch.tensor([[7, 3, 3, 9, 3, 3]])
    monkeypatch.setattr(masking_plain, "random_words", lambda *_: keys)
    got = plain(1, 6, 2, 0, 0)
    assert got[0].tolist() == [[1, 2]]
    assert got[1].tolist() == [[0, 3, 4, 5]]


def test_mask_depends_on_the_sample_not_on_the_batch(device):
    ids = torch.tensor([9, 4, 1 << 40], device=device)
    whole = random_masking(3, 64, 0.75, seed=1, epoch=2, sample_ids=ids, device=device)
    for row in range(3):
        one = random_masking(1, 64, 0.75, seed=1, epoch=2, sample_ids=ids[row : row + 1])
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, one, strict=True))


def test_epochs_may_differ_within_a_batch(device):
    both = random_masking(2, 64, 0.75, seed=1, epoch=torch.tensor([3, 4], device=device))
    for row, epoch in enumerate([3, 4]):
        alone = random_masking(2, 64, 0.75, seed=1, epoch=epoch, device=device)
        assert torch.equal(both.mask[row], alone.mask[row])


def test_every_argument_changes_the_mask(device):
    def mask(seed=0, epoch=0, first=0, draw=0):
        ids = torch.arange(first, first + 2, device=device)
        return random_masking(2, 64, 0.5, seed=seed, epoch=epoch, sample_ids=ids, draw=draw).mask

    masks = [mask(), mask(seed=1), mask(seed=1 << 32), mask(epoch=1), mask(first=2), mask(draw=1)]
    for i, a in enumerate(masks):
        assert not any(torch.equal(a, b) for b in masks[:i])


def test_inclusion_is_uniform():
    n, length, kept = 20_000, 49, 12
    got = plain(n, length, kept, 0, 0)
    share = kept / length
    deviation = (got[3] == 0).sum(0) - n * share
    # Sampling without replacement: chi-square with L - 1 degrees of freedom after this scaling. 99.9 % point of 48: 84.
    chi2 = float((deviation**2).sum() / (n * share * (1 - share)) * (length - 1) / length)
    assert 18 < chi2 < 84
    pairs = ((got[3][:, 0] == 0) & (got[3][:, 1] == 0)).double().mean()
    assert abs(pairs - share * (kept - 1) / (length - 1)) < 4 * (0.056 / n) ** 0.5


def test_large_masks_on_the_plain_path():
    n, length, kept = 2, 200_000, 50_000
    got = Masking(*plain(n, length, kept, 9, 1))
    assert_same(got, by_definition(n, length, 0.75, 9, torch.ones(n, dtype=torch.int64), torch.arange(n)))


@pytest.mark.parametrize("n", [1, 2])
def test_masks_per_image_are_consecutive_draws(device, n):
    ids, epochs = torch.arange(7, 7 + n, device=device), torch.arange(3, 3 + n, device=device)
    got = random_masking(n, 50, 0.75, seed=5, epoch=epochs, sample_ids=ids, draw=2, masks_per_image=3)
    for r in range(3):
        one = random_masking(n, 50, 0.75, seed=5, epoch=epochs, sample_ids=ids, draw=2 + r)
        assert_same(Masking(*(t[r::3].contiguous() for t in got)), Masking(*(t.cpu() for t in one)))


def test_the_last_draws(device):
    got = random_masking(1, 50, 0.75, seed=5, draw=254, masks_per_image=2, device=device)
    one = random_masking(1, 50, 0.75, seed=5, draw=255, device=device)
    assert torch.equal(got.mask[1:], one.mask)


def test_empty_batch(device):
    got = random_masking(0, 16, 0.75, seed=0, device=device)
    assert [tuple(t.shape) for t in got] == [(0, 4), (0, 12), (0, 16), (0, 16)]


def test_opcheck(device):
    ids = torch.tensor([3, 5], device=device)
    torch.library.opcheck(op._random_masking, (2, 16, 4, 1 << 40, 7, None, None, 0, device, 1, "random", 1, 16))
    torch.library.opcheck(op._random_masking, (2, 16, 4, 1, 0, ids, ids, 3, device, 2, "random", 4, 4))
    torch.library.opcheck(op._random_masking, (2, 16, 4, 1, 0, ids, ids, 3, device, 2, "block", 2, 8))
    torch.library.opcheck(op._random_masking, (2, 16, 4, 1, 0, ids, None, 3, device, 1, "grid", 4, 4))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    def f(ids, seed, epoch):
        got = random_masking(ids.shape[0], 25, 0.75, seed=seed, epoch=epoch, sample_ids=ids)
        return got.ids_keep * 2, got.mask

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, epoch in ((2, 0), (3, 1)):
        ids = torch.arange(n, device=device)
        for a, b in zip(compiled(ids, 4, epoch), f(ids, 4, epoch), strict=True):
            assert torch.equal(a, b)


def test_from_noise_is_the_order_of_facebookresearch(device):
    noise = torch.rand(3, 50, device=device)
    got = masking_from_noise(noise, 0.75)
    shuffle = noise.argsort(dim=1)
    assert torch.equal(torch.cat([got.ids_keep, got.ids_mask], dim=1), shuffle)
    assert torch.equal(got.ids_restore, shuffle.argsort(dim=1))
    mask = torch.ones(3, 50, device=device)
    mask[:, :12] = 0
    assert torch.equal(got.mask, mask.gather(1, got.ids_restore))
    assert got.mask.dtype == torch.float32


def test_from_noise_ties_keep_the_lower_index(device):
    got = masking_from_noise(torch.zeros(1, 100, device=device, dtype=torch.bfloat16), 0.9)
    assert got.ids_keep.tolist() == [list(range(9))]
    assert got.ids_mask.tolist() == [list(range(9, 100))]


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
        ("strategy: expected one of random, block, grid, got 'tube'", {"strategy": "tube"}),
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
def test_gpu_equals_cpu(length):
    ids = torch.arange(64) * 1_000_003
    want = random_masking(64, length, 0.75, seed=1 << 50, epoch=9, sample_ids=ids)
    got = random_masking(64, length, 0.75, seed=1 << 50, epoch=9, sample_ids=ids.cuda())
    assert_same(got, want)


if TRITON:
    from cross_compile import TARGETS, assert_fits, needs_compiler, record_launches

    @needs_compiler
    @pytest.mark.parametrize("target", TARGETS)
    def test_cross_compiles_for_many_patches(monkeypatch, target):
        launches = record_launches(monkeypatch, op)
        random_masking(4, 10_000, 0.75, seed=1, sample_ids=torch.arange(4))
        (launch,) = launches
        assert launch.grid == (4,)
        assert_fits(launch.compile(target), target, max_registers=128)
