"""What a batch is made of, as a pure function of its step: samples, where their pixels are, boxes, flips, colours."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastmae.data.augment import Augment, crop_boxes, flips, jitter_factors
from fastmae.data.dataset import Dataset, upright_shapes
from fastmae.data.errors import DataError
from fastmae.data.sampler import Order, batch_positions, micro_batches, replacements

ImgSize = tuple[int, int] | Callable[[int], tuple[int, int]]
"""Height and width, or a function that gives them for an epoch."""


class Source(NamedTuple):
    """The pixels of a sample: where they are, and which box of them. Plain Python values: they are read for each image,
    and NumPy's scalars take ten times as long.

    Attributes:
        sample_id: whose pixels these are.
        file, offset, size: name of the file that holds the image, and which of its bytes.
        height, width: as stored.
        orientation, format, mode: as in the index.
        box: top, left, height, width in the upright image.
    """

    sample_id: int
    file: str
    offset: int
    size: int
    height: int
    width: int
    orientation: int
    format: int
    mode: int
    box: list[int]


@dataclass(frozen=True)
class Plan:
    """Everything about one batch that is known before a file is opened. All arrays have one row per sample.

    Attributes:
        step: the batch's number, from where the loader started.
        img_size: height and width of the images.
        positions: int64, global positions.
        sample_ids, epochs: int64, the keys of the samples' random draws.
        flips: bool (n, 2), left and right, top and bottom.
        jitter: float64 (n, 4), factors of brightness, contrast and saturation, and the shift of hue; or None.
        sources: of each sample, its own pixels except for replacements.
    """

    step: int
    img_size: tuple[int, int]
    positions: np.ndarray
    sample_ids: np.ndarray
    epochs: np.ndarray
    flips: np.ndarray
    jitter: np.ndarray | None
    sources: list[Source]

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True)
class Planner:
    """Makes plans: of the batches that :func:`fastmae.data.sampler.batch_positions` numbers."""

    dataset: Dataset
    batch_size: int
    img_size: ImgSize
    seed: int
    position: int
    rank: int
    world_size: int
    augment: Augment
    samples_per_step: int

    @cached_property
    def order(self) -> Order:
        return self.dataset.order(self.seed)

    def size(self, step: int) -> tuple[int, int]:
        """Height and width of a batch's images: those of the epoch in which its optimiser step begins, on every
        rank."""
        if not callable(self.img_size):
            return self.img_size
        per_step = len(micro_batches(self.samples_per_step, self.batch_size, world_size=self.world_size))
        first = self.position + step // per_step * self.samples_per_step
        height, width = self.img_size(first // len(self.dataset))
        if min(height, width) < 1:
            raise ValueError(f"img_size: expected at least 1, got {(height, width)} at global position {first}")
        return height, width

    def plan(self, step: int) -> Plan:
        """The plan of a step. Images that the index knows to be bad are replaced."""
        ranks = {"rank": self.rank, "world_size": self.world_size, "total": self.samples_per_step}
        positions = batch_positions(step, batch_size=self.batch_size, position=self.position, **ranks)
        sample_ids, epochs = self.order.ids(positions)
        source_ids = sample_ids.copy()
        for j in np.flatnonzero(self.dataset.is_bad(sample_ids)):
            source_ids[j] = self.replacement(int(sample_ids[j]), int(epochs[j]), ())
        size = self.size(step)
        sources = self._sources(sample_ids, epochs, source_ids, size)
        keys = {"seed": self.seed, "augment": self.augment}
        mirrored, jitter = flips(sample_ids, epochs, **keys), jitter_factors(sample_ids, epochs, **keys)
        return Plan(step, size, positions, sample_ids, epochs, mirrored, jitter, sources)

    def replacement(self, sample_id: int, epoch: int, excluded: Container[int]) -> int:
        """The sample that takes the place of a bad one: a function of the latter's keys and of which files are bad.

        Raises:
            DataError: no good sample is found.
        """
        for candidate in replacements(sample_id, epoch, len(self.dataset), self.seed):
            if candidate not in excluded and not self.dataset.is_bad(np.array([candidate]))[0]:
                return candidate
        path = self.dataset.path(sample_id)
        raise DataError(f"{path} does not decode, and neither does anything that could take its place")

    def replace(self, plan: Plan, j: int, excluded: Container[int]) -> Source:
        """Another source for sample ``j``, with the box that the sample's keys draw in it."""
        row = slice(j, j + 1)
        sample_ids, epochs = plan.sample_ids[row], plan.epochs[row]
        other = np.array([self.replacement(int(sample_ids[0]), int(epochs[0]), excluded)])
        return self._sources(sample_ids, epochs, other, plan.img_size)[0]

    def _sources(self, sample_ids, epochs, source_ids, img_size) -> list[Source]:
        rows = self.dataset.rows(source_ids)
        keys = {"seed": self.seed, "augment": self.augment, "img_size": img_size}
        boxes = crop_boxes(sample_ids, epochs, *upright_shapes(rows), **keys)
        fields = (rows[name].tolist() for name in Source._fields[2:-1])
        columns = source_ids.tolist(), self.dataset.files(rows), *fields, boxes.tolist()
        return list(map(Source._make, zip(*columns, strict=True)))


class Batch(NamedTuple):
    """One rank's part of a global batch, on the loader's device.

    Attributes:
        images: uint8, or float32 in [0, 1] of data with a ``value_range``; logically (N, C, H, W), memory is
            (N, H, W, C), so this is a channels-last view.
        sample_ids: int64 (N,), the samples' positions in the index. The replacement of an undecodable sample keeps the
            id of the one it replaces, so that keys of masks do not depend on when a bad file was found.
        epochs: int64 (N,); one batch may hold the end of an epoch and the beginning of the next.
    """

    images: Tensor
    sample_ids: Tensor
    epochs: Tensor


class LateBad(NamedTuple):
    """A file that was found not to decode when training came to it.

    Attributes:
        sample_id: its number in the index.
        reason: why it does not decode.
        position: the global position at which it was found.
    """

    sample_id: int
    reason: str
    position: int
