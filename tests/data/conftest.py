"""Data sets for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from loading import write_mixed, write_source

from fastmae.data import Dataset, open_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Dataset:
    """Eleven small images of several sizes and formats."""
    root = write_source("folder", tmp_path_factory.mktemp("small"))
    return open_dataset(root, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Dataset:
    """An image of each format and mode that both loaders read."""
    root = write_mixed(tmp_path_factory.mktemp("mixed"))
    return open_dataset(root, max_bad_fraction=0, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def open_(tmp_path) -> Callable[..., Dataset]:
    return lambda path, **options: open_dataset(path, cache_dir=tmp_path / "cache", **options)
