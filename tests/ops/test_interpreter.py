"""The tests of the ops once more, on the Triton kernels: Triton's interpreter takes a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmae.ops import _dispatch, masking

knobs = pytest.importorskip("triton").knobs


@pytest.mark.ops
@pytest.mark.skipif(not knobs.runtime.interpret, reason="kernels are compiled in this process")
def test_ops_on_cpu_tensors_launch_kernels(monkeypatch):
    assert _dispatch.is_interpreted()
    launched = []
    kernel = masking._kernels.random_masking_kernel
    run = type(kernel).run
    monkeypatch.setattr(type(kernel), "run", lambda self, *a, **k: (launched.append(self), run(self, *a, **k))[1])
    masking.random_masking(1, 16, 0.75, seed=0)
    assert launched == [kernel]


@pytest.mark.skipif(knobs.runtime.interpret, reason="this is that process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests of the ops have just run the kernels on the GPU")
def test_ops_pass_in_the_interpreter():
    """Passes only if every test marked ``ops`` does, among them the one above, which proves that kernels ran."""
    command = [sys.executable, "-m", "pytest", "-m", "ops", "-v", "-p", "no:cacheprovider", "tests"]
    result = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
    assert re.search(r"test_ops_on_cpu_tensors_launch_kernels PASSED", result.stdout), result.stdout[-20_000:]
