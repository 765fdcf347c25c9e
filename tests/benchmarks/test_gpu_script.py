"""``make gpu``: every line of it on the CPU; what ends badly in it is recorded and takes nothing else with it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"

import end_to_end  # noqa: E402
import gpu  # noqa: E402
import gpu_numerics  # noqa: E402
import gpu_results  # noqa: E402
import gpu_stages  # noqa: E402
import report  # noqa: E402
import stand_in  # noqa: E402
from comparison import Comparison  # noqa: E402
from measure import Meter  # noqa: E402

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


def test_wheels_and_caches_that_cannot_be_used_are_recorded(plan, tmp_path):
    (tmp_path / "x-1-py3-none-any.whl").write_text("not a wheel")
    lines = plan(gpu.Stage("fine", 600), wheels=tmp_path, caches=tmp_path / "nowhere")
    assert [line["name"] for line in of_kind(lines, "stage")] == ["caches", "wheels", "fine"]
    assert lines[0]["end"].startswith("FileNotFoundError")


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


def test_caches_are_packed_up_to_the_limit_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_results, "LIMIT_BYTES", 300_000)
    caches = tmp_path / "caches"
    (caches / "triton").mkdir(parents=True)
    (caches / "triton" / "kernel.cubin").write_bytes(b"machine code")
    (caches / "triton" / "large").write_bytes(bytes(200_000))
    gpu_results.pack_caches(tmp_path, caches)
    gpu_results.unpack_caches(tmp_path / "caches.tar.gz", tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").rglob("*") if path.is_file()] == ["kernel.cubin"]
    assert (tmp_path / "again" / "triton" / "kernel.cubin").read_bytes() == b"machine code"


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


def test_an_op_that_raises_is_a_failed_case_with_its_message():
    case = gpu_numerics.Case("linear", "x", None, None, lambda: {"x": torch.zeros(1)})
    assert "TypeError" in gpu_numerics.check(case)["error"]


class Device:
    """A GPU as a host sees it: work is queued, and begins when all before it is done; cycles are microseconds."""

    def __init__(self):
        self.now, self.free = 0.0, 0.0

    def queue(self, host: float, device: float) -> None:
        self.now += host
        self.free = max(self.free, self.now) + device

    def __getattr__(self, name):
        return getattr(stand_in, name)

    def synchronize(self):
        self.now = max(self.now, self.free)

    def _sleep(self, cycles):
        self.queue(0.0, cycles * 1e-6)

    def Event(self, enable_timing=False):
        device = self

        class Event(stand_in.Event):
            def record(self, stream=None):
                self.at = max(device.free, device.now)

            def query(self):
                return device.now >= self.at

            def synchronize(self):
                device.now = max(device.now, self.at)

        return Event()


def test_a_meter_hides_what_the_host_takes_to_queue_a_call(monkeypatch):
    cuda = Device()
    monkeypatch.setattr(time, "perf_counter", lambda: cuda.now)
    meter = Meter(torch.device("cpu"), cuda)

    def call():  # three launches of 100 us on the host and 10 us on the device
        for _ in range(3):
            cuda.queue(100e-6, 10e-6)

    assert meter.time(call) > 200e-6  # the host's
    assert not meter.covered
    queued = meter.queue_seconds(call)
    assert queued == pytest.approx(300e-6)
    for calls in (1, 5):
        assert meter.time(call, calls, queue_seconds=queued) == pytest.approx(30e-6, abs=1e-8)
        assert meter.covered
    assert meter.median(call) == pytest.approx(30e-6, abs=1e-8)


@pytest.mark.parametrize(("both", "mfu", "reached"), [(96, 0.6, [True, True]), (94, 0.49, [False, False])])
def test_targets_are_those_of_the_model(both, mfu, reached):
    found = {"both": {"images_per_second": both}, "model": {"images_per_second": 100, "mfu": mfu}}
    assert [one["reached"] for one in end_to_end.targets(found, "imagenet-vit-l")] == reached
    assert [one["target"] for one in end_to_end.targets(found, "imagenet-vit-h")] == [0.95, 0.55]
    assert len(end_to_end.targets(found, "imagenet-vit-b")) == 1
