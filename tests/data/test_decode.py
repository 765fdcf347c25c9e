"""Decoding images of any number of channels and any type of values; resizing them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from loading import image_file, smooth
from PIL import Image

from fastmae import create_model
from fastmae.data import Augment, create_loader, open_dataset
from fastmae.data.decode import UndecodableImage, decode, resize_crop_into
from fastmae.ops import gather_patches


def image_of(channels: int, dtype=np.uint8, height: int = 30, width: int = 40) -> np.ndarray:
    """Structure at several scales over the whole range of an integer type: (height, width, channels)."""
    values = np.stack([smooth(height, width, seed)[..., 0] for seed in range(channels)], -1)
    return values if dtype == np.uint8 else (values / 255.0 * np.iinfo(dtype).max).astype(dtype)


def tiff(values: np.ndarray, **options) -> np.ndarray:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def npy(values: np.ndarray, version=None) -> np.ndarray:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, values, version)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def saved(values: np.ndarray, format_: str) -> np.ndarray:
    return np.frombuffer(image_file(format_, values), np.uint8)


# Formats


@pytest.mark.parametrize(
    "layout",
    [{}, {"byteorder": ">"}, {"bigtiff": True}, {"compression": "zlib", "predictor": True}, {"tile": (16, 16)}],
    ids=str,
)
def test_tiff_of_any_channels(layout):
    for channels in (1, 3, 4, 13):
        values, options = image_of(channels), {"photometric": "minisblack"} | layout
        if channels > 1:
            options["planarconfig"] = "contig"
        assert np.array_equal(decode(tiff(values.squeeze(), **options), channels=channels), values)


def test_tiff_of_planes_and_of_white_zero():
    values = image_of(5)
    planes = tiff(np.moveaxis(values, -1, 0), photometric="minisblack", planarconfig="separate")
    assert np.array_equal(decode(planes, channels=5), values)
    assert np.array_equal(decode(tiff(255 - values[..., 0], photometric="miniswhite"), channels=1), values[..., :1])
    bilevel = tiff(values[..., 0] > 128, photometric="miniswhite")
    assert np.array_equal(decode(bilevel, channels=1)[..., 0], Image.open(io.BytesIO(bilevel)).convert("L"))


@pytest.mark.parametrize(("order", "version"), [("C", (1, 0)), ("F", (2, 0))])
def test_npy_of_any_channels_first_or_last(order, version):
    for channels in (1, 3, 13):
        values = image_of(channels)
        first = np.ascontiguousarray(np.moveaxis(values, -1, 0))
        assert np.array_equal(decode(npy(np.array(values, order=order), version), channels=channels), values)
        assert np.array_equal(decode(npy(first), channels=channels, channels_first=True), values)
        for channels_first in (False, True):
            decoded = decode(npy(values[..., 0]), channels=1, channels_first=channels_first)
            assert np.array_equal(decoded, values[..., :1])
    with pytest.raises(UndecodableImage, match=r"40 channels: expected 13; .*--data.channels-first"):
        decode(npy(first), channels=13)


@pytest.mark.parametrize("encode", [tiff, npy])
def test_grey_becomes_rgb_and_orientation_is_applied(encode):
    values = image_of(3)
    assert np.array_equal(decode(encode(values[..., 0])), np.repeat(values[..., :1], 3, 2))
    for orientation, turns in {1: 0, 3: 2, 6: 3, 8: 1}.items():
        assert np.array_equal(decode(encode(values), orientation), np.rot90(values, turns))


@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_a_grey_photograph_for_one_channel(format_):
    encoded = saved(image_of(1)[..., 0], format_)
    one = decode(encoded, channels=1)
    assert one.shape == (30, 40, 1)
    assert np.array_equal(np.repeat(one, 3, 2), decode(encoded))


@pytest.mark.parametrize(
    ("encoded", "channels", "message"),
    [
        (saved(image_of(3), "JPEG"), 1, r"3 channels: expected 1; set --model.in-chans 3"),
        (saved(image_of(3), "PNG"), 1, r"3 channels: expected 1"),
        (saved(image_of(3), "WEBP"), 4, r"3 channels: expected 4"),
        (tiff(image_of(5), photometric="minisblack", planarconfig="contig"), 3, r"5 channels: expected 3; set .* 5"),
        (npy(image_of(1)), 4, r"1 channels: expected 4"),
        (npy(image_of(1, np.uint16)), 1, r"type uint16: .*--data.value-range"),
        (npy(image_of(1).astype(">f4")), 1, r"type float32: .*--data.value-range"),
        (tiff(image_of(3, np.uint16)), 3, r"type uint16: .*--data.value-range"),
        (npy(np.zeros((2, 3, 4, 5), np.uint8)), 3, r"shape \(2, 3, 4, 5\)"),
        (npy(np.zeros((0, 4, 3), np.uint8)), 3, r"shape \(0, 4, 3\)"),
        (npy(np.zeros((4, 4), np.complex64)), 1, r"complex64: expected integers or floats"),
        (npy(image_of(1)[..., 0])[:-500], 1, "does not decode"),
        (tiff(image_of(1)[..., 0])[:-500], 1, "does not decode"),
    ],
)
def test_refusals_say_what_to_do(encoded, channels, message):
    with pytest.raises(UndecodableImage, match=message):
        decode(encoded, channels=channels)


def test_hostile_arrays_are_refused():
    pickled = io.BytesIO()
    np.save(pickled, np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(UndecodableImage, match="Python objects"):
        decode(np.frombuffer(pickled.getvalue(), np.uint8), channels=1)
    small = npy(image_of(1)[..., 0]).tobytes()
    terabyte = small.replace(b"(30, 40), }        ", b"(1000000, 1000000)}")
    assert terabyte != small
    with pytest.raises(UndecodableImage):
        decode(np.frombuffer(terabyte, np.uint8), channels=1)


# Values of more than 8 bits


@pytest.mark.parametrize("encode", [tiff, npy])
def test_a_value_range_is_mapped_linearly_and_clipped(encode):
    low, high = 100.0, 4000.0
    for dtype in ("u2", ">u2", "f4", ">f4", "f8", "i2", "i4", "f2"):
        values = np.linspace(-500 if np.dtype(dtype).kind != "u" else 0, 5000, 600).reshape(20, 30).astype(dtype)
        ours = decode(encode(values), channels=1, value_range=(low, high))[..., 0]
        expected = ((values.astype(np.float64) - low) / (high - low)).clip(0, 1)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-7, err_msg=dtype)


def test_wide_integers_keep_their_differences_and_what_is_not_a_number_becomes_0():
    values = np.array([[(1 << 30) + k for k in range(5)]], np.int32)
    ours = decode(npy(values), channels=1, value_range=(1 << 30, (1 << 30) + 4))
    assert ours[0, :, 0].tolist() == [0, 0.25, 0.5, 0.75, 1]
    values = np.array([[np.nan, np.inf, -np.inf, 0.5]], np.float32)
    assert decode(npy(values), channels=1, value_range=(0, 1))[..., 0].tolist() == [[0, 1, 0, 0.5]]
    with pytest.raises(UndecodableImage, match="value range for 3 channels: expected one for all, or for 4"):
        decode(npy(np.zeros((4, 4, 4), np.uint16)), channels=4, value_range=(0, 1) * 3)


def test_16_bit_pngs_and_8_bit_files_with_and_without_a_value_range():
    values, colour = image_of(1, np.uint16)[..., 0], image_of(3)
    encoded = saved(values, "PNG")
    assert np.array_equal(decode(encoded)[..., 0], values >> 8)
    mapped = decode(encoded, channels=1, value_range=(0, 32768))[..., 0]
    np.testing.assert_allclose(mapped, (values / 32768).clip(0, 1), rtol=0, atol=1e-7)
    for encoded in (tiff(colour), npy(colour), saved(colour, "PNG")):
        assert np.array_equal(decode(encoded, value_range=(0, 32768)), colour / np.float32(255))


def test_every_bit_of_a_band_reaches_the_loss(tmp_path):
    """From 16-bit files through the loader to patches and loss, normalised per band: as float64 has it."""
    low, high, mean, std = np.array([[0, 30000], [65535, 30255], [0.3, 0.6], [0.2, 0.05]], np.float64)
    stored = np.random.default_rng(0).integers(0, 256, (4, 32, 48, 2)) + np.array([40000, 30000])
    for i, image in enumerate(stored.astype(np.uint16)):
        np.save(tmp_path / f"{i}.npy", image)
    ranges = np.stack([low, high], 1).ravel().tolist()
    dataset = open_dataset(tmp_path, channels=2, value_range=ranges, cache_dir=tmp_path / "cache")
    options = {"batch_size": 4, "img_size": (32, 48), "seed": 0, "augment": Augment(crop="center", hflip=0)}
    with create_loader(dataset, loader="torch", **options) as loader:
        batch = next(loader)
    expected = ((stored[batch.sample_ids] - low) / (high - low) - mean) / std
    expected = torch.from_numpy(expected).permute(0, 3, 1, 2)
    model = create_model("mae_vit_tiny_patch16", img_size=(32, 48), in_chans=2, mean=mean, std=std, norm_pix_loss=False)
    images = model.normalized(batch.images)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=2e-6)
    assert len(images[:, 0].unique()) == len(images[:, 1].unique()) == 256
    out = model(images, noise=torch.rand(4, 6))
    patches = expected.reshape(4, 2, 2, 16, 3, 16).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    gathered = gather_patches(images, torch.arange(6).expand(4, -1), (16, 16))
    torch.testing.assert_close(gathered.double(), patches, rtol=0, atol=2e-6)
    errors = (out.pred - patches).square().mean(-1)
    torch.testing.assert_close(out.loss.double(), (errors * out.mask).sum() / out.mask.sum(), rtol=1e-5, atol=0)


# Resizing


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("size", "strides"), [((24, 20), "turned"), ((60, 70), "planes"), ((39, 34), "contiguous")])
def test_a_resized_crop_is_what_pytorch_makes_of_floats(channels, dtype, size, strides):
    """Whatever the strides; 8 bits but for rounding, each channel as if it were alone."""
    pixels = image_of(channels, height=45, width=64)
    if dtype == np.float32:
        pixels = (pixels / np.float32(255)) ** 4
    if strides == "turned":
        pixels = pixels.swapaxes(0, 1)[::-1]
    elif strides == "planes":
        pixels = np.moveaxis(np.ascontiguousarray(np.moveaxis(pixels, 2, 0)), 0, 2)
    box, out = np.array([3, 5, 39, 34]), np.empty((*size, channels), dtype)
    resize_crop_into(out, pixels, box)
    planes = torch.from_numpy(pixels[3:42, 5:39].astype(np.float32)).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size=size, mode="bicubic", antialias=True, align_corners=False)
    expected = resized.clamp(0, 255 if dtype == np.uint8 else 1)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(out, expected, rtol=0, atol=1.5 if dtype == np.uint8 else 1e-5)
    alone = np.empty((*size, 1), dtype)
    resize_crop_into(alone, pixels[..., -1:], box)
    assert np.array_equal(out[..., -1:], alone)
