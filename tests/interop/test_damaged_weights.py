"""Damaged and hostile files are refused by name, within the memory that their size allows, and execute nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
