"""Fixtures for the whole suite: fixed seeds, poisoned memory, and the GPU switch."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # "in item.keywords" would match a folder of that name too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _poisoned_and_seeded():
    """Fills fresh memory with NaN, so that an element that a kernel forgot to write is seen, and fixes the seed."""
    was = torch.are_deterministic_algorithms_enabled()
    # On CUDA a warning only: cuBLAS without a workspace setting, and PyTorch's attention backward, would raise.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
