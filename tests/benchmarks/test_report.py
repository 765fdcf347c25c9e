"""The pages written from benchmark results: right tables from given numbers, committed pages that are up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soak

ROOT = Path(__file__).parents[2]

import report  # noqa: E402

MACHINE = {
    "device": "A Card", "cpu": "A Core", "cpu_capability": "AVX512", "threads": 1, "cuda": "13.0",
    "versions": {"python": "3.12.1", "torch": "2.99.0"},
}  # fmt: skip
STEP = {"fastmae": 0.2, "fastmae-compile": 0.1, "facebookresearch-sdpa": 0.3, "reference-compile": 0.09}
LEVER = "lever: fused AdamW"


def entry(group: str, competitor: str, median: float, **extra) -> dict:
    """As pytest-benchmark writes it."""
    times = dict.fromkeys(("median", "iqr", "q1", "q3", "min"), median)
    stats = times | {"rounds": 5, "data": [median] * 5, "mean": median}
    return {
        "group": group,
        "name": f"bench[{competitor}]",
        "extra_info": {"competitor": competitor} | extra,
        "stats": stats,
    }


def raw(benchmarks: list[dict], **machine) -> dict:
    return {
        "machine_info": {"node": "x", "fastmae": MACHINE | machine}, "datetime": "2026-01-02T03:04:05",
        "commit_info": {"id": "abcdef0123456789", "dirty": True}, "benchmarks": benchmarks,
    }  # fmt: skip


def step_results() -> list[dict]:
    # The ratio within rounds, 1.75, is not the ratio of the medians, 1.5.
    ratios = {"facebookresearch-sdpa": {"ratios": {"fastmae": 1.75, LEVER: 1.2}}}
    return [
        entry("training step, ViT-Z/9, batch 3", name, seconds, images_per_s=3 / seconds, **ratios.get(name, {}))
        for name, seconds in (STEP | {LEVER: 0.26}).items()
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
    return report.Machine("a-card", {"run": report.slim(raw(benchmarks, **changes))})


def test_slim_keeps_what_is_shown_and_no_single_times():
    slimmed = report.slim(raw(op_results()))
    first = slimmed["benchmarks"][0]
    assert first["competitor"] == "fastmae"
    assert first["seconds"]["median"] == 2e-5
    assert (first["rounds"], first["useful_bytes"], first["share_of_copy"]) == (5, 1000, 0.6)
    assert "data" not in json.dumps(slimmed)
    assert (slimmed["machine"], slimmed["date"], slimmed["commit"]) == (MACHINE, "2026-01-02", "abcdef012345-dirty")
    assert report.slim(slimmed) == slimmed


def test_step_table_compares_like_with_like_and_marks_what_is_slower():
    (entries,) = machine(step_results()).of("training step").values()
    rows = {line.split("|")[1].strip(): line for line in report.step_table(entries).splitlines()}
    assert "| 1.75x | `fastmae` |" in rows["`facebookresearch-sdpa`"]
    assert "| **0.90x (slower)** | `fastmae-compile` |" in rows["`reference-compile`"]
    assert "| 200 ms | 15.0 | - | - |" in rows["`fastmae`"]
    assert not any("lever" in row for row in rows)


def test_lever_table_has_each_lever_and_all_together():
    (entries,) = machine(step_results()).of("training step").values()
    table = report.lever_table(entries)
    assert "| fused AdamW | 1.20x |" in table
    assert "| all together (`fastmae`) | 1.75x |" in table


def test_op_table():
    groups = machine(op_results()).of("gather_x")
    table = report.op_table(groups, bandwidth=True).splitlines()
    assert table[0] == "|  | `fastmae` | GB/s | of a copy: bytes / sectors | `plain` | `plain-compile` |"
    assert table[2] == "| case-1 | 20 µs | 12 | 0.60 / 0.90 | 50 µs, 2.50x | 10 µs, **0.50x (slower)** |"
    without = report.op_table(groups, bandwidth=False).splitlines()
    assert without[2] == "| case-1 | 20 µs | 50 µs, 2.50x | 10 µs, **0.50x (slower)** |"


def test_every_slower_case_is_listed():
    found = report.losses(machine(step_results() + op_results()))
    assert [(group.split(",")[0], ours, rival, round(value, 2)) for group, ours, rival, value in found] == [
        ("training step", "fastmae-compile", "reference-compile", 0.9),
        ("gather_x", "fastmae", "plain-compile", 0.5),
    ]


def test_groups_without_us_show_the_fastest():
    results = [entry("attention short", "plain", 2e-3), entry("attention short", "sdpa", 1e-3)]
    assert "| short | 2 ms | **1 ms** |" in report.op_table(machine(results).of("attention"), bandwidth=True)


@pytest.mark.parametrize(("cuda", "says"), [("13.0", False), (None, True)])
def test_pages_name_hardware_versions_and_date_and_admit_that_no_gpu_was_used(cuda, says):
    texts = report.pages([machine(step_results() + op_results(), cuda=cuda)])
    for text in (texts[report.README], texts[report.PAGE]):
        assert ("No result from a GPU is committed yet" in text) == says
        assert "torch 2.99.0; 2026-01-02, commit abcdef012345-dirty" in text
    assert "| ViT-Z/9, batch 3 | 30.0 (`fastmae-compile`) | 1.75x | **0.90x (slower)** |" in texts[report.README]
    assert "the 2 comparisons where fastmae is slower" in texts[report.README]


def test_ratios_never_mix_two_runs():
    one = report.slim(raw(op_results()))
    groups = report.Machine("a-card", {"run": one, "again": one}).groups
    assert list(groups) == ["gather_x, case-1", "gather_x, case-1 (again)"]
    assert [len(entries) for entries in groups.values()] == [3, 3]


# Loaders: Pillow on a folder, WebDataset and ours on shards; ratios within rounds differ from those of the medians.
GROUP = "loader, 224 x 224 crops of 9 images, 2 cores"


def loader_results() -> list[dict]:
    found = []
    for name, seconds in {"pillow-uint8": 2.0, "pillow-float": 3.0, "fastmae-torch": 1.0}.items():
        ours = "fastmae-torch, folder"
        ratios = {"ratios": {ours: 2.25}, "cpu_ratios": {ours: 2.5}} if name == "pillow-uint8" else {}
        cpu = {"cpu_seconds_per_image": seconds / 100, "images_per_cpu_second": 100 / seconds}
        found.append(entry(GROUP, f"{name}, folder", seconds, images_per_s=100 / seconds, **cpu, **ratios))
    slow = {"cpu_seconds_per_image": 0.05, "images_per_cpu_second": 20.0}
    found.append(entry(GROUP, "fastmae-torch, tar shards", 4.0, images_per_s=25.0, **slow))
    fast = {"cpu_seconds_per_image": 0.06, "images_per_cpu_second": 17.0}
    found.append(entry(GROUP, "webdataset, tar shards", 3.0, images_per_s=33.0, **fast))
    by_stage = {"pillow-uint8": {"resize": 400.0, "decode": 1500.0}}
    by_stage["fastmae-torch"] = {"read": 10.0, "decode": 900.0, "resize": 100.0}
    return found + [entry("loader stages, one thread", who, 1.0, stages_us=us) for who, us in by_stage.items()]


def test_loaders_are_compared_by_the_clock_and_by_cpu_time_and_stages_are_summed():
    text = report.benchmarks_block([machine(loader_results())])
    assert "### Loader\n" in text
    assert "| `fastmae-torch` | folder | 100 | 2.25x | 100 | 2.50x |" in text
    assert "| `fastmae-torch` | tar shards | 25 | **0.50x (slower)** | 20 | **0.40x (slower)** |" in text
    assert "| `pillow-uint8` | folder | 50 | 1.00x | 50 | 1.00x |" in text
    assert "| µs per image | read | decode | resize | sum | whole loader, CPU |" in text
    assert "| `pillow-uint8` | - | 1,500 | 400 | 1,900 | 20,000 |" in text


def test_a_loader_is_slower_than_a_rival_on_the_same_source_only():
    found = [loss[1:] for loss in report.losses(machine(loader_results()))]
    assert found == [("fastmae-torch, tar shards", "webdataset, tar shards", 0.75)]


def end_to_end(recipe: str, both: float, mfu: float) -> dict:
    target = {"what": "both / model", "target": 0.95, "found": both / 1000, "reached": both >= 950}
    return {
        "config": {"recipe": recipe, "train": {"compile": recipe.endswith("l"), "batch_size": 256}},
        "loader": {"images_per_second": 3000.0}, "model": {"images_per_second": 1000.0, "mfu": mfu},
        "both": {"images_per_second": both, "mfu": mfu * both / 1000}, "sentence": "The model is the bottleneck.",
        "targets": [target], "step": {"ms": 100.0, "stages_ms": {"data": 40.0, "forward": 60.0}},
    }  # fmt: skip


def test_rates_shares_and_missed_targets_of_the_trainer_are_shown():
    found = {"end-to-end-large": end_to_end("vit-l", 960, 0.51), "end-to-end-huge": end_to_end("vit-h", 900, 0.6)}
    text = report.end_to_end_tables(found)
    assert "| large: vit-l compiled, batch 256 | 3,000 | 1,000 | 960 | 96.0% | 51.0% | 49.0% | reached |" in text
    assert "| huge: vit-h, batch 256 | 3,000 | 1,000 | 900 | 90.0% | 60.0% | 54.0% | missed: both / model 0.90" in text
    assert "| forward | 60.00 ms, 60.0% | 60.00 ms, 60.0% |" in text


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
