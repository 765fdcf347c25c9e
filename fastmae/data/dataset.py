"""A data set: an index over images, and their bytes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmae.data.decode import decode
from fastmae.data.errors import DataError
from fastmae.data.index import Accepts, Index
from fastmae.data.sampler import Order
from fastmae.data.storage import Files, Shards, Storage

logger = logging.getLogger(__name__)
_LISTED = 10
MOST_WITHOUT_WINDOW, WINDOW = 4096, 256
"""Data sets of more shards than the first are shuffled in windows of the second."""


class BadFile(NamedTuple):
    """A file that training leaves out, and why."""

    path: str
    reason: str


@dataclass(eq=False)
class Dataset:
    """Images that can be trained on, numbered from 0 in the order of their paths (in shards: of shards and members).

    Bad images are numbered with the others; loaders put another image in their place. All methods may be called from
    several threads.

    Attributes:
        root: the folder that the paths start from.
        name: what the data set is called in messages and captions.
        max_bad_fraction: the share of bad images above which a run stops.
        embedded: whether these are the photographs that come with the installation.
        window: shards whose images are shuffled together; 0: all of them. None: 0 up to 4,096 shards, else 256.
        storage: reads the images. None: files, or shards, below ``root``.
        hash: hex digest of the index; equal for equal data sets, wherever they lie.
        classes: names of the labels; empty if there are none, or numbers only.
        formats: the formats that occur.
        channels: C of the decoded images.
        value_range: what 16-bit and float pixels are mapped from, or None; low and high, for all channels or each.
        dtype: of the decoded images, uint8, or float32 in [0, 1] with a ``value_range``.
    """

    index: Index
    root: Path
    name: str
    accepts: Accepts = field(default_factory=Accepts)
    max_bad_fraction: float = 0.01
    embedded: bool = False
    window: int | None = None
    storage: Storage | None = None

    def __post_init__(self):
        index, root, window = self.index, self.root, self.window
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction: expected a share from 0 to 1, got {self.max_bad_fraction}")
        if window is None:
            self.window = WINDOW if len(index.shards) > MOST_WITHOUT_WINDOW else 0
        elif window < 0 or (window and not index.shards):
            expected = "at least 0" if window < 0 else f"0, because {root} holds no shards"
            raise ValueError(f"window: expected {expected}, got {window}")
        self.hash, self.classes, self.formats = index.hash, index.classes, index.formats
        self.channels, self.value_range = self.accepts.channels, self.accepts.value_range
        self.dtype = np.dtype(np.uint8 if self.value_range is None else np.float32)
        self.storage = self.storage or (Shards(root) if index.shards else Files(root))

    def __len__(self) -> int:
        return len(self.index.table)

    # Bad images, as far as they are known

    @property
    def bad(self) -> list[BadFile]:
        """In the order of their numbers."""
        return [BadFile(self.path(i), reason) for i, reason in self.index.bad.items()]

    @property
    def bad_ids(self) -> np.ndarray:
        """Their numbers: int64 (n,)."""
        return np.fromiter(self.index.bad, np.int64, len(self.index.bad))

    def is_bad(self, sample_ids: np.ndarray) -> np.ndarray:
        """Which samples are: bool (n,)."""
        bad = self.index.bad
        return np.fromiter((i in bad for i in sample_ids.tolist()), bool, len(sample_ids))

    def mark_bad(self, verdicts: Mapping[int, str]) -> Dataset:
        """The data set with more bad samples, reasons by id, which its cached index remembers from now on."""
        return replace(self, index=self.index.with_verdicts(verdicts))

    def check_bad_fraction(self, more: Mapping[int, str] | None = None) -> None:
        """Raise DataError, naming some of the bad images, if they are too many.

        Args:
            more: reasons, by sample id, of images found bad since the index was made.
        """
        bad = self.index.bad | dict(more or {})
        if len(bad) > self.max_bad_fraction * len(self) or len(bad) >= len(self):
            raise DataError(
                f"{self._found(bad)}\nFix or delete them, or allow more: --data.max-bad-fraction "
                f"(now {self.max_bad_fraction:g}); bad images are then replaced by others."
            )

    def log_bad(self) -> None:
        """Log which images are left out."""
        if self.index.bad:
            logger.warning("%s\nThey are replaced by others.", self._found(self.index.bad))

    def _found(self, bad: Mapping[int, str]) -> str:
        listed = "".join(f"\n  {printable(self.path(i))}: {bad[i]}" for i in list(bad)[:_LISTED])
        more = f"\n  and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        return f"{self.root}: {len(bad)} of {len(self)} images cannot be used:{listed}{more}"

    # What the index says

    def order(self, seed: int) -> Order:
        """The order of a run's samples."""
        starts = self.index.table.shard_starts(len(self.index.shards)) if self.window else None
        return Order(len(self), seed, starts=starts, window=self.window)

    def rows(self, sample_ids: np.ndarray) -> np.ndarray:
        """The index's rows of samples: ``table.ENTRY`` (n,), a copy, in which ``bad`` is what is known now."""
        rows = self.index.table.rows(sample_ids)
        if self.index.verdicts:
            rows["bad"] |= self.is_bad(sample_ids)
        return rows

    def files(self, rows: np.ndarray) -> list[str]:
        """Names of the files that hold the images of some rows: the images themselves, or shards."""
        if self.index.shards:
            return [self.index.shards[number] for number in rows["shard"].tolist()]
        return list(map(os.fsdecode, self.index.table.names(rows)))

    def path(self, sample_id: int) -> str:
        """What a sample is called: its file's path, or its shard's with the member's name behind ``::``."""
        rows = self.rows(np.array([sample_id]))
        path = self.storage.path(self.files(rows)[0])
        return f"{path}::{os.fsdecode(self.index.table.names(rows)[0])}" if self.index.shards else path

    def shape(self, sample_id: int) -> tuple[int, int]:
        """Height and width of the upright image."""
        heights, widths = self.shapes(np.array([sample_id]))
        return int(heights[0]), int(widths[0])

    def shapes(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths, int64 (n,), of upright images."""
        return upright_shapes(self.rows(sample_ids))

    def labels(self, sample_ids: np.ndarray) -> np.ndarray:
        """Class numbers, int64 (n,); -1 where there is none."""
        return self.rows(sample_ids)["label"].astype(np.int64)

    def decoded_bytes(self, at_most: int) -> int:
        """Bytes of all images decoded, or any number above ``at_most`` if there are more."""
        total = 0
        for rows in self.index.table.scan():
            pixels = int((rows["height"].astype(np.int64) * rows["width"]).sum())
            total += pixels * self.channels * self.dtype.itemsize
            if total > at_most:
                break
        return total

    # Images

    def read(self, sample_id: int) -> np.ndarray:
        """A sample's encoded bytes, uint8 (bytes,).

        Raises:
            UndecodableImage: the file has changed since it was indexed.
            DataError: the file cannot be read, even after waiting and trying again.
        """
        rows = self.rows(np.array([sample_id]))
        return self.storage.read(self.files(rows)[0], int(rows["offset"][0]), int(rows["size"][0]), int(sample_id))

    def decode(self, sample_id: int) -> np.ndarray:
        """A sample's upright pixels, (height, width, C) of ``dtype``, possibly a strided view.

        Raises:
            UndecodableImage: the bytes are not an image.
            DataError: the file cannot be read.
        """
        orientation = int(self.rows(np.array([sample_id]))["orientation"][0])
        return self.decode_bytes(self.read(sample_id), orientation)

    def decode_bytes(self, encoded: np.ndarray, orientation: int) -> np.ndarray:
        """The upright pixels of an encoded image, as :meth:`decode` returns them."""
        options = {"value_range": self.value_range, "channels_first": self.accepts.channels_first}
        return decode(encoded, orientation, channels=self.channels, **options)


def upright_shapes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths, int64 (n,), of the images of some rows, turned upright."""
    heights, widths = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
    turned = rows["orientation"] >= 5
    return np.where(turned, widths, heights), np.where(turned, heights, widths)


def printable(name: str) -> str:
    """A name, which may be that of any tar member, with whatever a terminal would obey or could not show escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
