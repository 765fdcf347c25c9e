"""``make gpu``: every line of it on the CPU; what ends badly in it is recorded and takes nothing else with it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import gpu
import gpu_numerics
import gpu_results
import gpu_stages
import pytest
import report
import stand_in
import torch
from comparison import Comparison
from measure import Meter

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


# What no CPU does; whatever else fails in a dry run would fail on a GPU too.
ONLY_ON_GPUS = ("weight gradient, fp32", "a scale per row, fast accumulation", "a scale per row, exact accumulation")


def of_kind(lines: list[dict], kind: str) -> list[dict]:
    return [line for line in lines if line["kind"] == kind]


def run_script(out: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, "--out", out, *flags], capture_output=True, text=True)


def test_a_dry_run_goes_through_the_plan_and_leaves_the_files_of_a_real_one(tmp_path):
    done = run_script(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = gpu_results.read_lines(tmp_path / "results.jsonl")
    assert [line["name"] for line in of_kind(lines, "stage")] == [stage.name for stage in gpu.FIRST]
    failed = {line["competitor"]: line["error"] for line in of_kind(lines, "failed")}
    assert not failed.keys() - set(ONLY_ON_GPUS), failed
    assert all(line["passed"] for line in of_kind(lines, "numerics"))
    kinds = {line["kind"] for line in lines}
    assert kinds >= {"machine", "environment", "benchmark", "round", "kernels", "end_to_end", "choices", "unavailable"}
    with tarfile.open(tmp_path / "results.tar.gz") as tar:
        names = set(tar.getnames())
        measured = json.load(tar.extractfile("measured.json"))
        attention = json.load(tar.extractfile("attention.json"))
        tar.extractall(tmp_path / "results" / "a-card", filter="data")
    assert names >= {"results.jsonl", "log.txt", "end-to-end-large.json", "environment.txt", "attention_choices.json"}
    assert (tmp_path / "caches.tar.gz").exists()
    page = report.pages(report.load(tmp_path / "results"))[report.PAGE]
    assert "fastmae-graph-bf16-residual" in page
    assert {one["competitor"] for one in attention["benchmarks"]} >= {"sdpa", "plain"}
    groups = {}
    for one in measured["benchmarks"]:
        groups.setdefault(one["group"].split(",")[0], set()).add(one["competitor"])
    assert groups["training step"] >= {"fastmae", "fastmae-compile", "reference-compile", "fastmae-graph"}
    assert groups["training step with clipping"] == {"fastmae-bf16-residual", "fastmae-graph-bf16-residual"}


def dry_run(out: Path) -> gpu_stages.Run:
    results = gpu_results.JsonLines(out / "results.jsonl", "x")
    return gpu_stages.Run(out, results, Meter(torch.device("cpu"), stand_in), True, 0, 1)


SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("huge", "modes")]


@pytest.mark.parametrize("stage", ["levers", "loaders", *SLOW])
def test_stages_of_the_second_part(stage, tmp_path):
    threads = torch.get_num_threads()
    run = dry_run(tmp_path)
    try:
        gpu_stages.STAGES[stage](run)
    finally:
        torch.set_num_threads(threads)
    lines = gpu_results.read_lines(run.results.path)
    assert not [line for line in of_kind(lines, "failed") if "DALI" not in line["error"]]
    assert of_kind(lines, "end_to_end" if stage == "loaders" else "benchmark")


@pytest.mark.slow
def test_tests_and_benchmarks_of_the_second_part_leave_a_line_each(tmp_path):
    tests = gpu.second(dry_run=True)[0].name
    done = run_script(tmp_path, "--dry-run", "--second", "--only", "ops", tests)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = gpu_results.read_lines(tmp_path / "results.jsonl")
    assert "skipped" in {line["outcome"] for line in of_kind(lines, "test") if line["stage"] == tests}
    assert of_kind(lines, "benchmark")
    assert gpu.second(dry_run=False)[0].name == "tests/ops/test_masking.py"


STAGES = """
import json, os, signal, sys, time
name, out = sys.argv[1:3]
sys.stdin.readline()
with open(out + "/results.jsonl", "a") as file:
    file.write(json.dumps({"kind": "round", "group": name, "competitor": "a", "seconds": 2.0}) + "\\n")
