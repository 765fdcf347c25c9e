"""Closing a loader in the middle of its work, as every run does at its end, must not take the process down."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

SCRIPT = """
import sys
from pathlib import Path
from fastmae.data import create_loader, open_dataset

dataset = open_dataset(sys.argv[1], cache_dir=Path(sys.argv[1]) / ".cache")
for _ in range(12):
    with create_loader(dataset, loader="dali", batch_size=32, img_size=(64, 64), seed=0, num_threads=2) as loader:
        for _ in range(2):
            next(loader)
print("closed")
"""


def test_closing_the_dali_loader_while_it_works(tmp_path):
    pytest.importorskip("nvidia.dali")
    generator = np.random.default_rng(0)
    for number in range(8):
        pixels = generator.integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    # In a process of its own: what went wrong was a segmentation fault.
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr[-2000:]
