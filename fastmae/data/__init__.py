"""Images for training: an index over files, a sampler that is a pure function, and loaders with one protocol.

Names are imported when first used: the worker processes that build an index do not load PyTorch.
"""

# ruff: noqa: F401 - __all__ has these names
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmae.data.augment import Augment, crop_boxes, flips
    from fastmae.data.batch import Batch, LateBad
    from fastmae.data.dataset import BadFile, Dataset
    from fastmae.data.errors import DataError
    from fastmae.data.loader import Loader
    from fastmae.data.open import (
        LoaderKind,
        choose_loader,
        create_loader,
        fixed_crops,
        has_dali,
        open_dataset,
        open_once,
    )
    from fastmae.data.photographs import read_images, validation_photographs
    from fastmae.data.records import TorchRecords
    from fastmae.data.sampler import permuted_ids

_NAMES = {
    "augment": ("Augment", "crop_boxes", "flips"),
    "batch": ("Batch", "LateBad"),
    "dataset": ("BadFile", "Dataset"),
    "errors": ("DataError",),
    "loader": ("Loader",),
    "open": (
        "LoaderKind",
        "choose_loader",
        "create_loader",
        "fixed_crops",
        "has_dali",
        "open_dataset",
        "open_once",
    ),
    "photographs": ("read_images", "validation_photographs"),
    "records": ("TorchRecords",),
    "sampler": ("permuted_ids",),
}
__all__ = [name for names in _NAMES.values() for name in names]


def __getattr__(name: str) -> object:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"fastmae.data.{module}"), name)
    raise AttributeError(f"module 'fastmae.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
