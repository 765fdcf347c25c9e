"""``make gpu``: one line and a failure without CUDA; with it, no benchmark is run unless the GPU tests pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"

# Stands in for the interpreter: knows a GPU's name, notes what it is asked to run, and ends as it is told.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
  -) cat >/dev/null; echo nvidia-test ;;
  *"pytest tests"*) echo tests >> "$CALLS"; exit $TESTS_END ;;
  *"--benchmark-disable"*) ;;
  *"pytest benchmarks/bench_"*) echo "$3" >> "$CALLS" ;;
esac
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_cuda_it_says_so_in_one_line_and_fails(tmp_path):
    done = subprocess.run(
        ["bash", SCRIPT], env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def run_with_fake_python(tmp_path, tests_end: int, **variables: str) -> tuple[int, list[str]]:
    fake, calls = tmp_path / "python", tmp_path / "calls"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    calls.touch()
    done = subprocess.run(
        ["bash", SCRIPT], capture_output=True,
        env=os.environ | {
            "PYTHON": str(fake), "CALLS": str(calls), "TESTS_END": str(tests_end), "OUT": str(tmp_path / "out")
        } | variables,
    )  # fmt: skip
    return done.returncode, calls.read_text().split()


@pytest.mark.parametrize("end", [1, 5])  # pytest's exit codes: some failed, none were found
def test_no_benchmark_runs_unless_the_gpu_tests_pass(end, tmp_path):
    code, calls = run_with_fake_python(tmp_path, end)
    assert code != 0
    assert calls == ["tests"]


def test_every_benchmark_runs_once_the_most_valuable_first(tmp_path):
    code, calls = run_with_fake_python(tmp_path, 0)
    assert code == 0
    assert calls[:5] == ["tests", "benchmarks/bench_attention.py", *["benchmarks/bench_step.py"] * 3]
    assert set(calls[1:]) == {f"benchmarks/{path.name}" for path in SCRIPT.parent.glob("bench_*.py")}
    assert not [call for call in set(calls) if calls.count(call) > 1 and call != "benchmarks/bench_step.py"]


def test_some_benchmarks_can_be_asked_for_by_name(tmp_path):
    code, calls = run_with_fake_python(tmp_path, 0, ONLY="block step-base")
    assert code == 0
    assert calls == ["tests", "benchmarks/bench_step.py", "benchmarks/bench_block.py"]


def test_nothing_that_does_not_exist_is_planned():
    planned = set(re.findall(r"\bbench_\w+\.py", SCRIPT.read_text()))
    assert planned
    assert not [name for name in planned if not (SCRIPT.parent / name).exists()]


def test_what_no_time_is_left_for_is_named_and_the_run_fails(tmp_path):
    code, calls = run_with_fake_python(tmp_path, 0, BUDGET="5")
    assert code != 0
    assert calls == ["tests"]
