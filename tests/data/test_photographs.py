"""The embedded photographs, fixed crops of a data set, and image files as a model sees them."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import tifffile
import torch
from loading import image_file, noise, rotated
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


def test_the_splits_are_pictures_and_share_no_scene():
    scenes = {name.split("_left")[0].split("_right")[0] for name in photographs.TRAINING}
    assert not scenes & {name.split(".")[0] for name in photographs.VALIDATION.values()}
    dataset = open_dataset(None)
    assert dataset.embedded
    assert dataset.bad == []
    assert len(dataset) == len(photographs.TRAINING)
    for sample_id in range(len(dataset)):
        pixels = dataset.decode(sample_id)
        assert pixels.shape == (*dataset.shape(sample_id), 3)
        assert pixels.std() > 5
    names, images = validation_photographs((32, 96))
    assert names == list(photographs.VALIDATION)
    assert (images.shape, images.dtype) == ((len(names), 3, 32, 96), torch.uint8)
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
    for i in range(3):
        content = image_file("PNG", noise(40, 40, i))
        (tmp_path / f"{i}.png").write_bytes(content if i != 1 else content[:500] + bytes(500) + content[1000:])
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
    assert (images.shape, images.dtype) == ((2, 3, 30, 20), torch.uint8)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    expected = np.asarray(ImageOps.fit(upright, (20, 30), Image.Resampling.BICUBIC))
    assert np.abs(images[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 3
    assert (images[1, 0] == images[1, 2]).all()


def test_read_images_of_16_bits_and_of_many_bands(tmp_path):
    grey = np.linspace(1000, 3000, 16 * 24).astype(np.uint16).reshape(16, 24)
    tifffile.imwrite(tmp_path / "grey.tif", grey)
    found = read_images([tmp_path / "grey.tif"], (16, 24), channels=1, value_range=(1000, 3000))
    np.testing.assert_allclose(found[0, 0], (grey - 1000) / 2000, atol=1e-6)
    bands = np.random.default_rng(0).integers(0, 256, (12, 16, 24), dtype=np.uint8)
    np.save(tmp_path / "bands.npy", bands)
    found = read_images([tmp_path / "bands.npy"], (16, 24), channels=12, channels_first=True)
    assert found.dtype == torch.uint8
    assert np.array_equal(found[0], bands)


def test_read_images_names_the_file_that_fails(tmp_path):
    path = tmp_path / "picture.png"
    bomb = image_file("PNG", noise())[:16] + b"\0\1\0\0\0\1\0\0" + image_file("PNG", noise())[24:]
    bomb = bomb[:29] + zlib.crc32(bomb[12:29]).to_bytes(4, "big") + bomb[33:]
    for content, reason in {None: "no such file", b"": "empty", b"plain text": "not a JPEG", bomb: "huge"}.items():
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=rf"picture\.png: {reason}"):
            read_images([path], (16, 16))
