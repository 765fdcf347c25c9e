"""``make gpu``: its stages on the CPU; what ends badly in it is recorded and takes nothing else with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import bench_step
import gpu
import pytest
import report
import torch
from commands import outside_xdist
from results import append, collect

ROOT = Path(__file__).parents[2]


def run_script(out: Path, *flags: str) -> subprocess.CompletedProcess:
    script = ROOT / "benchmarks" / "gpu.py"
    command = [sys.executable, script, "--out", out, *flags]
    return subprocess.run(command, env=outside_xdist(), capture_output=True, text=True)


STAGES = [stage.name for stage in gpu.FIRST]
# The other ones are tests of this suite, "base" with other models and competitors, or run with --tiny in .ci/run.
DIFFERENT = ["attention", "choices", "base", "end-to-end"]


@pytest.mark.parametrize("stages", [DIFFERENT, pytest.param(STAGES, marks=pytest.mark.slow)], ids=["different", "all"])
def test_a_dry_run_goes_through_the_stages_and_leaves_a_folder_of_results(stages, tmp_path):
    out = tmp_path / "a-card"
    done = run_script(out, "--dry-run", "--only", *stages)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()[-5000:]
    results = json.loads((out / "results.json").read_text())
    assert results["stage"] == dict.fromkeys(stages, "done")
    groups = {}
    for one in results["benchmarks"]:
        groups.setdefault(one["group"].split(",")[0], set()).add(one["competitor"])
    steps = {"fastmae", "fastmae-compile", "reference-compile", "fastmae-graph"}
    assert groups["training step"] >= steps
    assert groups["attention"] >= {"sdpa", "plain"}
    assert "plain" in (out / "attention_choices.json").read_text()
    page = report.pages(report.load(tmp_path))[report.PAGE]
    assert "fastmae-graph" in page
    assert "loader, images/s" in page  # end to end


def test_stages_name_competitors_that_exist():
    commands = [command for stage in (*gpu.FIRST, *gpu.SECOND) for command in stage.commands]
    named = {
        name for command in commands for names in re.findall(r"--only (\S+)", command) for name in names.split(",")
    }
    assert named
    assert named <= (bench_step.RECIPES | bench_step.CHANGES).keys()


SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("huge", "modes", "ops", gpu.gpu_tests()[0].name)]


@pytest.mark.parametrize("stage", ["changes", *SLOW])
def test_stages_of_the_second_part(stage, tmp_path):
    done = run_script(tmp_path, "--dry-run", "--second", "--only", stage)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-5000:]
    assert json.loads((tmp_path / "results.json").read_text())["benchmarks"] or stage.startswith("tests/")


def stage(name: str, then: str = "", until: float = 600, limit: float = 600) -> gpu.Stage:
    code = f"import os, sys, time; sys.stdin.readline(); print({name!r}, flush=True); {then}"
    return gpu.Stage(name, until, (f'-c "{code}" --wait',), limit)


def test_a_stage_that_crashes_or_hangs_takes_no_other_with_it(tmp_path):
    plan = gpu.Plan(tmp_path)
    plan.run(
        (
            stage("crashes", "os.abort()"),
            stage("hangs", "time.sleep(60)", limit=1),
            stage("late", until=0),
            stage("fine"),
        )
    )
    ends = collect(tmp_path / "results.jsonl")["stage"]
    assert ends == {
        "crashes": "exit code -6",
        "hangs": "ended at its time, 1 s after it began",
        "late": "left out: its time was gone",
        "fine": "done",
    }
    assert plan.bad == ["crashes", "hangs", "late"]
    assert (tmp_path / "log.txt").read_text().split() == ["crashes", "hangs", "fine"]


def test_what_cannot_wait_starts_when_the_stage_before_it_has_ended(tmp_path):
    made = tmp_path / "made"
    reader = gpu.Stage("reads", 600, (f"-c \"open('{made}')\"",))
    plan = gpu.Plan(tmp_path)
    plan.run((stage("makes", f"time.sleep(0.5); open('{made}', 'w')"), reader))
    assert not plan.bad


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main()


def test_a_run_that_is_killed_leaves_what_it_measured(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, "machine", machine={"device": "x"}, date="2026-01-02", commit="y")
    for seconds in (1.0, 3.0, 2.0):
        append(path, "round", group="step", competitor="ours", seconds=seconds)
    with path.open("a") as file:
        file.write('{"kind": "round", "gro')
    found = collect(path)
    (one,) = found["benchmarks"]
    assert (one["competitor"], one["seconds"]["median"], one["rounds"], one["cut_off"]) == ("ours", 2.0, 3, True)
    assert found["machine"] == {"device": "x"}
