"""TIFF and NumPy files to pixel values, and values of any type and number of channels to uint8 of the right number."""

from __future__ import annotations

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


def to_uint8(values: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Pixel values as uint8: 8-bit ones as they are, others mapped linearly from ``value_range`` and clipped.

    NaN, which many data sets write where nothing was measured, becomes 0.

    Raises:
        ValueError: values of another type than uint8, and no range.
    """
    if values.dtype == np.bool_:
        return values.view(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "uif":
        raise ValueError(f"values of type {values.dtype}: expected integers or floats")
    if value_range is None:
        raise ValueError(
            f"values of type {values.dtype.newbyteorder('=')}: "
            "say which of them become 0 and 255 with --data.value-range LOW HIGH"
        )
    low, high = value_range
    if values.dtype == np.uint16:
        table = _scaled(np.arange(65536, dtype=np.float32), low, high)
        return table[values]
    return _scaled(values.astype(np.float32), low, high)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    values = (values - np.float32(low)) * np.float32(255 / (high - low))
    return np.rint(np.nan_to_num(values, copy=False, nan=0.0).clip(0, 255)).astype(np.uint8)


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
        raise ValueError(
            f"{pixels.shape[2]} channels: expected {channels}; set --model.in-chans {pixels.shape[2]}, "
            "or convert the images"
        )
    return pixels
