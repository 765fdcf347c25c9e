"""``make gpu``: one line and a failure without CUDA; with it, no benchmark is run unless the GPU tests pass."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"
sys.path.append(str(SCRIPT.parent))

import end_to_end  # noqa: E402

# Stands in for the interpreter: knows a GPU's name, notes what it is asked to run, and ends as it is told.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
  -) cat >/dev/null; echo nvidia-test ;;
  *"pytest tests"*) echo tests >> "$CALLS"; exit $TESTS_END ;;
  *"--benchmark-disable"*) ;;
  *"pytest benchmarks/bench_"*) echo "$3" >> "$CALLS" ;;
  "-m benchmarks."*) echo "benchmarks/${2#benchmarks.}.py" >> "$CALLS" ;;
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
    several = ["benchmarks/end_to_end.py", "benchmarks/bench_step.py"]
    assert calls[:7] == ["tests", "benchmarks/bench_attention.py", *several, *several, "benchmarks/bench_modes.py"]
    several.append("benchmarks/bench_modes.py")
    benchmarks = {f"benchmarks/{path.name}" for path in SCRIPT.parent.glob("bench_*.py")}
    assert set(calls[1:]) == {*benchmarks, *several}
    assert not [call for call in set(calls) if calls.count(call) > 1 and call not in several]


def test_some_benchmarks_can_be_asked_for_by_name(tmp_path):
    code, calls = run_with_fake_python(tmp_path, 0, ONLY="block step-base")
    assert code == 0
    assert calls == ["tests", "benchmarks/bench_step.py", "benchmarks/bench_block.py"]


def test_a_benchmark_that_is_no_pytest_file_can_be_asked_for_by_name_too(tmp_path):
    code, calls = run_with_fake_python(tmp_path, 0, ONLY="end-to-end-huge")
    assert code == 0
    assert calls == ["tests", "benchmarks/end_to_end.py"]


def test_nothing_that_does_not_exist_is_planned():
    planned = set(re.findall(r"\b(?:bench_\w+|end_to_end)\.py", SCRIPT.read_text()))
    assert planned
    assert not [name for name in planned if not (SCRIPT.parent / name).exists()]


def test_end_to_end_measures_on_images_of_its_own_and_says_what_the_targets_say(tmp_path, capsys, monkeypatch):
    flags = "--count 16 --batch 4 --seconds 0.1 --train.num-threads 1 --data.num-threads 1 --train.device cpu"
    sizes = "--model.img-size 32 --model.patch-size 16 --model.depth 1 --model.embed-dim 32 --model.num-heads 2"
    decoder = "--model.decoder-embed-dim 32 --model.decoder-depth 1 --model.decoder-num-heads 2 --data.loader torch"
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", str(out), *f"{flags} {sizes} {decoder}".split()])
    threads = torch.get_num_threads()
    try:
        assert end_to_end.main() == 0
    finally:
        torch.set_num_threads(threads)
    found, text = json.loads(out.read_text()), capsys.readouterr().out
    assert found["config"]["train"]["global_batch_size"] == 4
    assert found["config"]["data"]["path"] == "16 JPEGs"
    assert found["images"]["mean_pixels"] == 500 * 375
    assert [one["target"] for one in found["targets"]] == [0.95, 0.5]
    assert "missed: MFU, model alone" in text or "reached: MFU, model alone" in text


@pytest.mark.parametrize(("both", "mfu", "reached"), [(96, 0.6, [True, True]), (94, 0.49, [False, False])])
def test_targets_are_those_of_the_model(both, mfu, reached):
    found = {"both": {"images_per_second": both}, "model": {"images_per_second": 100, "mfu": mfu}}
    assert [one["reached"] for one in end_to_end.targets(found, "imagenet-vit-l")] == reached
    assert [one["target"] for one in end_to_end.targets(found, "imagenet-vit-h")] == [0.95, 0.55]
    assert len(end_to_end.targets(found, "imagenet-vit-b")) == 1


def test_what_no_time_is_left_for_is_named_and_the_run_fails(tmp_path):
    code, calls = run_with_fake_python(tmp_path, 0, BUDGET="5")
    assert code != 0
    assert calls == ["tests"]
