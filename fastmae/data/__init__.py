"""Images for training: an index over files, a sampler that is a pure function, and loaders with one protocol."""

from fastmae.data.augment import Augment, crop_boxes, flips
from fastmae.data.batch import Batch, LateBad
from fastmae.data.dataset import BadFile, Dataset
from fastmae.data.errors import DataError
from fastmae.data.loader import Loader
from fastmae.data.open import (
    LoaderKind,
    check_agreement,
    choose_loader,
    create_loader,
    fixed_crops,
    has_dali,
    open_dataset,
    open_once,
)
from fastmae.data.photographs import read_images, validation_photographs
from fastmae.data.sampler import permuted_ids

__all__ = [
    "Augment",
    "BadFile",
    "Batch",
    "DataError",
    "Dataset",
    "LateBad",
    "Loader",
    "LoaderKind",
    "check_agreement",
    "choose_loader",
    "create_loader",
    "crop_boxes",
    "fixed_crops",
    "flips",
    "has_dali",
    "open_dataset",
    "open_once",
    "permuted_ids",
    "read_images",
    "validation_photographs",
]
