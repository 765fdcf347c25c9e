"""Two processes with gloo: what both load together is what one would load, and they agree on the data first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from training import LOADERS, write_images, write_shards

from fastmae import data
from fastmae.data import Augment, DataError, create_loader, open_dataset
from fastmae.data.agree import check_agreement
from fastmae.ops import random_masking

SEED, GLOBAL, SMALL = 3, 7, 2
"""Seven images are two micro-batches of two images on the first rank, and on the second one of two and one of one."""
AUGMENT = Augment(vflip=0.3, color_jitter=0.2)


def sizes(epoch: int) -> tuple[int, int]:
    return (32, 48) if epoch else (16, 24)


def take(dataset, kind: str, count: int, *, position: int = 0, rank: int = 0, world_size: int = 1) -> list[tuple]:
    """Batches from a position on, with their masks: whole steps in a single process, else micro-batches."""
    options = {"img_size": sizes, "seed": SEED, "augment": AUGMENT, "num_threads": 1}
    options |= {"batch_size": GLOBAL if world_size == 1 else SMALL, "samples_per_step": GLOBAL}
    ranks = {"rank": rank, "world_size": world_size, "position": position}
    taken = []
    with create_loader(dataset, loader=kind, **options, **ranks) as loader:
        for _ in range(count):
            batch = next(loader)
            grid = tuple(side // 8 for side in batch.images.shape[-2:])
            masking = random_masking(
                len(batch.images),
                grid[0] * grid[1],
                0.75,
                seed=SEED,
                epoch=batch.epochs,
                sample_ids=batch.sample_ids,
                grid_size=grid,
                masks_per_image=2,
            )
            taken.append((batch.images.contiguous(), batch.sample_ids, batch.epochs, *masking))
    return taken


def kinds() -> list[str]:
    return ["torch", "dali"] if data.has_dali() else ["torch"]


def load(rank: int, folder: Path) -> dict:
    """One of two ranks: all that the tests below ask for."""
    results, cache = {}, folder / f"cache-{rank}"
    for name in ("folder", "shards", "small"):
        dataset = open_dataset(folder / name, cache_dir=cache)
        check_agreement(dataset)
        for kind in kinds():
            results[name, kind] = take(dataset, kind, 14, rank=rank, world_size=2)
            results[name, kind, "half-way"] = take(dataset, kind, 10, position=14, rank=rank, world_size=2)
    try:
        check_agreement(open_dataset(folder / ("folder", "fewer")[rank], cache_dir=cache))
    except DataError as error:
        results["error"] = str(error)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    write_images(root / "folder", 11)
    write_shards(root / "shards", root / "folder")
    write_images(root / "small", 3)
    write_images(root / "fewer", 10)
    return root


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    """What each rank got."""
    return run_ranks(load, 2, folder, timeout=120.0)


def joined(ranks: list[dict], *key: str) -> list[tuple]:
    """Global batches: of each micro-batch rank 0's images, then rank 1's."""
    first, second = (rank[key] for rank in ranks)
    assert [len(batch[0]) for batch in first[:2]] == [2, 2]
    assert [len(batch[0]) for batch in second[:2]] == [2, 1]
    ordered = [batch for pair in zip(first, second, strict=True) for batch in pair]
    steps = [ordered[start : start + 4] for start in range(0, len(ordered), 4)]
    return [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in steps]


def assert_equal(ours: list[tuple], theirs: list[tuple]) -> None:
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), step


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("name", ["folder", "shards", "small"])
def test_two_ranks_load_what_one_process_loads(folder, ranks, name, kind):
    """Images, ids, epochs and masks, also where three images serve a batch of seven; sizes change on both at once."""
    dataset = open_dataset(folder / name, cache_dir=folder / "cache")
    alone = take(dataset, kind, 7)
    assert_equal(joined(ranks, name, kind), alone)
    assert {batch[0].shape[2] for batch in alone} == {16, 32}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("name", ["folder", "shards"])
def test_another_number_of_ranks_goes_on_half_way_through_an_epoch(folder, ranks, name, kind):
    """From 2 ranks to 1 and from 1 to 2 after 14 of 11 + 11 samples: each remaining one once, with the same crop, flip,
    jitter and mask."""
    dataset = open_dataset(folder / name, cache_dir=folder / "cache")
    undisturbed = take(dataset, kind, 7)
    to_one = joined(ranks, name, kind)[:2] + take(dataset, kind, 5, position=14)
    to_two = take(dataset, kind, 2) + joined(ranks, name, kind, "half-way")
    for run in (to_one, to_two):
        assert_equal(run, undisturbed)
        ids, epochs = (torch.cat([batch[i] for batch in run]).tolist() for i in (1, 2))
        for epoch in range(4):
            assert sorted(i for i, e in zip(ids, epochs, strict=True) if e == epoch) == list(range(11))


def test_ranks_that_see_different_data_say_which(ranks):
    for rank in ranks:
        assert "the ranks see different data" in rank["error"]
        assert "rank 1 has 10 images" in rank["error"]
