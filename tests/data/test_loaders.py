"""Both loaders: one protocol, the pixels of Pillow, and the same samples, boxes and flips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from loading import KINDS, assert_equal, needs_dali, smooth, take, write_mixed
from PIL import Image, ImageOps

from fastmae.data import Augment, Dataset, crop_boxes, flips, open_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    folder = write_mixed(tmp_path_factory.mktemp("mixed"))
    return open_dataset(folder, max_bad_fraction=0, cache_dir=tmp_path_factory.mktemp("cache"))


def upright(path: str) -> Image.Image:
    image = Image.open(path)
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return ImageOps.exif_transpose(image).convert("RGB")


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_pixels_of_pillow(dataset, kind):
    augment = Augment(vflip=0.5)
    batches = take(dataset, kind, -(-len(dataset) // 5), augment=augment)
    ids = torch.cat([batch.sample_ids for batch in batches])[: len(dataset)]
    assert sorted(ids.tolist()) == list(range(len(dataset)))
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((5, 3, 32, 48), torch.uint8)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.sample_ids.dtype == batch.epochs.dtype == torch.int64
        keys = batch.sample_ids.numpy(), batch.epochs.numpy()
        boxes = crop_boxes(*keys, *dataset.shapes(keys[0]), seed=3, augment=augment)
        mirrored = flips(*keys, seed=3, augment=augment)
        for j, sample_id in enumerate(batch.sample_ids.tolist()):
            top, left, height, width = boxes[j]
            image = upright(dataset.path(sample_id)).crop((left, top, left + width, top + height))
            expected = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC)).astype(int)
            left_right, top_bottom = mirrored[j]
            expected = expected[:, ::-1] if left_right else expected
            expected = expected[::-1] if top_bottom else expected
            difference = np.abs(batch.images[j].permute(1, 2, 0).numpy() - expected)
            assert difference.mean() < 0.7, dataset.path(sample_id)
            assert difference.max() <= 4, dataset.path(sample_id)


@needs_dali
def test_loaders_agree(dataset):
    for ours, dalis in zip(take(dataset, "torch", 9), take(dataset, "dali", 9), strict=True):
        assert torch.equal(ours.sample_ids, dalis.sample_ids)
        assert torch.equal(ours.epochs, dalis.epochs)
        difference = (ours.images.int() - dalis.images.int()).abs().float()
        assert difference.mean() < 0.1  # of 255; only 16-bit files differ, by rounding
        assert difference.max() <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_and_threads_do_not_matter(dataset, kind):
    small = take(dataset, kind, 6, batch_size=2, num_threads=1)
    large = take(dataset, kind, 2, batch_size=6, num_threads=5)
    for i, tensor in enumerate(zip(*large, strict=True)):
        assert torch.equal(torch.cat(tensor), torch.cat([batch[i] for batch in small]))


def test_decoded_once_or_each_time_is_the_same(dataset, monkeypatch):
    cached = take(dataset, "torch", 8)
    decoded = []
    decode = Dataset.decode
    monkeypatch.setattr(Dataset, "decode", lambda self, i: decoded.append(i) or decode(self, i))
    assert_equal(take(dataset, "torch", 8, cache_bytes=0), cached)
    assert len(decoded) > len(dataset)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_larger_than_the_data_set(tmp_path, kind):
    Image.fromarray(smooth(40, 40, 0)).save(tmp_path / "only.png")
    dataset = open_dataset(tmp_path, cache_dir=tmp_path / ".cache")
    [batch] = take(dataset, kind, 1, batch_size=4)
    assert batch.sample_ids.tolist() == [0, 0, 0, 0]
    assert batch.epochs.tolist() == [0, 1, 2, 3]
    assert not torch.equal(batch.images[0], batch.images[1])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(dataset, kind):
    on_gpu, on_host = take(dataset, kind, 8, device="cuda"), take(dataset, "torch", 8)
    for ours, theirs in zip(on_gpu, on_host, strict=True):
        assert ours.images.is_cuda
        assert ours.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours.sample_ids.cpu(), theirs.sample_ids)
        assert (ours.images.cpu().int() - theirs.images.int()).abs().float().mean() < 2
    assert_equal(take(dataset, kind, 4, device="cuda", position=4 * 5), on_gpu[4:])
