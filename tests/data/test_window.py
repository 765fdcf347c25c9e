"""Shards in windows: fewer are open at a time, and loaders, resuming and ranks are as without windows."""

from __future__ import annotations

import numpy as np
import pytest
from loading import smooth
from PIL import Image

from fastmae.data import create_loader, open_dataset
from fastmae.data.shards import ShardOptions, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("window")
    (root / "images").mkdir()
    for number in range(60):
        Image.fromarray(smooth(24, 24, number)).save(root / "images" / f"{number:02}.png")
    dataset = open_dataset(root / "images", cache_dir=root / "cache")
    write_shards(dataset, root / "shards", ShardOptions(images_per_shard=5))
    return root / "shards"


def batches(dataset, count: int, *, position: int = 0, **ranks) -> np.ndarray:
    options = {"batch_size": 6, "img_size": (16, 16), "seed": 3, "loader": "torch", "position": position} | ranks
    with create_loader(dataset, **options) as loader:
        return np.stack([next(loader).sample_ids.numpy() for _ in range(count)])


def test_a_window_is_read_before_the_next_and_each_image_once(shards):
    dataset = open_dataset(shards, window=3)
    ids = batches(dataset, 10).ravel()
    assert np.array_equal(np.sort(ids), np.arange(60))
    assert [len(set(ids[first : first + 15] // 5)) for first in range(0, 60, 15)] == [3] * 4
    assert len(set(batches(open_dataset(shards), 10).ravel()[:15] // 5)) > 3


def test_resumed_and_on_two_ranks_it_is_the_same_order(shards):
    dataset = open_dataset(shards, window=3)
    whole = batches(dataset, 20)
    assert np.array_equal(batches(dataset, 7, position=13 * 6), whole[13:])
    ranks = [batches(dataset, 10, rank=rank, world_size=2) for rank in range(2)]
    assert np.array_equal(np.stack(ranks, 1).ravel(), whole.ravel())


def test_the_default_depends_on_the_number_of_shards(shards, monkeypatch):
    assert open_dataset(shards).window == 0
    monkeypatch.setattr("fastmae.data.dataset.MOST_WITHOUT_WINDOW", 11)
    assert open_dataset(shards).window == 256
    assert open_dataset(shards, window=0).window == 0


def test_a_window_of_what_is_not_shards_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="window: expected at least 0, got -1"):
        open_dataset(shards, window=-1)
    with pytest.raises(ValueError, match=r"window: expected 0, because .*images holds no shards, got 2"):
        open_dataset(shards.parent / "images", cache_dir=tmp_path, window=2)
    with pytest.raises(ValueError, match="window: expected 0, because the embedded photographs are not shards"):
        open_dataset(None, window=2)
