"""What is in the batches: Pillow's pixels from both loaders, sizes by epoch, crop modes, colours, channels."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from loading import KINDS, OPTIONS, assert_equal, needs_dali, smooth, take
from PIL import Image, ImageOps

from fastmae.data import Augment, DataError, choose_loader, create_loader, crop_boxes, flips, host, open_dataset
from fastmae.data.augment import jitter_factors, jitter_into
from fastmae.data.decode import compiled, render_photographs
from fastmae.data.shards import write_shards


def upright(path: str) -> Image.Image:
    image = Image.open(path)
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return ImageOps.exif_transpose(image).convert("RGB")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("crop", ["random", "fixed", "center"])
def test_every_format_gives_the_pixels_of_pillow(mixed, kind, crop):
    augment, size = Augment(crop=crop, vflip=0.5), (32, 48)
    batches = take(mixed, kind, -(-len(mixed) // 5), augment=augment)
    ids = torch.cat([batch.sample_ids for batch in batches])[: len(mixed)]
    assert sorted(ids.tolist()) == list(range(len(mixed)))
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((5, 3, *size), torch.uint8)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.sample_ids.dtype == batch.epochs.dtype == torch.int64
        keys = batch.sample_ids.numpy(), batch.epochs.numpy()
        boxes = crop_boxes(*keys, *mixed.shapes(keys[0]), seed=3, augment=augment, img_size=size)
        mirrored = flips(*keys, seed=3, augment=augment)
        for j, sample_id in enumerate(batch.sample_ids.tolist()):
            top, left, height, width = boxes[j]
            image = upright(mixed.path(sample_id)).crop((left, top, left + width, top + height))
            expected = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
            left_right, top_bottom = mirrored[j]
            expected = expected[:, ::-1] if left_right else expected
            expected = expected[::-1] if top_bottom else expected
            difference = np.abs(batch.images[j].permute(1, 2, 0).numpy() - expected)
            assert difference.mean() < 0.7, mixed.path(sample_id)
            assert difference.max() <= 4, mixed.path(sample_id)


@needs_dali
def test_loaders_agree(mixed):
    for ours, dalis in zip(take(mixed, "torch", 9), take(mixed, "dali", 9), strict=True):
        assert torch.equal(ours.sample_ids, dalis.sample_ids)
        assert torch.equal(ours.epochs, dalis.epochs)
        difference = (ours.images.int() - dalis.images.int()).abs().float()
        assert difference.mean() < 0.1  # of 255; only 16-bit files differ, by rounding
        assert difference.max() <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_and_threads_do_not_matter(mixed, kind):
    small = take(mixed, kind, 6, batch_size=2, num_threads=1)
    large = take(mixed, kind, 2, batch_size=6, num_threads=5)
    for i, tensor in enumerate(zip(*large, strict=True)):
        assert torch.equal(torch.cat(tensor), torch.cat([batch[i] for batch in small]))


@pytest.mark.parametrize("kind", KINDS)
def test_torchscript_changes_no_pixel(mixed, kind, monkeypatch):
    if sys.version_info < (3, 14):
        assert isinstance(compiled(render_photographs), torch.jit.ScriptFunction)
    scripted = take(mixed, kind, 9, cache_bytes=0)
    monkeypatch.setattr(host, "compiled", lambda render: render)
    assert_equal(take(mixed, kind, 9, cache_bytes=0), scripted)


def test_images_that_fit_are_decoded_once(mixed, monkeypatch):
    reads, read = [], mixed.storage.read
    monkeypatch.setattr(mixed.storage, "read", lambda *where: reads.append(where) or read(*where))
    cached = take(mixed, "torch", 8)
    assert len(reads) == len(set(reads))
    assert_equal(take(mixed, "torch", 8, cache_bytes=0), cached)
    assert len(reads) > 2 * len(mixed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_larger_than_the_data_set(tmp_path, open_, kind):
    Image.fromarray(smooth(40, 40, 0)).save(tmp_path / "only.png")
    [batch] = take(open_(tmp_path), kind, 1, batch_size=4)
    assert batch.sample_ids.tolist() == [0, 0, 0, 0]
    assert batch.epochs.tolist() == [0, 1, 2, 3]
    assert not torch.equal(batch.images[0], batch.images[1])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(mixed, kind):
    on_gpu = take(mixed, kind, 8, device="cuda", img_size=by_epoch)
    on_host = take(mixed, "torch", 8, img_size=by_epoch)
    for ours, theirs in zip(on_gpu, on_host, strict=True):
        assert ours.images.is_cuda
        assert ours.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours.sample_ids.cpu(), theirs.sample_ids)
        assert (ours.images.cpu().int() - theirs.images.int()).abs().float().mean() < 2
    assert_equal(take(mixed, kind, 4, device="cuda", img_size=by_epoch, position=4 * 5), on_gpu[4:])


def difference(first, second) -> float:
    """Mean absolute difference of two lists of batches, of 255."""
    pairs = zip(first, second, strict=True)
    return float(torch.stack([(a.images.int() - b.images.int()).abs().float().mean() for a, b in pairs]).mean())


@needs_dali
@pytest.mark.parametrize(("color_jitter", "limit"), [(0.0, 0.5), (0.4, 15.0)])
def test_what_a_gpu_would_do(dataset, color_jitter, limit):
    """The operators that a GPU's pipeline has, run on the CPU, against the host's functions."""
    import nvidia.dali.fn as fn
    from nvidia.dali import Pipeline

    from fastmae.data.dali import decoded_crops, finished_images, pipeline_inputs

    options = {"batch_size": 11, "img_size": (96, 80), "seed": 3}
    augment = Augment(vflip=0.5, color_jitter=color_jitter)
    with create_loader(dataset, loader="torch", augment=augment, **options) as loader:
        plan, batch = loader.planner.plan(0), next(loader)
        values = pipeline_inputs(plan, [dataset.read(source.sample_id) for source in plan.sources], finished=True)
    pipeline = Pipeline(11, 2, None, prefetch_queue_depth=1)
    with pipeline:
        inputs = {name: fn.external_source(name=name) for name in values}
        pipeline.set_outputs(finished_images(decoded_crops(inputs, "cpu", {}), inputs))
    pipeline.build()
    images = torch.from_numpy(pipeline.run(**values)[0].as_array()).permute(0, 3, 1, 2)
    mean = difference([batch], [batch._replace(images=images)])
    assert mean < limit
    if color_jitter:  # the same factors, each where it belongs: closer than without
        [plain] = take(dataset, "torch", 1, **(options | {"augment": Augment(vflip=0.5)}))
        assert mean < 0.5 * difference([batch], [plain])


@pytest.mark.gpu
@needs_dali
@pytest.mark.parametrize("color_jitter", [0.0, 0.4])
def test_loaders_agree_on_a_gpu(dataset, color_jitter):
    options = {"batch_size": 11, "img_size": (224, 224), "augment": Augment(color_jitter=color_jitter)}
    on_gpu = [batch._replace(images=batch.images.cpu()) for batch in take(dataset, "dali", 3, device="cuda", **options)]
    # Contrast turns around the image's mean on the host, around mid-grey in DALI.
    assert difference(take(dataset, "torch", 3, **options), on_gpu) < (2 if color_jitter == 0 else 20)


# Sizes by epoch


def by_epoch(epoch: int) -> tuple[int, int]:
    return [(16, 24), (32, 32), (48, 40)][min(epoch, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_by_epoch(dataset, kind):
    batches = take(dataset, kind, 8, img_size=by_epoch)
    for step, batch in enumerate(batches):
        assert batch.images.shape[2:] == by_epoch(5 * step // len(dataset))
    assert len({batch.images.shape for batch in batches}) == 3
    for step in (1, 3):
        assert_equal(take(dataset, kind, 8 - step, img_size=by_epoch, position=5 * step), batches[step:])
    assert_equal(take(dataset, kind, 1, img_size=(16, 24)), batches[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_have_one_size_where_an_epoch_begins(dataset, kind):
    ranks = [take(dataset, kind, 4, img_size=by_epoch, rank=r, world_size=3, batch_size=2) for r in range(3)]
    straddled = 0
    for step, batches in enumerate(zip(*ranks, strict=True)):
        sizes = {batch.images.shape for batch in batches}
        assert sizes == {(2, 3, *by_epoch(6 * step // len(dataset)))}
        straddled += len({int(epoch) for batch in batches for epoch in batch.epochs}) > 1
    assert straddled


# Colours


@pytest.mark.parametrize("kind", KINDS)
def test_jitter_in_batches(dataset, kind):
    plain = take(dataset, kind, 4)
    jittered = take(dataset, kind, 4, augment=Augment(color_jitter=0.4))
    seed = OPTIONS["seed"]
    for before, after in zip(plain, jittered, strict=True):
        keys = before.sample_ids.numpy(), before.epochs.numpy()
        factors = jitter_factors(*keys, seed=seed, augment=Augment(color_jitter=0.4))
        for j in range(len(factors)):
            expected = before.images[j].permute(1, 2, 0).contiguous().numpy()
            jitter_into(expected, factors[j])
            assert np.array_equal(after.images[j].permute(1, 2, 0).numpy(), expected)


# Channels


def test_channels_first_bands_in_a_range_of_their_own_are_cropped_as_photographs_are(tmp_path):
    """Boxes, flips and replacements are those of the same images in 8 bits; values are exact, not of 256 steps."""
    for name in ("bytes", "bands"):
        (tmp_path / name).mkdir()
    ranges = (-1.0, 1.0, 270.0, 330.0, 0.0, 1e4, 5.0, 6.0)
    low, high = np.reshape(ranges, (4, 2)).T
    for i in range(6):
        image = np.stack([smooth(60 + i, 70, 20 * i + c)[..., 0] for c in range(4)], -1)
        np.save(tmp_path / "bytes" / f"{i}.npy", image)
        bands = (image / 255 * (high - low) + low).astype(np.float32)
        np.save(tmp_path / "bands" / f"{i}.npy", np.ascontiguousarray(np.moveaxis(bands, -1, 0)))
    options = {"channels": 4, "cache_dir": tmp_path / ".cache"}
    plain = open_dataset(tmp_path / "bytes", **options)
    with pytest.raises(DataError, match=r"looks channels-first: --data.channels-first\)"):
        open_dataset(tmp_path / "bands", value_range=ranges, **options)
    dataset = open_dataset(tmp_path / "bands", value_range=ranges, channels_first=True, **options)
    assert dataset.shape(3) == (63, 70)
    assert choose_loader(dataset) == "torch"
    ours = take(dataset, "torch", 3)
    assert_equal(take(dataset, "torch", 3, cache_bytes=0), ours)
    for batch, other in zip(ours, take(plain, "torch", 3), strict=True):
        assert torch.equal(batch.sample_ids, other.sample_ids)
        assert (batch.images.shape, batch.images.dtype) == ((5, 4, 32, 48), torch.float32)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert (batch.images * 255 - other.images).abs().max() < 1.5  # PyTorch rounds after each of two passes
    assert len(ours[0].images[:, 1].unique()) > 5000
    write_shards(dataset, tmp_path / "shards")
    packed = open_dataset(tmp_path / "shards", value_range=ranges, channels_first=True, **options)
    sums = [sorted(float(every.decode(i).sum()) for i in range(6)) for every in (dataset, packed)]
    assert sums[0] == sums[1]
    with pytest.raises(ValueError, match="color_jitter: hue and saturation need 3 channels"):
        create_loader(dataset, augment=Augment(color_jitter=0.4), **OPTIONS)
    with pytest.raises(DataError, match=r"the DALI loader reads 8-bit RGB .* is opened for 4 channels: use torch"):
        create_loader(dataset, **OPTIONS | {"loader": "dali"})


def test_grey_photographs_for_one_channel_and_a_warning_of_16_bits(tmp_path, caplog):
    options = {"channels": 1, "cache_dir": tmp_path / ".cache"}
    for i, suffix in enumerate(("jpg", "png")):
        Image.fromarray(smooth(40, 50, i)[..., 0]).save(tmp_path / f"{i}.{suffix}")
    [batch] = take(open_dataset(tmp_path, **options), "torch", 1)
    assert batch.images.shape == (5, 1, 32, 48)
    Image.fromarray(smooth(40, 50, 0)[..., 0].astype(np.uint16) * 256).save(tmp_path / "a.png")
    for _ in range(2):  # the second time from the cached index
        caplog.clear()
        open_dataset(tmp_path, **options)
        assert "16-bit PNG files, of which only the upper 8 bits are used" in caplog.text
    caplog.clear()
    open_dataset(tmp_path, value_range=(0, 65535), **options)
    assert caplog.text == ""
