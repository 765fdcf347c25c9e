"""Real photographs that every installation has: those that scikit-image carries in its wheel. No network is used.

Colour and grey pictures of people, objects, buildings, the sky, tissue and surfaces. One is held out for validation: a
cat, which is what people photograph (fur, eyes, a soft background), and of which no other picture here shows anything.
The two motorcycle pictures are one scene from two sides, so both are for training. Charts, text and pictures too small
or too plain to crop are left out.
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
from fastmae.data.sources import ListSource

logger = logging.getLogger(__name__)
TRAINING = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
VALIDATION = {"cat": "chelsea.png"}
"""Name in captions: file."""


def _folder() -> Path:
    # find_spec does not import scikit-image, which would take longer than all of this.
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the embedded photographs come with scikit-image, which is not installed: pip install scikit-image"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _present(names: Sequence[str]) -> list[Path]:
    folder = _folder()
    paths = [folder / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if len(missing) == len(paths):
        raise DataError(f"{folder}: expected scikit-image's photographs ({', '.join(names[:3])}, ...), found none")
    if missing:
        logger.warning("This version of scikit-image lacks %s; going on without.", ", ".join(missing))
    return [path for path in paths if path.is_file()]


def open_photographs() -> Dataset:
    """The training split of the embedded photographs.

    Raises:
        DataError: scikit-image, or every one of its photographs, is missing.
    """
    source = ListSource(_folder(), [(path.name, "") for path in _present(TRAINING)])
    return Dataset(build_index(source, Accepts()), _folder(), name="photographs", embedded=True)


def validation_photographs(img_size: tuple[int, int]) -> tuple[list[str], Tensor]:
    """The held-out photographs.

    Args:
        img_size: height and width.

    Returns:
        Names, and uint8 (n, 3, height, width): the largest centred crop of that aspect ratio, resized.

    Raises:
        DataError: scikit-image, or every one of its photographs, is missing.
    """
    present = {path.name: path for path in _present(tuple(VALIDATION.values()))}
    names = [name for name, file in VALIDATION.items() if file in present]
    return names, read_images([present[VALIDATION[name]] for name in names], img_size)


def read_images(
    paths: Sequence[Path | str],
    img_size: tuple[int, int],
    *,
    channels: int = 3,
    value_range: Sequence[float] | None = None,
    channels_first: bool = False,
) -> Tensor:
    """Image files as a model sees them: upright, the largest centred crop of the right aspect ratio, resized
    (bicubic, antialiased).

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
            encoded = with_retries(lambda path=path: np.fromfile(path, np.uint8), str(path))
            pixels = decode(encoded, header.orientation, **options)
        except (BadImage, UndecodableImage, PermissionError) as error:
            raise DataError(f"{path}: {error}") from error
        resize_crop_into(out, pixels, center_box(*pixels.shape[:2], img_size), (False, False))
    return images.permute(0, 3, 1, 2)
