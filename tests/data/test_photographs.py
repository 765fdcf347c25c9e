"""The embedded photographs, held-out ones, and pictures for the reconstruct command."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
import torch
from loading import rotated
from PIL import Image, ImageOps

from fastmae.data import (
    Augment,
    DataError,
    create_loader,
    fixed_crops,
    open_dataset,
    photographs,
    read_images,
    validation_photographs,
)


def test_splits():
    assert not set(photographs.TRAINING) & set(photographs.VALIDATION.values())
    scenes = [name.split("_left")[0].split("_right")[0] for name in photographs.TRAINING]
    assert not set(scenes) & {name.split(".")[0] for name in photographs.VALIDATION.values()}
    dataset = open_dataset(None)
    assert dataset.embedded
    assert dataset.bad == []
    assert len(dataset) == len(photographs.TRAINING)
    for sample_id in range(len(dataset)):
        pixels = dataset.decode(sample_id)
        assert pixels.shape == (*dataset.shape(sample_id), 3)
        assert pixels.std() > 5


def test_batches_are_whole_epochs_and_various():
    with create_loader(open_dataset(None), loader="torch", batch_size=14, img_size=(32, 32), seed=0) as loader:
        batches = [next(loader) for _ in range(6)]
    for epoch, batch in enumerate(batches):
        assert sorted(batch.sample_ids.tolist()) == list(range(14))
        assert (batch.epochs == epoch).all()
    first = torch.cat([batch.images[batch.sample_ids == 0] for batch in batches])
    assert len(torch.unique(first.flatten(1), dim=0)) == 6


def test_validation_split():
    names, images = validation_photographs((32, 96))
    assert names == list(photographs.VALIDATION)
    assert images.shape == (len(names), 3, 32, 96)
    assert images.dtype == torch.uint8
    assert (images.float().std((1, 2, 3)) > 20).all()


def test_files_missing_from_another_version(monkeypatch, caplog):
    monkeypatch.setattr(photographs, "TRAINING", ("astronaut.png", "not_there.png"))
    assert len(open_dataset(None)) == 1
    assert "not_there.png" in caplog.text
    monkeypatch.setattr(photographs, "TRAINING", ("not_there.png",))
    with pytest.raises(DataError, match="found none"):
        open_dataset(None)


def test_fixed_crops_are_those_of_a_loader():
    dataset, augment = open_dataset(None), Augment(scale=(0.3, 0.6))
    crops = fixed_crops(dataset, (24, 32), seed=5, epoch=3, count=16, augment=augment)
    options = {"batch_size": 16, "img_size": (24, 32), "seed": 5, "position": 3 * len(dataset), "augment": augment}
    with create_loader(dataset, loader="torch", **options) as loader:
        assert torch.equal(next(loader).images, crops)
    assert not torch.equal(crops, fixed_crops(dataset, (24, 32), seed=6, epoch=3, count=16, augment=augment))


def test_fixed_crops_replace_what_does_not_decode(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for i in range(3):
        Image.fromarray(noise + np.uint8(i)).save(tmp_path / f"{i}.png")
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[:500] + bytes(500) + content[1000:])
    options = {"img_size": (16, 16), "seed": 0, "epoch": 1, "count": 6}
    dataset = open_dataset(tmp_path, max_bad_fraction=0.4, cache_dir=tmp_path / ".cache")
    assert fixed_crops(dataset, **options).shape == (6, 3, 16, 16)
    with pytest.raises(DataError, match=r"1\.png: does not decode"):
        fixed_crops(open_dataset(tmp_path, max_bad_fraction=0, cache_dir=tmp_path / ".cache"), **options)


def test_read_images_turns_crops_and_resizes(tmp_path):
    gradient = np.zeros((60, 100, 3), np.uint8)
    gradient[..., 0] = np.linspace(0, 255, 100)
    gradient[..., 1] = np.linspace(0, 255, 60)[:, None]
    Image.fromarray(gradient).save(tmp_path / "turned.png", exif=rotated(6))
    Image.fromarray(gradient[..., 0]).save(tmp_path / "grey.jpg", quality=95)
    images = read_images([tmp_path / "turned.png", str(tmp_path / "grey.jpg")], (30, 20))
    assert images.shape == (2, 3, 30, 20)
    assert images.dtype == torch.uint8
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    expected = np.asarray(ImageOps.fit(upright, (20, 30), Image.Resampling.BICUBIC))
    assert np.abs(images[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 3
    assert (images[1, 0] == images[1, 2]).all()


def test_read_images_of_other_kinds(tmp_path):
    """As a run reads them: 16-bit grey in its range, bands with their channels first."""
    grey = np.linspace(1000, 3000, 16 * 24).astype(np.uint16).reshape(16, 24)
    tifffile.imwrite(tmp_path / "grey.tif", grey)
    options = {"channels": 1, "value_range": (1000, 3000)}
    found = read_images([tmp_path / "grey.tif"], (16, 24), **options)
    np.testing.assert_allclose(found[0, 0], (grey - 1000) / 2000, atol=1e-6)
    bands = np.random.default_rng(0).integers(0, 256, (12, 16, 24), dtype=np.uint8)
    np.save(tmp_path / "bands.npy", bands)
    found = read_images([tmp_path / "bands.npy"], (16, 24), channels=12, channels_first=True)
    assert found.dtype == torch.uint8
    assert np.array_equal(found[0], bands)
    with pytest.raises(
        DataError, match=r"24 channels: expected 12; shape \(12, 16, 24\) looks channels-first: --data.ch"
    ):
        read_images([tmp_path / "bands.npy"], (16, 24), channels=12)


def test_read_images_names_the_file_that_fails(tmp_path):
    path = tmp_path / "picture.jpg"
    for content in (None, b"", b"plain text", b"\xff\xd8\xff\xe0 a broken jpeg"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=r"picture\.jpg"):
            read_images([path], (16, 16))
