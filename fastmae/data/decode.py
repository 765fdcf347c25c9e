"""Bytes to pixels: decoding, turning upright, resizing a crop. The same functions serve every loader.

JPEG and WebP are decoded by torchvision, PNG by Pillow; the pixels are those that Pillow and NVIDIA DALI give (16-bit
PNG: within 1 of DALI's). TIFF is decoded by tifffile, arrays by NumPy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_START = b"\x93NUMPY"
_MAX_INTERLEAVED = 4
"""PyTorch's resize of uint8 is vectorised for this many interleaved channels; more go through it one by one."""
_SERIAL = 32767
"""Elements that PyTorch works on without a team of threads."""
_PNG_BIT_DEPTH = 24
"""Where a PNG file says it: the header always comes first."""
_SOURCE_LINE = re.compile(r"^\w+, \S+:\d+, ")


def read_tiff(encoded: np.ndarray) -> np.ndarray:
    """The first image of a TIFF file: (height, width) or (height, width, C), of the file's type.

    Tiles, strips, planes and 0-is-white are read; LZW, JPEG and other compressions than deflate and PackBits need the
    imagecodecs package.

    Raises:
        ValueError: and other errors of tifffile, for damaged bytes.
    """
    import tifffile

    with tifffile.TiffFile(BytesIO(encoded)) as tiff:
        page = tiff.pages[0]
        values = page.asarray(maxworkers=1)
        if page.axes == "SYX":
            values = np.moveaxis(values, 0, -1)
        elif page.axes not in ("YX", "YXS"):
            raise ValueError(f"axes {page.axes} of shape {values.shape}: expected height, width and perhaps channels")
        inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and values.dtype.kind in "bu"
        return np.invert(values) if inverted else values


def read_npy(encoded: np.ndarray) -> np.ndarray:
    """The array of a .npy file, not copied. Nothing is unpickled.

    Raises:
        ValueError: the bytes are no such file, too few, or hold Python objects.
    """
    file = BytesIO(encoded[:65536])  # the header's text is shorter than 10,000 characters, or NumPy refuses it
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which only unpickling could read; expected numbers")
    # An array on top of the bytes, and so never larger than the file, whatever the header says.
    return np.ndarray(shape, dtype, encoded.data, file.tell(), order="F" if fortran_order else "C")


