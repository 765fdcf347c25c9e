"""Photographs that every installation has, from scikit-image's wheel; and image files as a model sees them.

Colour and grey photographs of people, objects, buildings, the sky, tissue and surfaces; charts, text and small or plain
pictures are left out. A cat is held out for validation: it is what people photograph, and no other picture shows an
animal. The two motorcycle pictures show one scene from two sides, so both are for training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmae.data.dataset import Dataset
from fastmae.data.decode import UndecodableImage, center_box, decode, resize_crop_into
from fastmae.data.errors import DataError, with_retries
from fastmae.data.formats import EXPECTED, BadImage, read_header
from fastmae.data.index import Accepts, build_index
from fastmae.data.sources import FileSource

logger = logging.getLogger(__name__)
TRAINING = ("astronaut.png", "brick.png", "camera.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
            "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg",
            "rocket.jpg")  # fmt: skip
VALIDATION = {"cat": "chelsea.png"}
"""File by caption."""


def open_photographs() -> Dataset:
    """The training split of the embedded photographs.

    Raises:
        DataError: scikit-image, or every one of its photographs, is missing.
    """
    paths = _present(TRAINING)
    source = FileSource(paths[0].parent, [(path.name, "") for path in paths], listed=True)
    return Dataset(build_index(source, Accepts()), source.root, name="photographs", embedded=True)


def validation_photographs(img_size: tuple[int, int]) -> tuple[list[str], Tensor]:
    """The held-out photographs.

    Args:
        img_size: height and width.

    Returns:
        Names, and uint8 (n, 3, height, width): the largest centred crop of that aspect ratio, resized.

    Raises:
        DataError: scikit-image, or every one of its photographs, is missing.
    """
    return list(VALIDATION), read_images(_present(list(VALIDATION.values())), img_size)


def _present(names: Sequence[str]) -> list[Path]:
    spec = find_spec("skimage")  # importing scikit-image takes longer than all of this
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the embedded photographs come with scikit-image: pip install scikit-image")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    paths = [folder / name for name in names if (folder / name).is_file()]
    if not paths:
        raise DataError(f"{folder}: expected scikit-image's photographs ({', '.join(names[:3])}, ...), found none")
    if missing := set(names) - {path.name for path in paths}:
        logger.warning("This version of scikit-image lacks %s; continuing without.", ", ".join(sorted(missing)))
    return paths


def read_images(
    paths: Sequence[Path | str],
    img_size: tuple[int, int],
    *,
    channels: int = 3,
    value_range: Sequence[float] | None = None,
    channels_first: bool = False,
) -> Tensor:
    """Image files as a model sees them: upright, the largest centred crop of the right aspect ratio, resized (bicubic,
    antialiased).

    Args:
        paths: n files, JPEG, PNG, WebP, TIFF or ``.npy``.
        img_size: height and width.
        channels, value_range, channels_first: as for :func:`fastmae.data.open_dataset`.

    Returns:
        (n, channels, height, width), a channels-last view: uint8, or float32 in [0, 1] with a ``value_range``.

    Raises:
        DataError: a file is missing, or not an image that can be read.
    """
    dtype = torch.uint8 if value_range is None else torch.float32
    images = torch.empty(len(paths), *img_size, channels, dtype=dtype)
    options = {"channels": channels, "value_range": value_range, "channels_first": channels_first}
    for out, path in zip(images.numpy(), map(Path, paths), strict=True):
        if not path.is_file():
            raise DataError(f"{path}: no such file; expected a {EXPECTED} image")
        try:
            header = read_header(path)
            if header is None:
                raise BadImage(f"not a {EXPECTED} file")
            if header.height * header.width > Accepts.max_pixels:
                raise BadImage(f"huge: {header.height} x {header.width} pixels, more than {Accepts.max_pixels}")
            encoded = with_retries(lambda path=path: np.fromfile(path, np.uint8), str(path))
            pixels = decode(encoded, header.orientation, **options)
        except (BadImage, UndecodableImage, PermissionError) as error:
            raise DataError(f"{path}: {error}") from error
        resize_crop_into(out, pixels, center_box(*pixels.shape[:2], img_size))
    return images.permute(0, 3, 1, 2)
