"""A data set: an index over files, and their bytes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

import numpy as np

from fastmae.data.batch import DataError
from fastmae.data.decode import decode
from fastmae.data.index import Index
from fastmae.data.retry import with_retries

logger = logging.getLogger(__name__)

OnBad = Literal["skip", "stop"]
_LISTED = 10


class Dataset:
    """Images that can be trained on, numbered from 0 in the order of their paths.

    Attributes:
        name: what the data set is called in messages and captions.
        root: the folder that the paths start from.
        bad: files left out, decided before training.
        hash: hex digest of the index; equal for equal data sets, wherever they lie.
        on_bad: what to do about a file that fails during training: ``"skip"`` or ``"stop"``.
        embedded: whether these are the photographs that come with the installation.
    """

    def __init__(self, index: Index, root: Path, *, name: str, on_bad: OnBad = "skip", embedded: bool = False):
        if on_bad not in ("skip", "stop"):
            raise ValueError(f"on_bad: expected 'skip' or 'stop', got {on_bad!r}")
        self._entries, self._paths, self.bad, self.hash = index
        self.root, self.name, self.on_bad, self.embedded = root, name, on_bad, embedded
        if self.bad:
            listed = "".join(f"\n  {bad.path}: {bad.reason}" for bad in self.bad[:_LISTED])
            more = f"\n  and {len(self.bad) - _LISTED} more" if len(self.bad) > _LISTED else ""
            found = f"{root}: {len(self.bad)} of {len(self.bad) + len(self)} images cannot be used:{listed}{more}"
            if on_bad == "stop":
                raise DataError(f"{found}\nRemove them, or leave them out with on_bad='skip'.")
            logger.warning("%s\nThey are left out.", found)

    def __len__(self) -> int:
        return len(self._entries)

    def path(self, sample_id: int) -> str:
        """The path of a sample's file."""
        start = int(self._entries["path_end"][sample_id - 1]) if sample_id else 0
        relative = bytes(self._paths[start : int(self._entries["path_end"][sample_id])])
        return os.path.join(self.root, os.fsdecode(relative))  # noqa: PTH118 - called for each sample of each batch

    def read(self, sample_id: int) -> np.ndarray:
        """A sample's encoded bytes, uint8 (bytes,).

        Raises:
            DataError: the file cannot be read, even after waiting and trying again.
        """
        path = self.path(sample_id)
        return with_retries(lambda: np.fromfile(path, np.uint8), path)

    def decode(self, sample_id: int) -> np.ndarray:
        """A sample's upright pixels, uint8 (height, width, 3), possibly a strided view.

        Raises:
            UndecodableImage: the bytes are not an image.
            DataError: the file cannot be read.
        """
        return decode(self.read(sample_id), int(self._entries["orientation"][sample_id]))

    def shape(self, sample_id: int) -> tuple[int, int]:
        """Height and width of the upright image."""
        heights, widths = self.shapes(np.array([sample_id]))
        return int(heights[0]), int(widths[0])

    def shapes(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths, int64 (n,), of upright images."""
        rows = self._entries[sample_ids]
        heights, widths = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
        turned = rows["orientation"] >= 5
        return np.where(turned, widths, heights), np.where(turned, heights, widths)

    def decoded_bytes(self, at_most: int) -> int:
        """Bytes of all images decoded, or any number above ``at_most`` if there are more."""
        if 3 * len(self) > at_most:
            return 3 * len(self)
        return 3 * int((self._entries["height"].astype(np.int64) * self._entries["width"]).sum())
