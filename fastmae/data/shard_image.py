"""What one image becomes in a shard: a name, bytes, a class.

Photographs of 8 bits can be shrunk and are stored as JPEG then, upright, without metadata. All else keeps its bytes:
16-bit, TIFF and NumPy files have no smaller form with the same meaning.

A colour profile goes with the metadata and is not applied, since no decoder of a training loop applies one: the pixels
that a model sees are those that it would see from the original.
"""

from __future__ import annotations

import re
from io import BytesIO
from typing import NamedTuple

import numpy as np
import PIL
import torchvision
from PIL import Image, features

from fastmae.data.batch import DataError
from fastmae.data.dataset import Dataset, printable, upright_shapes
from fastmae.data.decode import UndecodableImage, decode
from fastmae.data.header import MODES, BadImage, Format, Header, parse_header

SUFFIXES = {Format.JPEG: ".jpg", Format.PNG: ".png", Format.WEBP: ".webp", Format.TIFF: ".tif", Format.NPY: ".npy"}
_PHOTOGRAPHS = (Format.JPEG, Format.PNG, Format.WEBP)
_SIXTEEN_BITS = ("I", "I;16")
_LONGEST_JPEG = 65500  # libjpeg's limit
_NAME_CHARACTERS = 64
_REDUCING_GAP = 3.0  # of a very large image, whole blocks are averaged first; Pillow calls the result indistinguishable


class Encoding(NamedTuple):
    """How images are stored.

    Attributes:
        short_side: the longest that an image's short side may be, in pixels; None: as long as it is.
        quality: of JPEG, 1 to 100.
        reencode: whether an image that fits is encoded anew too.
    """

    short_side: int | None = None
    quality: int = 90
    reencode: bool = False


class StoredImage(NamedTuple):
    """An image as a shard holds it.

    Attributes:
        name: of the member.
        data: the encoded image.
        label: its class, -1 for none.
        height, width: of the upright image.
        encoded: whether the bytes are other ones than the source's.
    """

    name: str
    data: bytes
    label: int
    height: int
    width: int
    encoded: bool


def stored_shapes(rows: np.ndarray, encoding: Encoding) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What comes of images by their headers.

    Args:
        rows: ``table.ENTRY`` (n,).

    Returns:
        Heights and widths, int64 (n,), of the upright images as stored, and bool (n,): which are encoded anew.
    """
    heights, widths = upright_shapes(rows)
    eight_bits = ~np.isin(rows["mode"], [MODES.index(mode) for mode in _SIXTEEN_BITS])
    photographs = np.isin(rows["format"], _PHOTOGRAPHS) & eight_bits & (np.maximum(heights, widths) <= _LONGEST_JPEG)
    shorts = np.minimum(heights, widths)
    larger = photographs & (shorts > (encoding.short_side or np.iinfo(np.int64).max))
    if encoding.short_side is not None:
        scale = encoding.short_side / np.maximum(shorts, 1)
        heights = np.where(larger, np.maximum(np.rint(heights * scale), 1), heights).astype(np.int64)
        widths = np.where(larger, np.maximum(np.rint(widths * scale), 1), widths).astype(np.int64)
    return heights, widths, larger | (photographs & encoding.reencode)


def store_image(dataset: Dataset, sample_id: int, encoding: Encoding) -> StoredImage:
    """An image as a shard is to hold it.

    Raises:
        UndecodableImage: it was to be encoded anew, and does not decode.
        DataError: it cannot be read, or is not what the index says any more.
    """
    rows = dataset.rows(np.array([sample_id]))
    (height,), (width,), (anew,) = (values.tolist() for values in stored_shapes(rows, encoding))
    row, data = rows[0], dataset.read(sample_id)
    format_ = Format(int(row["format"]))
    header = _check_unchanged(dataset, sample_id, row, data)
    if anew:
        pixels = decode(data, int(row["orientation"]), channels=dataset.channels)  # of 8 bits, which need no range
        expected = tuple(int(size[0]) for size in upright_shapes(rows))
        if pixels.shape[:2] != expected:
            raise UndecodableImage(f"decodes to {pixels.shape[:2]}, its header said {expected}")
        if row["channels"] == 1:
            pixels = pixels[..., 0]
        stored, format_ = _encode(pixels, height, width, encoding.quality), Format.JPEG
    else:
        stored = data.tobytes()
        if format_ is Format.NPY:  # as it will be read back, whichever axis has the channels
            height, width = header.height, header.width
    name = member_key(dataset, sample_id) + SUFFIXES[format_]
    return StoredImage(name, stored, int(row["label"]), height, width, anew)


def _check_unchanged(dataset: Dataset, sample_id: int, row: np.void, data: np.ndarray) -> Header:
    path = dataset.path(sample_id)
    try:
        header = parse_header(BytesIO(data), path)
    except BadImage:
        header = None
    found = header and (len(data), header.format, header.height, header.width, header.orientation)
    if found and found[1] == Format.NPY and dataset.accepts.channels_first and header.channels != 1:
        found = (*found[:2], header.width, header.channels, header.orientation)
    if found != tuple(int(row[name]) for name in ("size", "format", "height", "width", "orientation")):
        raise DataError(f"{printable(path)}: changed while it was being packed; begin anew")
    return header


def _encode(pixels: np.ndarray, height: int, width: int, quality: int) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
    buffer = BytesIO()
    # Not optimize=True: 3 % smaller, but Pillow then needs room for the whole file and guesses it too small for noise.
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def encoder() -> str:
    """The libraries that the bytes of encoded images depend on."""
    jpeg = features.version_feature("libjpeg_turbo") or features.version_codec("jpg")
    return f"Pillow {PIL.__version__}, libjpeg {jpeg}, torchvision {torchvision.__version__}"


def member_key(dataset: Dataset, sample_id: int) -> str:
    """The name of a sample in a shard, without suffix: its number in the source, and of its path what is harmless.

    A WebDataset reader ends the key at the first dot, a shell sees no option and no space, and the number keeps
    ``a.jpg``, ``a.png`` and ``A/a.jpg`` apart where their letters do not. So the key fits into a plain tar header.
    """
    digits = max(9, len(str(len(dataset) - 1)))
    path = dataset.path(sample_id).removeprefix(f"{dataset.root}/").rpartition("::")[2]
    folder, slash, last = path.rpartition("/")
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", folder + slash + (last.rpartition(".")[0] or last))
    return f"{sample_id:0{digits}d}-{stem[-_NAME_CHARACTERS:]}"
