"""Closing a loader in the middle of its work, as every run does at its end, must not take the process down."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from training import write_images

SCRIPT = """
import sys
from pathlib import Path
from fastmae.data import create_loader, open_dataset

dataset = open_dataset(sys.argv[1], cache_dir=Path(sys.argv[1]) / ".cache")
for _ in range(6):
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


DAMAGE = """
import sys
from pathlib import Path
from fastmae.data import create_loader, open_dataset

root = Path(sys.argv[1])
dataset = open_dataset(root, cache_dir=root / ".cache", max_bad_fraction=0.5)
size = (root / "3.jpg").stat().st_size
(root / "3.jpg").write_bytes(bytes(size))  # as some file systems leave a file behind after a crash
content = bytearray((root / "5.jpg").read_bytes())
content[2:200] = bytes(198)
(root / "5.jpg").write_bytes(content)
options = {"batch_size": 5, "img_size": (64, 64), "seed": 0, "num_threads": 2}
batches = {}
for kind in ("dali", "torch"):
    with create_loader(dataset, loader=kind, **options) as loader:
        batches[kind] = [next(loader) for _ in range(8)]
        assert [Path(bad.path).name for bad in loader.bad_files] == ["3.jpg", "5.jpg"]
for dali, torch in zip(batches["dali"], batches["torch"]):
    assert dali.sample_ids.tolist() == torch.sample_ids.tolist()
    assert (dali.images.float() - torch.images.float()).abs().mean() < 3
print("replaced")
"""


def test_files_that_lose_their_headers_after_the_index_was_made(tmp_path):
    pytest.importorskip("nvidia.dali")
    write_images(tmp_path, 8)
    done = subprocess.run([sys.executable, "-c", DAMAGE, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "replaced\n"), done.stderr[-2000:]
