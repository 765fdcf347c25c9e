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

from fastmae.data.decode import UndecodableImage, decode, resize_crop_into


def image_of(channels: int, dtype=np.uint8, height: int = 30, width: int = 40) -> np.ndarray:
    """Structure at several scales over the whole range of an integer type: (height, width, channels)."""
    planes = [smooth(height, width, seed)[..., 0] for seed in range(channels)]
    values = np.stack(planes, -1)
    if dtype == np.uint8:
        return values
    return (values / 255.0 * np.iinfo(dtype).max).astype(dtype)


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


LAYOUTS = {
    "contiguous": {},
    "big-endian": {"byteorder": ">"},
    "bigtiff": {"bigtiff": True},
    "deflate": {"compression": "zlib", "predictor": True},
    "tiled": {"tile": (16, 16)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiff_of_any_channels(layout):
    for channels in (1, 3, 4, 13):
        values, options = image_of(channels), {"photometric": "minisblack"} | LAYOUTS[layout]
        if channels > 1:
            options["planarconfig"] = "contig"
        stored = values if channels > 1 else values[..., 0]
        assert np.array_equal(decode(tiff(stored, **options), channels=channels), values)


def test_tiff_of_planes_and_of_white_zero():
    values = image_of(5)
    planes = tiff(np.moveaxis(values, -1, 0), photometric="minisblack", planarconfig="separate")
    assert np.array_equal(decode(planes, channels=5), values)
    assert np.array_equal(decode(tiff(255 - values[..., 0], photometric="miniswhite"), channels=1), values[..., :1])
    bilevel = tiff(values[..., 0] > 128, photometric="miniswhite")
    pillows = np.asarray(Image.open(io.BytesIO(bilevel)).convert("L"))
    assert np.array_equal(decode(bilevel, channels=1)[..., 0], pillows)


@pytest.mark.parametrize(("order", "version"), [("C", (1, 0)), ("F", (2, 0))])
def test_npy_of_any_channels(order, version):
    for channels in (1, 3, 13):
        values = image_of(channels)
        assert np.array_equal(decode(npy(np.array(values, order=order), version), channels=channels), values)
        assert np.array_equal(decode(npy(values[..., 0]), channels=1), values[..., :1])


def test_channels_first_npy():
    values = image_of(12)
    first = np.ascontiguousarray(np.moveaxis(values, -1, 0))
    assert np.array_equal(decode(npy(first), channels=12, channels_first=True), values)
    assert np.array_equal(decode(npy(values[..., 0]), channels=1, channels_first=True), values[..., :1])
    with pytest.raises(UndecodableImage, match="40 channels: expected 12"):
        decode(npy(first), channels=12)


@pytest.mark.parametrize("encode", [tiff, npy])
def test_grey_becomes_rgb_and_orientation_is_applied(encode):
    values = image_of(3)
    assert np.array_equal(decode(encode(values[..., 0])), np.repeat(values[..., :1], 3, 2))
    for orientation, turns in {1: 0, 3: 2, 6: 3, 8: 1}.items():
        assert np.array_equal(decode(encode(values), orientation), np.rot90(values, turns))


@pytest.mark.parametrize("encode", [tiff, npy])
def test_a_value_range_is_mapped_linearly_and_clipped(encode):
    low, high = 100.0, 4000.0
    for dtype in ("u2", ">u2", "f4", ">f4", "f8", "i2", "i4", "f2"):
        values = np.linspace(-500 if np.dtype(dtype).kind != "u" else 0, 5000, 600).reshape(20, 30).astype(dtype)
        ours = decode(encode(values), channels=1, value_range=(low, high))[..., 0]
        expected = ((values.astype(np.float64) - low) / (high - low)).clip(0, 1)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-7, err_msg=dtype)
        assert (ours.min(), ours.max()) == (0, 1)


def test_a_range_for_each_channel():
    """Each channel has values where the others are clipped, with differences that 8 bits would lose."""
    ranges = [0, 250, 1000, 60000, 2000, 2250, 30000, 30001]
    low, high = np.reshape(ranges, (4, 2)).T
    for dtype in ("u2", "f4", "f8"):
        values = (np.arange(4 * 30 * 40).reshape(30, 40, 4) % 251 + [0, 1000, 2000, 30000]).astype(dtype)
        ours = decode(npy(values), channels=4, value_range=ranges)
        expected = ((values.astype(np.float64) - low) / (high - low)).clip(0, 1)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-7)
        assert len(np.unique(ours[..., 1])) == 251
    with pytest.raises(UndecodableImage, match="value range for 3 channels: expected one for all, or for 4"):
        decode(npy(values), channels=4, value_range=ranges[:6])


def test_wide_integers_keep_their_differences_and_what_is_not_a_number_becomes_0():
    values = np.array([[(1 << 30) + k for k in range(5)]], np.int32)
    ours = decode(npy(values), channels=1, value_range=(1 << 30, (1 << 30) + 4))
    assert ours[0, :, 0].tolist() == [0, 0.25, 0.5, 0.75, 1]
    values = np.array([[np.nan, np.inf, -np.inf, 0.5]], np.float32)
    assert decode(npy(values), channels=1, value_range=(0, 1))[..., 0].tolist() == [[0, 1, 0, 0.5]]


