"""Ranks with uneven shares load together what one process would load, and two processes agree on the data first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from training import LOADERS, write_images

from fastmae.data import Augment, DataError, create_loader, open_dataset
from fastmae.data.agree import check_agreement

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


def disagree(rank: int, folder: Path) -> str:
    check_agreement(open_dataset(folder / "images", cache_dir=folder / f"cache-{rank}"))
    other = open_dataset(folder / ("images", "fewer")[rank], cache_dir=folder / f"cache-{rank}")
    with pytest.raises(DataError) as error:
        check_agreement(other)
    return str(error.value)


def test_ranks_that_see_different_data_say_which(tmp_path):
    write_images(tmp_path / "images", 11)
    write_images(tmp_path / "fewer", 10)
    for error in run_ranks(disagree, 2, tmp_path):
        assert "the ranks see different data" in error
        assert "rank 1 has 10 images" in error
