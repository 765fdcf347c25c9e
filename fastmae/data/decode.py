"""Bytes to pixels: decode, turn upright, resize a crop. Every loader uses these functions.

torchvision decodes JPEG and WebP, Pillow decodes PNG, to the pixels that Pillow and NVIDIA DALI give (16-bit PNG: to
within 1 of DALI's). tifffile decodes TIFF, NumPy reads arrays.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO

import numpy as np
import torch
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from fastmae.data.errors import UndecodableImage
from fastmae.data.formats import DEFLATE, NPY_HEADER, PACKBITS, Format, detect_format, npy_header

_PADDING = 32 << 20
"""Bytes by which a TIFF's tiles may go beyond the image."""
_PNG_BIT_DEPTH = 24
"""Position of the bit depth in a PNG file, whose header always comes first."""
logger = logging.getLogger(__name__)
_SOURCE_LINE = re.compile(r"^\w+, \S+:\d+, ")


def decode(
    encoded: np.ndarray,
    orientation: int = 1,
    *,
    channels: int = 3,
    value_range: Sequence[float] | None = None,
    channels_first: bool = False,
) -> np.ndarray:
    """An upright image.

    Grey becomes RGB if ``channels`` is 3, CMYK is converted, alpha is dropped. JPEG, PNG and WebP files have 1 or 3
    channels; TIFF and NumPy files any number: (height, width) or (height, width, C), of integers or floats. Without a
    ``value_range``, 16-bit PNGs are shifted right by 8 and other types than 8 bits are refused; with one, pixels are
    float32 and keep their precision. NaN, which many data sets write where nothing was measured, becomes 0.

    Args:
        encoded: uint8 (bytes,), a JPEG, PNG, WebP, TIFF or .npy file.
        orientation: EXIF orientation, 1 to 8; the file's own is not looked at.
        channels: C of the result.
        value_range: the values that become 0 and 1; values outside are clipped, 8-bit files divided by 255. Low and
            high for all channels, or for each in turn.
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
        pixels = _to_uint8(pixels) if value_range is None else _to_unit(pixels, value_range)
    except MemoryError:  # says nothing about the image
        raise
    except Exception as error:  # decoders raise anything at damaged bytes
        reason = _SOURCE_LINE.sub("", str(error).strip().partition("\n")[0]) or type(error).__name__
        raise UndecodableImage(f"does not decode: {reason}") from error
    return _upright(pixels, orientation)


def stored_values(
    encoded: np.ndarray, channels: int, value_range: Sequence[float] | None, channels_first: bool
) -> np.ndarray:
    """Pixels as stored, neither turned upright nor mapped: (height, width, channels) of the file's type.

    Arguments are those of :func:`decode`; a 16-bit PNG comes shifted right by 8 without a ``value_range``.
    """
    format_ = detect_format(encoded[:12].tobytes())
    if format_ is Format.PNG:
        pixels = _decode_png(encoded, channels, value_range)
    elif format_ is Format.TIFF:
        pixels = _decode_tiff(encoded)
    elif format_ is Format.NPY:
        pixels = _read_npy(encoded)
        pixels = np.moveaxis(pixels, 0, -1) if channels_first and pixels.ndim == 3 else pixels
    else:
        pixels = _decode_photograph(encoded, channels)
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


@cache
def _torchvision_io():
    import torchvision.io

    return torchvision.io


def _decode_photograph(encoded: np.ndarray, channels: int) -> np.ndarray:
    io = _torchvision_io()
    mode = io.ImageReadMode.UNCHANGED if channels == 1 else io.ImageReadMode.RGB
    if not encoded.flags.writeable:  # PyTorch has no tensors that cannot be written, and warns
        encoded = encoded.copy()
    return io.decode_image(torch.from_numpy(encoded), mode=mode).permute(1, 2, 0).numpy()


def _decode_png(encoded: np.ndarray, channels: int, value_range: Sequence[float] | None) -> np.ndarray:
    # Pillow, because torchvision's PNG decoder takes the whole process down at some damaged files. Without metadata,
    # because Pillow refuses images with a damaged text, or with a profile that inflates to a megabyte.
    data, at = memoryview(encoded), 8
    parts = [data[:at]]
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if not data[at + 4] & 0x20:  # a capital letter: decoders need the chunk
            parts.append(data[at:end])
        at = end
    with PngImageFile(BytesIO(b"".join(parts))) as image:
        if image.mode.startswith("I"):
            values = np.asarray(image)
            return (values >> 8).astype(np.uint8) if value_range is None else values
        if value_range is not None and encoded[_PNG_BIT_DEPTH] == 16:
            raise ValueError("a PNG of 16-bit colours cannot be mapped by a value range: convert it to TIFF or .npy")
        grey = image.mode in ("1", "L", "LA")
        return np.array(image.convert("L" if grey and channels != 3 else "RGB"))


def _decode_tiff(encoded: np.ndarray) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(BytesIO(encoded)) as tiff:
        page = tiff.pages[0]
        if page.compression in (*DEFLATE, PACKBITS) and "imagecodecs" not in sys.modules:
            _limit_inflation(page)
        values = page.asarray(maxworkers=1)
        if page.axes == "SYX":
            values = np.moveaxis(values, 0, -1)
        elif page.axes not in ("YX", "YXS"):
            raise ValueError(f"axes {page.axes} of shape {values.shape}: expected height, width and perhaps channels")
        inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and values.dtype.kind in "bu"
        return np.invert(values) if inverted else values


def _limit_inflation(page) -> None:
    """Make a page refuse strips and tiles that hold far more than their pixels: 4 MB may inflate to 4 GB.

    tifffile passes sizes to imagecodecs only; its own decompressors inflate all there is.
    """
    size, compression = math.prod(page.chunks) * page.dtype.itemsize, page.compression
    most = 2 * min(size, page.nbytes + _PADDING) + 1024  # some writers pad
    if compression in DEFLATE:
        page.compression = 1  # none: inflated here
    decode_chunk, page.compression = page.decode, compression

    def decode_bounded(data: bytes | None, *args, **options):
        if data is not None and compression in DEFLATE:
            data = zlib.decompressobj().decompress(data, most)
        if data is not None and len(data) >= most:
            raise ValueError(f"a strip or tile holds more than twice the {size} bytes of its pixels")
        return decode_chunk(data, *args, **options)

    page.decode = decode_bounded


def _read_npy(encoded: np.ndarray) -> np.ndarray:
    shape, fortran_order, dtype, start = npy_header(encoded[:NPY_HEADER].tobytes())
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which only unpickling could read; expected numbers")
    # An array on top of the bytes, and so never larger than the file, whatever the header says.
    return np.ndarray(shape, dtype, encoded.data, start, order="F" if fortran_order else "C")


def _to_uint8(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.bool_:
        return values.view(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8:
        return values
    _check_type(values)
    raise ValueError(
        f"values of type {values.dtype.newbyteorder('=')}: "
        "say which of them become black and white with --data.value-range LOW HIGH"
    )


def _to_unit(values: np.ndarray, value_range: Sequence[float]) -> np.ndarray:
    if values.dtype == np.bool_:
        return values.astype(np.float32)
    if values.dtype == np.uint8:
        return values / np.float32(255)
    _check_type(values)
    low, high = np.reshape(value_range, (-1, 2)).T
    if len(low) not in (1, values.shape[2]):
        raise ValueError(f"value range for {len(low)} channels: expected one for all, or for {values.shape[2]}")
    # float64 where float32 does not tell neighbouring values apart: 32-bit integers and float64 itself.
    dtype = np.result_type(values.dtype, np.float32)
    scaled = np.subtract(values, low, dtype=dtype)
    scaled /= (high - low).astype(dtype)
    np.fmax(scaled, 0, out=scaled)  # NaN becomes 0
    return np.fmin(scaled, 1, out=scaled).astype(np.float32, copy=False)


def _check_type(values: np.ndarray) -> None:
    if values.dtype.kind not in "uif":
        raise ValueError(f"values of type {values.dtype}: expected integers or floats")


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of an image (height, width, C), turned as EXIF ``orientation`` (1 to 8) says."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def interleaved(pixels: np.ndarray) -> Tensor:
    """Pixels (height, width, C) as a contiguous tensor."""
    # PyTorch has no tensors that cannot be written, and warns.
    return torch.from_numpy(np.require(pixels, requirements=("C", "W")))


def resize_crop_into(out: np.ndarray, pixels: np.ndarray, box: np.ndarray) -> None:
    """Write a crop, resized (bicubic, antialiased).

    Args:
        out: (height, width, C), contiguous, written.
        pixels: uint8 (H, W, C), or float32 in [0, 1], any strides; what bicubic overshoots is clipped.
        box: top, left, height, width of the crop within ``pixels``.
    """
    render_crops([interleaved(pixels)], [box.tolist()], [[False, False]], torch.from_numpy(out)[None], [0])


def render_crops(
    images: list[Tensor], boxes: list[list[int]], flips: list[list[bool]], batch: Tensor, rows: list[int]
) -> None:
    """Crop images, resize them (bicubic, antialiased) into rows of a batch, and mirror them.

    Args:
        images: (height, width, C) each, contiguous: uint8, or float32 in [0, 1]; what bicubic overshoots is clipped.
        boxes: top, left, height, width of the crops.
        flips: whether to mirror left and right, top and bottom.
        batch: (N, H, W, C), written.
        rows: of the batch, one for each image.
    """
    for image, box, flip, row in zip(images, boxes, flips, rows):  # noqa: B905 - TorchScript has no strict
        top, left, height, width = box
        _, columns, channels = image.shape
        # The stride of the first axis must be at least the image's: else PyTorch does not see that channels come last.
        strides = [image.numel(), 1, columns * channels, channels]
        crop = image.as_strided([1, channels, height, width], strides, (top * columns + left) * channels)
        out = batch[row : row + 1].permute(0, 3, 1, 2)
        if crop.shape == out.shape:
            out.copy_(crop)
        elif crop.dtype == torch.uint8 and channels <= 4:  # what PyTorch's resize vectorises, in half the time
            torch.ops.aten._upsample_bicubic2d_aa(crop, out.shape[2:], False, None, None, out=out)
        else:
            planes = crop.transpose(0, 1).contiguous()
            planes = torch.ops.aten._upsample_bicubic2d_aa(planes, out.shape[2:], False, None, None)
            out.copy_((planes if crop.dtype == torch.uint8 else planes.clamp(0, 1)).transpose(0, 1))
        left_right, top_bottom = flip
        if left_right:
            out.copy_(out.flip(3))
        if top_bottom:
            out.copy_(out.flip(2))


def render_photographs(
    encoded: list[Tensor],
    headers: list[tuple[bool, int, int]],
    boxes: list[list[int]],
    flips: list[list[bool]],
    batch: Tensor,
    rows: list[int],
) -> None:
    """Decode JPEG and WebP files to RGB, one by one, and render their crops.

    Args:
        encoded: files, uint8 (bytes,).
        headers: whether it is WebP, height and width.
        boxes, flips, batch, rows: as for :func:`render_crops`.

    Raises:
        RuntimeError: one of them does not decode, or to another size.
    """
    for i, data in enumerate(encoded):
        webp, height, width = headers[i]
        image = torch.ops.image.decode_webp(data, 3) if webp else torch.ops.image.decode_jpeg(data, 3)
        image = image.permute(1, 2, 0)  # contiguous
        if list(image.shape) != [height, width, 3]:
            raise RuntimeError("decodes to another size than its header said")
        render_crops([image], boxes[i : i + 1], flips[i : i + 1], batch, rows[i : i + 1])


@cache
def compiled(render: Callable[..., None]) -> Callable[..., None]:
    """``render_crops`` or ``render_photographs`` by TorchScript, which gives up the interpreter lock once for a call
    and not for each of its operations; the function itself where TorchScript cannot, as in Python 3.14."""
    _torchvision_io()  # registers the decoders
    if sys.version_info >= (3, 14):
        return render
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated")
        try:
            return torch.jit.script(render)
        except (AttributeError, OSError, RuntimeError) as error:
            logger.debug("TorchScript cannot compile %s: %s", render.__name__, error)
            return render


def center_box(height: int, width: int, img_size: tuple[int, int], ratio: float = 1.0) -> np.ndarray:
    """The largest centred box of the aspect ratio of ``img_size`` (H, W), its sides times ``ratio``: int64 (4,), top,
    left, height, width."""
    scale = ratio * min(height / img_size[0], width / img_size[1])
    box_h = min(max(round(img_size[0] * scale), 1), height)
    box_w = min(max(round(img_size[1] * scale), 1), width)
    return np.array([(height - box_h) // 2, (width - box_w) // 2, box_h, box_w])
