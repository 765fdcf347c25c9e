"""Fixtures for the whole suite: fixed seeds, poisoned memory, and the GPU switch."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton"):
    from triton import knobs

    INTERPRETED = knobs.runtime.interpret
else:
    INTERPRETED = False
FUSING = ("model.blocks", "ops._linear", "ops.norm_linear", "ops.gelu_linear")


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


@pytest.fixture(autouse=True, scope="session")
def _language_is_patched_once_per_launch():
    """Triton's interpreter patches ``triton.language`` at each launch, and again at every call of a device function,
    which takes a quarter of its time. Of the latter the first one in each module suffices: it lasts."""
    seen = set()

    def call(self, *args, **keywords):
        if self.fn.__module__ not in seen:
            seen.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            interpreter = import_module("triton.runtime.interpreter")
            patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture
def fused(monkeypatch):
    """Linear layers as the ops that GPUs use, wherever the test runs."""
    for name in FUSING:
        monkeypatch.setattr(import_module(f"fastmae.{name}"), "fuses", lambda *_: True)


@pytest.fixture(params=["ops"] if INTERPRETED else ["composition", "ops"])
def route(request):
    """Linear layers composed of PyTorch's operators, as on a CPU, and as the ops that GPUs use.

    Where kernels are interpreted, a CPU takes the ops too.
    """
    if request.param == "ops":
        request.getfixturevalue("fused")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
