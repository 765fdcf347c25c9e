"""Fixtures for the benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def synchronized(device) -> Callable[[Callable], Callable]:
    """Wraps a step so that it returns when the GPU has finished."""

    def wrap(step: Callable) -> Callable:
        if device.type != "cuda":
            return step

        def timed():
            result = step()
            torch.cuda.synchronize(device)
            return result

        return timed

    return wrap
