"""TIFF and NumPy files to pixel values, and values of any type to uint8 or to float32 in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_START = b"\x93NUMPY"


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
