"""Ranks with uneven shares load together what one process would load, from an index that rank 0 has published."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from training import LOADERS, write_images, write_shards

from fastmae import data
from fastmae.data import Augment, create_loader, open_dataset, open_once
from fastmae.train.ranks import Ranks

GLOBAL, SMALL = 7, 2
"""Seven images are two micro-batches of two images on the first rank, and on the second one of two and one of one."""


def sizes(epoch: int) -> tuple[int, int]:
    return (32, 48) if epoch else (16, 24)


def take(dataset, kind: str, count: int, *, position: int = 0, rank: int = 0, world_size: int = 1) -> list[tuple]:
    """Batches from a position on: whole steps in a single process, else micro-batches."""
    options = {"img_size": sizes, "seed": 3, "augment": Augment(vflip=0.3, color_jitter=0.2), "num_threads": 1}
    options |= {"batch_size": GLOBAL if world_size == 1 else SMALL, "samples_per_step": GLOBAL}
    place = {"rank": rank, "world_size": world_size, "position": position}
    with create_loader(dataset, loader=kind, **options, **place) as loader:
        return [tuple(tensor.clone() for tensor in next(loader)) for _ in range(count)]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("images", [3, 11])
def test_two_ranks_load_what_one_process_loads(tmp_path, kind, images):
    """From the beginning and from the middle of an epoch; sizes change on both ranks at once."""
    dataset = open_dataset(write_images(tmp_path / "images", images), cache_dir=tmp_path / "cache")
    alone = take(dataset, kind, 7)
    assert {batch[0].shape[2] for batch in alone} == {16, 32}
    for first in (0, 2):
        count = 2 * (7 - first)
        ranks = [take(dataset, kind, count, position=first * GLOBAL, rank=rank, world_size=2) for rank in range(2)]
        assert [[len(batch[0]) for batch in rank[:2]] for rank in ranks] == [[2, 2], [2, 1]]
        ordered = [batch for pair in zip(*ranks, strict=True) for batch in pair]
        for step, expected in enumerate(alone[first:]):
            parts = zip(*ordered[4 * step : 4 * step + 4], strict=True)
            assert all(torch.equal(torch.cat(part), whole) for part, whole in zip(parts, expected, strict=True)), step


def looked_at(path: Path, first) -> tuple[set[str], data.Dataset]:
    """What is listed or asked for below a folder while a data set is opened on all ranks, but for the index itself."""
    seen: set[str] = set()

    def noted(function):
        def call(name=".", *arguments, **options):
            seen.add(os.fspath(name) if isinstance(name, str | os.PathLike) else "")
            return function(name, *arguments, **options)

        return call

    with patch.object(os, "scandir", noted(os.scandir)), patch.object(os, "stat", noted(os.stat)):
        dataset = open_once(partial(open_dataset, path), first)
    asked = (".fastmae", "dataset_dict.json", "state.json")  # of an index, and of a folder of Hugging Face's
    inside = {name for name in seen if name.startswith(f"{path}/") and not any(one in name for one in asked)}
    return inside, dataset


def open_together(rank: int, folder: Path) -> dict:
    """What a rank looks at, opens and loads."""
    results, cache = {}, folder / f"cache-{rank}"
    with Ranks.create() as ranks:
        first = partial(ranks.first, "opening the data")
        for name in ("images", "shards"):
            results["looked at", name], dataset = looked_at(folder / name, first)
            results["hash", name] = dataset.hash
            results["taken", name] = take(dataset, "torch", 2)
        # A rank that does not see what rank 0 has kept, as on a node with a home of its own.
        own = partial(open_dataset, folder / "images", cache_dir=cache)
        with patch("fastmae.data.open.MANIFEST", "missing"):
            results["hash", "listed again"] = open_once(own, first).hash
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    write_shards(folder / "shards", write_images(folder / "images", 11))
    return run_ranks(open_together, 2, folder)


def test_the_second_rank_opens_the_index_that_the_first_has_published_and_lists_nothing(ranks):
    for name in ("images", "shards"):
        assert ranks[0]["looked at", name] != set()
        assert ranks[1]["looked at", name] == set()
        assert ranks[0]["hash", name] == ranks[1]["hash", name]
        for ours, theirs in zip(ranks[0]["taken", name], ranks[1]["taken", name], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    assert ranks[0]["hash", "listed again"] == ranks[1]["hash", "listed again"] == ranks[0]["hash", "images"]