print("output of " + name, flush=True)
if name == "hangs":
    time.sleep(60)
if name == "crashes":
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "no-device":
    sys.exit(3)
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Runs a plan of stages that hang, crash, find no device, or are well; returns the results' lines."""
    (tmp_path / "stages.py").write_text(STAGES)
    monkeypatch.setattr(gpu.Run, "script", tmp_path / "stages.py")
    names = {"out": tmp_path / "out", "dry_run": False, "second": False, "caches": None, "wheels": None}

    def run(*stages: gpu.Stage, **changes) -> list[dict]:
        one = gpu.Run(argparse.Namespace(**names | changes))
        one.caches = tmp_path / "caches"
        try:
            one.plan(stages)
        finally:
            one.end()
        return gpu_results.read_lines(tmp_path / "out" / "results.jsonl")

    return run


def test_a_stage_that_crashes_or_hangs_takes_no_other_with_it(plan):
    lines = plan(
        gpu.Stage("crashes", 600), gpu.Stage("hangs", 600, limit=0.3), gpu.Stage("late", 0), gpu.Stage("fine", 600)
    )
    ends = {line["name"]: line for line in of_kind(lines, "stage")}
    assert list(ends) == ["crashes", "hangs", "late", "fine"]
    assert ends["crashes"]["end"] == "exit code -11"
    assert "output of crashes" in ends["crashes"]["error"]
    assert "ended at its time" in ends["hangs"]["end"]
    assert "left out" in ends["late"]["end"]
    assert ends["fine"]["end"] == "done"
    assert [line["group"] for line in of_kind(lines, "round")] == ["crashes", "hangs", "fine"]


def test_without_a_device_it_says_so_and_ends(plan):
    with pytest.raises(SystemExit, match="no CUDA device"):
        plan(gpu.Stage("no-device", 600), gpu.Stage("fine", 600))


def test_a_run_that_is_killed_leaves_what_it_measured(tmp_path):
    lines = gpu_results.JsonLines(tmp_path / "results.jsonl", "x")
    lines.write("machine", machine={"device": "x"}, date="2026-01-02", commit="y")
    for seconds in (1.0, 3.0, 2.0):
        lines.write("round", group="step", competitor="ours", seconds=seconds)
    with lines.path.open("a") as file:
        file.write('{"kind": "round", "gro')
    files = gpu_results.as_files(gpu_results.read_lines(lines.path))
    (one,) = json.loads(files["measured.json"])["benchmarks"]
    assert (one["competitor"], one["seconds"]["median"], one["rounds"], one["cut_off"]) == ("ours", 2.0, 3, True)


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_wrong_numerics_are_recorded_and_mark_only_what_they_touch(factor, tmp_path):
    case = next(iter(gpu_numerics.cases(torch.device("cpu"), tiny=True)))
    found = gpu_numerics.check(gpu_numerics.Case(
        "norm_linear", "x", lambda **a: [factor * out for out in case.ours(**a)], case.plain, case.make
    ))  # fmt: skip
    assert not found["passed"]
    assert {"error", "allowed", "scale"} <= found["values"][0].keys()
    run = dry_run(tmp_path)
    run.write("numerics", **found)
    run.comparison(Comparison("x", {"fastmae": lambda: 1, "plain": lambda: 1}), ("norm_linear", "attention"))
    run.comparison(Comparison("y", {"fastmae": lambda: 1}), ("attention",))
    marks = {(one["group"], one["competitor"]): one.get("wrong_numerics") for one in of_kind(
        gpu_results.read_lines(run.results.path), "benchmark"
    )}  # fmt: skip
    assert marks == {("x", "fastmae"): ["norm_linear"], ("x", "plain"): None, ("y", "fastmae"): None}
