"""Bytes to pixels: decoding, turning upright, resizing a crop. The same functions serve every loader.

PyTorch's antialiased bicubic resize of uint8 is vectorised for three interleaved channels. JPEG and WebP are decoded by
torchvision, PNG by Pillow; the pixels are those that Pillow and NVIDIA DALI give (16-bit PNG: within 1 of DALI's).
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

_SOURCE_LINE = re.compile(r"^\w+, \S+:\d+, ")


class UndecodableImage(Exception):
    """The bytes are there, but they are not an image."""


@cache
def _torchvision_io():
    import torchvision.io

    return torchvision.io


def decode(encoded: np.ndarray, orientation: int = 1) -> np.ndarray:
    """An upright RGB image.

    Grey becomes RGB, CMYK is converted, alpha is dropped, 16-bit samples are shifted right by 8.

    Args:
        encoded: uint8 (bytes,), a JPEG, PNG or WebP file.
        orientation: EXIF orientation, 1 to 8; taken from here, not from the file.

    Returns:
        uint8 (height, width, 3), possibly a strided view.

    Raises:
        UndecodableImage: the decoder refuses the bytes.
    """
    try:
        pixels = _decode_png(encoded) if encoded[:4].tobytes() == b"\x89PNG" else _decode_with_torchvision(encoded)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like at damaged bytes
        reason = _SOURCE_LINE.sub("", str(error).strip().partition("\n")[0]) or type(error).__name__
        raise UndecodableImage(f"does not decode: {reason}") from error
    return upright(pixels, orientation)


def _decode_with_torchvision(encoded: np.ndarray) -> np.ndarray:
    io = _torchvision_io()
    return io.decode_image(torch.from_numpy(encoded), mode=io.ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _decode_png(encoded: np.ndarray) -> np.ndarray:
    # Pillow, because torchvision's PNG decoder takes the whole process down at some damaged files.
    with Image.open(BytesIO(encoded), formats=["PNG"]) as image:
        if image.mode.startswith("I"):
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        return np.array(image.convert("RGB"))


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
        out: uint8 (height, width, 3), written.
        pixels: uint8 (H, W, 3), any strides.
        box: top, left, height, width of the crop within ``pixels``.
        flip: whether to mirror left and right, and top and bottom.
    """
    top, left, height, width = box
    # NumPy copies in this thread. PyTorch would copy a strided crop with a team of OpenMP threads for each calling
    # thread: twice the processor time alone, and tens of times slower beside a training loop on the same cores.
    crop = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    if crop.shape[:2] != out.shape[:2]:
        source = torch.from_numpy(crop).permute(2, 0, 1)[None]
        resized = F.interpolate(source, size=out.shape[:2], mode="bicubic", antialias=True, align_corners=False)
        crop = resized[0].permute(1, 2, 0).numpy()
    left_right, top_bottom = flip
    out[:] = crop[:: -1 if top_bottom else 1, :: -1 if left_right else 1]


def center_box(height: int, width: int, img_size: tuple[int, int]) -> np.ndarray:
    """The largest centred box of the aspect ratio of ``img_size`` (H, W): int64 (4,), top, left, height, width."""
    scale = min(height / img_size[0], width / img_size[1])
    box_h = min(max(round(img_size[0] * scale), 1), height)
    box_w = min(max(round(img_size[1] * scale), 1), width)
    return np.array([(height - box_h) // 2, (width - box_w) // 2, box_h, box_w])
