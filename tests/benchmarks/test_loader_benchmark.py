"""The loader benchmark: all loaders make the same crops, in the same order."""

from __future__ import annotations

from collections import Counter

import loaders
import pytest
from training import write_images

from fastmae.data import create_loader, open_dataset
from fastmae.data.shards import ShardOptions, write_shards


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def ours(dataset, batch_size: int, size: tuple[int, int]):
    options = {"loader": "torch", "batch_size": batch_size, "img_size": size, "seed": 3, "num_threads": 1}
    with create_loader(dataset, **options) as loader:
        return [next(loader) for _ in range(3)]


@pytest.mark.parametrize("crop", ["pillow", "nvimgcodec_crop"])
def test_other_decoders_make_the_crops_of_our_loader_in_the_same_order(crop, images, tmp_path):
    if crop == "nvimgcodec_crop":
        pytest.importorskip("nvidia.nvimgcodec")
    dataset, size = open_dataset(images, cache_dir=tmp_path), (24, 32)
    plan = loaders.draw_plan(dataset, size, seed=3, epochs=2)
    batches = loaders.data_loader(dataset, plan, 5, 1, getattr(loaders, crop))
    for mine in ours(dataset, 5, size):
        theirs, ids = next(batches)
        assert ids.tolist() == mine.sample_ids.tolist()
        assert (theirs.float() - mine.images.float()).abs().mean() < 1


def test_webdataset_makes_the_crops_of_our_loader_for_the_same_samples(images, tmp_path):
    pytest.importorskip("webdataset")
    size = (24, 32)
    options = ShardOptions(images_per_shard=6, shuffle_seed=None)
    write_shards(open_dataset(images, cache_dir=tmp_path / "cache"), tmp_path / "shards", options)
    dataset = open_dataset(tmp_path / "shards", cache_dir=tmp_path / "cache")
    plan = loaders.draw_plan(dataset, size, seed=3, epochs=1)
    with create_loader(dataset, loader="torch", batch_size=len(dataset), img_size=size, seed=3) as loader:
        epoch = next(loader)
    expected = dict(zip(epoch.sample_ids.tolist(), epoch.images.float(), strict=True))
    batches = loaders.webdataset_loader(dataset, tmp_path / "shards", plan, 4, 1)
    seen: Counter[int] = Counter()
    for _ in range(5):
        crops, ids = next(batches)
        for crop, number in zip(crops, ids.tolist(), strict=True):
            assert (crop.float() - expected[number]).abs().mean() < 1
            seen[number] += 1
    assert len(seen) == len(dataset)