def test_a_16_bit_png_by_range_and_by_shift():
    values = image_of(1, np.uint16)[..., 0]
    encoded = saved(values, "PNG")
    assert np.array_equal(decode(encoded)[..., 0], values >> 8)
    mapped = decode(encoded, channels=1, value_range=(0, 32768))[..., 0]
    np.testing.assert_allclose(mapped, (values / 32768).clip(0, 1), rtol=0, atol=1e-7)


def test_8_bits_are_not_mapped():
    values = image_of(3)
    for encoded in (tiff(values), npy(values), saved(values, "PNG")):
        assert np.array_equal(decode(encoded, value_range=(0, 32768)), values / np.float32(255))


def test_a_grey_photograph_for_one_channel():
    for format_ in ("JPEG", "PNG"):
        encoded = saved(image_of(1)[..., 0], format_)
        one, three = decode(encoded, channels=1), decode(encoded)
        assert one.shape == (30, 40, 1)
        assert np.array_equal(np.repeat(one, 3, 2), three)


@pytest.mark.parametrize(
    ("encoded", "channels", "message"),
    [
        (saved(image_of(3), "JPEG"), 1, r"3 channels: expected 1; set --model.in-chans 3"),
        (saved(image_of(3), "PNG"), 1, r"3 channels: expected 1"),
        (saved(image_of(3), "WEBP"), 4, r"3 channels: expected 4"),
        (tiff(image_of(5), photometric="minisblack", planarconfig="contig"), 3, r"5 channels: expected 3; set .* 5"),
        (npy(image_of(13)), 1, r"13 channels: expected 1"),
        (npy(image_of(1)), 4, r"1 channels: expected 4"),
        (npy(image_of(1, np.uint16)), 1, r"type uint16: .*--data.value-range"),
        (npy(image_of(1).astype(">f4")), 1, r"type float32: .*--data.value-range"),
        (tiff(image_of(3, np.uint16)), 3, r"type uint16: .*--data.value-range"),
        (npy(np.zeros((2, 3, 4, 5), np.uint8)), 3, r"shape \(2, 3, 4, 5\)"),
        (npy(np.zeros((0, 4, 3), np.uint8)), 3, r"shape \(0, 4, 3\)"),
        (npy(np.zeros((4, 4), np.complex64)), 1, r"complex64: expected integers or floats"),
    ],
)
def test_refusals_say_what_to_do(encoded, channels, message):
    with pytest.raises(UndecodableImage, match=message):
        decode(encoded, channels=channels)


def test_hostile_arrays_and_truncated_files_are_refused():
    pickled = io.BytesIO()
    np.save(pickled, np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(UndecodableImage, match="Python objects"):
        decode(np.frombuffer(pickled.getvalue(), np.uint8), channels=1)
    small = npy(image_of(1)[..., 0]).tobytes()
    terabyte = small.replace(b"(30, 40), }        ", b"(1000000, 1000000)}")
    assert terabyte != small
    for encoded in (np.frombuffer(terabyte, np.uint8), *(encode(image_of(1)[..., 0])[:-500] for encode in (tiff, npy))):
        with pytest.raises(UndecodableImage):
            decode(encoded, channels=1)


@pytest.mark.parametrize("size", [(24, 20), (60, 70), (39, 34)], ids=str)
def test_floats_are_resized_as_pytorch_does_and_not_rounded(size):
    pixels = np.random.default_rng(0).random((45, 64, 5), np.float32) ** 4
    out = np.empty((*size, 5), np.float32)
    resize_crop_into(out, pixels, np.array([3, 5, 39, 34]), (True, True))
    planes = torch.from_numpy(pixels[3:42, 5:39]).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size=size, mode="bicubic", antialias=True, align_corners=False)
    expected = resized.clamp(0, 1).flip(2, 3)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("size", "strides"), [((24, 20), "turned"), ((60, 70), "planes"), ((30, 20), "contiguous")])
def test_resizing_any_number_of_channels(channels, size, strides):
    """Each channel as if it were alone, and as floating point has it but for rounding."""
    pixels = image_of(channels, height=45, width=64)
    if strides == "turned":
        pixels = pixels.swapaxes(0, 1)[::-1]
    elif strides == "planes":
        pixels = np.moveaxis(np.ascontiguousarray(np.moveaxis(pixels, 2, 0)), 0, 2)
    box, flip = np.array([3, 5, 39, 34]), (True, False)
    out = np.empty((*size, channels), np.uint8)
    resize_crop_into(out, pixels, box, flip)
    crop = np.ascontiguousarray(pixels[3:42, 5:39])
    for channel in range(channels):
        plane = torch.from_numpy(crop[..., channel].astype(np.float32))[None, None]
        resized = F.interpolate(plane, size=size, mode="bicubic", antialias=True, align_corners=False)[0, 0]
        expected = resized.round().clamp(0, 255).numpy()[:, ::-1]
        assert np.abs(out[..., channel] - expected).max() <= 1
        alone = np.empty((*size, 1), np.uint8)
        resize_crop_into(alone, pixels[..., channel : channel + 1], box, flip)
        assert np.array_equal(out[..., channel], alone[..., 0])
