"""Some images of a data set as a data set of their own, numbered from 0: those with labels, those not held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fastmae.data.dataset import Dataset
from fastmae.data.table import Table

_SCANNED = 1 << 16


def subset(dataset: Dataset, sample_ids: np.ndarray) -> Dataset:
    """The images ``sample_ids`` of a data set, ascending. What its index knows to be bad must not be among them."""
    whole = dataset.index
    digest = hashlib.blake2b(f"{whole.hash}/".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(sample_ids, "<i8").tobytes())
    content, rows = digest.hexdigest(), _Rows(whole.table, sample_ids)
    index = replace(whole, table=rows, reasons={}, content=content, verdicts={})
    same = ("name", "accepts", "max_bad_fraction", "embedded", "window")
    options = {name: getattr(dataset, name) for name in same}
    return Dataset(index, dataset.root, storage=_Renumbered(dataset.storage, sample_ids), **options)


class _Rows:
    """Some rows of a table, with what a data set asks of a table."""

    def __init__(self, table: Table, ids: np.ndarray) -> None:
        self._table, self._ids, self.names = table, ids, table.names

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return self._table.rows(self._ids[ids])

    def scan(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), _SCANNED):
            yield self._table.rows(self._ids[start : start + _SCANNED])


class _Renumbered:
    """A storage whose images are asked for by their numbers in the subset."""

    def __init__(self, storage: Any, ids: np.ndarray) -> None:
        self._storage, self._ids, self.path = storage, ids, storage.path

    def read(self, name: str, offset: int, size: int, sample_id: int) -> np.ndarray:
        return self._storage.read(name, offset, size, int(self._ids[sample_id]))
