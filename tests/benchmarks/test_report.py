"""The pages written from benchmark results: right tables from given numbers, committed pages that are up to date."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import report
import soak
from results import append

ROOT = Path(__file__).parents[2]


MACHINE = {
    "device": "A Card", "cpu": "A Core", "cpu_capability": "AVX512", "threads": 1, "cuda": "13.0",
    "versions": {"python": "3.12.1", "torch": "2.99.0"},
}  # fmt: skip
STEP = {"fastmae": 0.2, "fastmae-compile": 0.1, "facebookresearch-sdpa": 0.3, "reference-compile": 0.09}
CHANGE = "change: fused AdamW"


def entry(group: str, competitor: str, median: float, **facts) -> dict:
    return {"group": group, "competitor": competitor, "rounds": 5, "seconds": {"median": median}, **facts}


def result(benchmarks: list[dict], **machine) -> dict:
    return {
        "machine": MACHINE | machine, "date": "2026-01-02", "commit": "abcdef012345-dirty", "benchmarks": benchmarks
    }  # fmt: skip


def step_results() -> list[dict]:
    # The ratio within rounds, 1.75, is not the ratio of the medians, 1.5.
    ratios = {"facebookresearch-sdpa": {"ratios": {"fastmae": 1.75, CHANGE: 1.2}}}
    return [
        entry("training step, ViT-Z/9, batch 3", name, seconds, images_per_s=3 / seconds, **ratios.get(name, {}))
        for name, seconds in (STEP | {CHANGE: 0.26}).items()
    ]


def op_results() -> list[dict]:
    measured = {
        "useful_bytes": 1000, "sector_bytes": 2000, "gb_per_s": 12.0, "copy_gb_per_s": 20.0, "share_of_copy": 0.6,
        "share_of_copy_by_sectors": 0.9, "flops": 500, "tflop_per_s": 0.006, "matmul_tflop_per_s": 60.0,
        "share_of_matmul": 0.0001,
    }  # fmt: skip
    times = {"fastmae": 2e-5, "plain": 5e-5, "plain-compile": 1e-5}
    return [entry("gather_x, case-1", name, seconds, **measured) for name, seconds in times.items()]


def machine(benchmarks: list[dict], **changes) -> report.Machine:
    return report.Machine({"run": result(benchmarks, **changes)})


def test_step_table_compares_like_with_like_and_marks_what_is_slower():
    (entries,) = machine(step_results()).of("training step").values()
    rows = {line.split("|")[1].strip(): line for line in report.step_table(entries).splitlines()}
    assert "| 1.75x | `fastmae` |" in rows["`facebookresearch-sdpa`"]
    assert "| **0.90x (slower)** | `fastmae-compile` |" in rows["`reference-compile`"]
    assert "| 200 ms | 15.0 | - | - |" in rows["`fastmae`"]
    assert not any("change" in row for row in rows)


def test_every_slower_case_is_listed():
    found = report.losses(machine(step_results() + op_results()))
    assert [(group.split(",")[0], ours, rival, round(value, 2)) for group, ours, rival, value in found] == [
        ("training step", "fastmae-compile", "reference-compile", 0.9),
        ("gather_x", "fastmae", "plain-compile", 0.5),
    ]


@pytest.mark.parametrize(("cuda", "says"), [("13.0", False), (None, True)])
def test_pages_name_hardware_versions_and_date_and_admit_that_no_gpu_was_used(cuda, says):
    texts = report.pages([machine(step_results() + op_results(), cuda=cuda)])
    for text in (texts[report.README], texts[report.PAGE]):
        assert ("No result from a GPU is committed yet" in text) == says
        assert "torch 2.99.0; 2026-01-02, commit abcdef012345-dirty" in text
    assert "| ViT-Z/9, batch 3 | 30.0 (`fastmae-compile`) | 1.75x | **0.90x (slower)** |" in texts[report.README]
    assert "the 2 comparisons where fastmae is slower" in texts[report.README]


def test_ratios_never_mix_two_runs():
    one = result(op_results())
    groups = report.Machine({"run": one, "again": one}).groups
    assert list(groups) == ["gather_x, case-1", "gather_x, case-1 (again)"]
    assert [len(entries) for entries in groups.values()] == [3, 3]


def test_lines_of_json_become_a_file_of_results(tmp_path):
    path = tmp_path / "run.jsonl"
    append(path, "machine", **{key: value for key, value in result([]).items() if key != "benchmarks"})
    for one in op_results():
        append(path, "benchmark", **one)
    append(path, "stage", name="numerics", found="exit code 1")
    subprocess.run([sys.executable, ROOT / "benchmarks/report.py", "collect", path], check=True)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found == result(op_results()) | {"stage": {"numerics": "exit code 1"}}
    assert "**Not complete.** numerics: exit code 1." in report.benchmarks_block([report.Machine({"run": found})])


def test_the_committed_kills_add_up_and_left_no_trace():
    result = json.loads((report.RESULTS / "cpu-amd-epyc/soak.json").read_text())
    assert result["verdict"] == soak.SAME
    assert all(kills > 0 for kills in result["by_mode"].values())
    assert sum(entry["kills"] for entry in result["rounds"]) == result["kills"]


def test_committed_pages_are_those_of_the_committed_results():
    machines = report.load(report.RESULTS)
    assert machines
    for path, text in report.pages(machines).items():
        assert (ROOT / path).read_text() == text, f"{path}: run make report"
