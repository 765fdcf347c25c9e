"""Damaged and hostile files are refused by name, within the memory that their size allows, and execute nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fastmae.interop.files import read_pickle

SCRIPT = Path(__file__).parents[1] / "helpers" / "damaged_weights.py"


@pytest.mark.parametrize(
    ("first", "count"), [(0, 100), pytest.param(100, 1000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_damaged_files_are_refused_by_name_in_bounded_memory_and_execute_nothing(first, count, tmp_path):
    """In a process of its own, whose peak of memory is that of loading, and which may be ended."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(first), str(count)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    assert not found["failures"], "\n".join(found["failures"])
    assert found["kilobytes"] < 300_000


def write_pickle(path: Path, code: bytes) -> Path:
    """A file of ``torch.save`` with another pickle in it."""
    saved = io.BytesIO()
    torch.save({}, saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, code if name.endswith("data.pkl") else old.read(name))
    return path


@pytest.mark.parametrize("levels", [2, 40])
def test_a_key_that_takes_for_ever_to_hash_is_refused(levels, tmp_path):
    """Each level is a tuple of the one before it, twice: 2**40 objects in 200 bytes."""
    tuples = b"".join(b"q%ch%c\x86" % (level, level) for level in range(levels))
    path = write_pickle(tmp_path / "weights.pth", b"\x80\x02})" + tuples + b"K\x01s.")
    if levels == 2:
        assert read_pickle(path) == {(((), ()), ((), ())): 1}
    else:
        with pytest.raises(ValueError, match=r"weights.pth: .*a tuple of more than 100,000 objects"):
            read_pickle(path)