def to_uint8(values: np.ndarray) -> np.ndarray:
    """8-bit pixel values as they are, boolean ones as 0 and 255.

    Raises:
        ValueError: values of another type, which need a range.
    """
    if values.dtype == np.bool_:
        return values.view(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8:
        return values
    _check_type(values)
    raise ValueError(
        f"values of type {values.dtype.newbyteorder('=')}: "
        "say which of them become black and white with --data.value-range LOW HIGH"
    )


def to_unit(values: np.ndarray, value_range: Sequence[float]) -> np.ndarray:
    """Pixel values as float32 in [0, 1]: mapped linearly from a range and clipped, 8-bit ones divided by 255.

    NaN, which many data sets write where nothing was measured, becomes 0.

    Args:
        values: (height, width, C), integers or floats.
        value_range: low and high, for all channels or for each in turn: 2 or 2 * C numbers.

    Raises:
        ValueError: values of another type, or a range for another number of channels.
    """
    if values.dtype == np.bool_:
        return values.astype(np.float32)
    if values.dtype == np.uint8:
        return values / np.float32(255)
    _check_type(values)
    low, high = np.reshape(value_range, (-1, 2)).T
    if len(low) not in (1, values.shape[2]):
        raise ValueError(f"value range for {len(low)} channels: expected one for all, or for {values.shape[2]}")
    # float64 where float32 would not tell neighbouring values apart: 32-bit integers and float64 itself.
    dtype = np.result_type(values.dtype, np.float32)
    scaled = (values - low.astype(dtype)) / (high - low).astype(dtype)
    return np.nan_to_num(scaled, copy=False, nan=0.0).clip(0, 1).astype(np.float32, copy=False)


def _check_type(values: np.ndarray) -> None:
    if values.dtype.kind not in "uif":
        raise ValueError(f"values of type {values.dtype}: expected integers or floats")


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """An image (height, width) or (height, width, C) as (height, width, channels): grey is repeated for RGB.

    Raises:
        ValueError: another number of channels, or of axes.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise ValueError(f"shape {pixels.shape}: expected (height, width) or (height, width, {channels})")
    if pixels.shape[2] == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] != channels:
        advice = f"set --model.in-chans {pixels.shape[2]}, or convert the images"
        if pixels.shape[0] == channels:
            advice = f"shape {pixels.shape} looks channels-first: --data.channels-first"
        raise ValueError(f"{pixels.shape[2]} channels: expected {channels}; {advice}")
    return pixels


class UndecodableImage(Exception):
    """The bytes are there, but they are not an image."""


@cache
def _torchvision_io():
    import torchvision.io

    return torchvision.io


def decode(
    encoded: np.ndarray,
    orientation: int = 1,
    *,
    channels: int = 3,
    value_range: Sequence[float] | None = None,
    channels_first: bool = False,
) -> np.ndarray:
    """An upright image.

    Grey becomes RGB if ``channels`` is 3, CMYK is converted, alpha is dropped, 16-bit samples of a PNG are shifted
    right by 8 unless there is a ``value_range``. JPEG, PNG and WebP files have 1 or 3 channels; TIFF and NumPy (.npy)
    files any number: (height, width) or (height, width, C), of integers or floats. With a ``value_range`` pixels are
    float32, so that 16-bit integers and floats keep their precision.

    Args:
        encoded: uint8 (bytes,), a JPEG, PNG, WebP, TIFF or .npy file.
        orientation: EXIF orientation, 1 to 8; taken from here, not from the file.
        channels: C of the result.
        value_range: the values that become 0 and 1, for files of another type than 8 bits; those outside are clipped.
            Low and high for all channels, or for each in turn.
        channels_first: .npy files are (C, height, width).

    Returns:
        (height, width, channels), possibly a strided view, possibly of ``encoded``: uint8, or float32 in [0, 1] with a
        ``value_range``.

    Raises:
        UndecodableImage: the decoder refuses the bytes, or they hold another number of channels, or values that need a
            ``value_range``.
    """
    try:
        pixels = stored_values(encoded, channels, value_range, channels_first)
        pixels = to_uint8(pixels) if value_range is None else to_unit(pixels, value_range)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like at damaged bytes
        reason = _SOURCE_LINE.sub("", str(error).strip().partition("\n")[0]) or type(error).__name__
        raise UndecodableImage(f"does not decode: {reason}") from error
    return upright(pixels, orientation)


def stored_values(
    encoded: np.ndarray, channels: int, value_range: Sequence[float] | None, channels_first: bool
) -> np.ndarray:
    """Pixels as stored, neither turned upright nor mapped: (height, width, channels) of the file's type.

    Arguments are those of :func:`decode`; a 16-bit PNG comes shifted right by 8 without a ``value_range``.
    """
    return with_channels(_decode_stored(encoded, channels, value_range, channels_first), channels)


def _decode_stored(
    encoded: np.ndarray, channels: int, value_range: Sequence[float] | None, channels_first: bool
) -> np.ndarray:
    start = encoded[:6].tobytes()
    if start.startswith(b"\x89PNG"):
        return _decode_png(encoded, channels, value_range)
    if start.startswith(TIFF_STARTS):
        return read_tiff(encoded)
    if start == NPY_START:
        values = read_npy(encoded)
        return np.moveaxis(values, 0, -1) if channels_first and values.ndim == 3 else values
    io = _torchvision_io()
    mode = io.ImageReadMode.UNCHANGED if channels == 1 else io.ImageReadMode.RGB
    if not encoded.flags.writeable:  # PyTorch has no tensors that cannot be written, and warns
        encoded = encoded.copy()
    return io.decode_image(torch.from_numpy(encoded), mode=mode).permute(1, 2, 0).numpy()


def _decode_png(encoded: np.ndarray, channels: int, value_range: Sequence[float] | None) -> np.ndarray:
    # Pillow, because torchvision's PNG decoder takes the whole process down at some damaged files.
    with Image.open(BytesIO(encoded), formats=["PNG"]) as image:
        if image.mode.startswith("I"):
            values = np.asarray(image)
            return (values >> 8).astype(np.uint8) if value_range is None else values
        if value_range is not None and encoded[_PNG_BIT_DEPTH] == 16:
            raise ValueError("a PNG of 16-bit colours cannot be mapped by a value range: convert it to TIFF or .npy")
        grey = image.mode in ("1", "L", "LA")
        return np.array(image.convert("L" if grey and channels != 3 else "RGB"))


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of a stored image (height, width, C) as EXIF ``orientation`` (1 to 8) means it to be seen."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def resize_crop_into(out: np.ndarray, pixels: np.ndarray, box: np.ndarray, flip: Sequence[bool]) -> None:
    """Write a crop, resized (bicubic, antialiased) and perhaps mirrored.

    Args:
        out: (height, width, C), written.
        pixels: uint8 (H, W, C), or float32 in [0, 1], any strides; what bicubic overshoots is clipped.
        box: top, left, height, width of the crop within ``pixels``.
        flip: whether to mirror left and right, and top and bottom.
    """
    top, left, height, width = box
    crop = pixels[top : top + height, left : left + width]
    if crop.shape[:2] != out.shape[:2]:
        crop = (_resized if crop.dtype == np.uint8 else _resized_floats)(crop, out.shape[:2])
    left_right, top_bottom = flip
    _copy_mirrored(out[::-1] if top_bottom else out, crop, left_right)


def _resized(crop: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # NumPy copies in this thread. PyTorch would copy a strided crop with a team of OpenMP threads for each calling
    # thread: twice the processor time alone, and tens of times slower beside a training loop on the same cores.
    options = {"size": size, "mode": "bicubic", "antialias": True, "align_corners": False}
    if crop.shape[2] <= _MAX_INTERLEAVED:
        # The batch axis comes before the permutation, or its stride is one that PyTorch does not take for channels
        # last, and it copies to planes and back: twice the time.
        source = torch.from_numpy(np.ascontiguousarray(crop))[None].permute(0, 3, 1, 2)
        return F.interpolate(source, **options)[0].permute(1, 2, 0).numpy()
    planes = torch.from_numpy(np.ascontiguousarray(np.moveaxis(crop, 2, 0)))[:, None]
    return F.interpolate(planes, **options)[:, 0].permute(1, 2, 0).numpy()


def _resized_floats(crop: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # By Pillow, whose bicubic is PyTorch's antialiased one: PyTorch would start a team of threads for floats.
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize(size[::-1], Image.Resampling.BICUBIC))
        for plane in np.moveaxis(crop, 2, 0)
    ]
    return np.stack(planes, 2).clip(0, 1)


def _copy_mirrored(out: np.ndarray, image: np.ndarray, left_right: bool) -> None:
    if not left_right:
        out[:] = image
        return
    # PyTorch mirrors interleaved channels ten times as fast as NumPy. A few rows at a time, or it starts a team.
    image = np.ascontiguousarray(image)
    rows = max(1, _SERIAL // (image.shape[1] * image.shape[2]))
    for top in range(0, len(image), rows):
        part = torch.from_numpy(image[top : top + rows])[None].permute(0, 3, 1, 2)
        out[top : top + rows] = part.flip(3)[0].permute(1, 2, 0).numpy()


def center_box(height: int, width: int, img_size: tuple[int, int]) -> np.ndarray:
    """The largest centred box of the aspect ratio of ``img_size`` (H, W): int64 (4,), top, left, height, width."""
    scale = min(height / img_size[0], width / img_size[1])
    box_h = min(max(round(img_size[0] * scale), 1), height)
    box_w = min(max(round(img_size[1] * scale), 1), width)
    return np.array([(height - box_h) // 2, (width - box_w) // 2, box_h, box_w])
