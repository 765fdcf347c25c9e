"""What README and docs say is true: examples run, links lead somewhere, and figures are those of committed results."""

from __future__ import annotations

import inspect
import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from training import FLAGS, write_images

from fastmae import ops
from fastmae.cli import main
from fastmae.ops.attention import BACKENDS
from fastmae.ops.masking import STRATEGIES
from fastmae.train.metrics import combine_ranks
from fastmae.train.recipes import PHOTOGRAPHS

ROOT = Path(__file__).parents[2]

import report  # noqa: E402

README, OPS = ROOT / "README.md", ROOT / "docs" / "ops.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES_WITH_FLAGS = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def run(example: str, page: Path) -> dict:
    scope: dict = {}
    exec(compile(example, str(page), "exec"), scope)
    return scope


def test_the_ops_example_runs():
    (example,) = [block for block in blocks(README, "python") if "random_masking" in block]
    scope = run(example, README)
    assert scope["visible"].shape == (8, 49, 768)
    assert scope["full"].shape == (8, 196, 256)
    assert 0.5 < scope["loss"].item() < 3


@pytest.mark.parametrize(
    "example", blocks(OPS, "python"), ids=lambda example: " ".join(re.findall(r"ops\.(\w+)", example)[-1:])
)
def test_the_examples_of_every_op_run(example):
    if "transformers" in example:
        pytest.importorskip("transformers")
    run(example, OPS)


def test_every_op_is_documented_with_its_signature_and_an_example():
    stated = " ".join(" ".join(blocks(OPS, "")).split())
    stated = re.sub(r"=[^\s,)]+", "", stated).replace("*, ", "").replace("**", "")
    for name in set(ops.__all__) - {"Masking"}:
        assert f"{name}({', '.join(inspect.signature(getattr(ops, name)).parameters)})" in stated
        assert any(f"ops.{name}(" in example for example in blocks(OPS, "python")), name
    assert all(f'| `"{name}"` |' in OPS.read_text() for name in (*BACKENDS, *STRATEGIES))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_tree_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_the_photographs_page_describes_the_recipe():
    page = (ROOT / "docs/photographs.md").read_text()
    model, train = PHOTOGRAPHS.model, PHOTOGRAPHS.train
    assert f"at most {train.steps:,} steps of {train.global_batch_size} crops" in page
    assert f"encoder {model.embed_dim} wide, {model.depth} blocks; decoder {model.decoder_embed_dim} wide" in page


def test_the_figures_of_the_data_page_are_those_of_the_committed_measurements():
    page, results = (ROOT / "docs/data.md").read_text(), ROOT / "benchmarks/results"
    shards, index = (
        json.loads((results / name).read_text()) for name in ("counted/shards.json", "cpu-amd-epyc/index-build.json")
    )
    assert f"on {shards['images']} of ImageNet's images" in page
    for name, numbers in shards["stored"].items():
        label, share = f"JPEG {name}", f"{numbers['share']:.1%}"
        if name == "uncompressed":
            label, share = "not compressed", ""
        assert f"| {label} | {numbers['difference']:.2f} | {share} |" in page
    for kind, numbers in index["1e+08 rows"].items():
        if kind != "sparse":
            few, many = numbers["256 rows"], numbers["1024 rows"]["from_memory_cpu_ms"]
            times = f"{few['first_10_from_disk_ms'] / 1e3:,.1f} | {few['from_memory_cpu_ms']:,.2f} | {many:,.2f} |"
            assert f"| {numbers['bytes_per_row']:.0f} | {times}" in page
    page, new = " ".join(page.split()), index["build"]["new"]["cpu_us_per_file"]
    assert f"{new['workers']:.0f} µs of CPU time in a worker and {new['this process']:.0f} in the main process" in page
    assert f"an unchanged one {sum(index['build']['unchanged']['cpu_us_per_file'].values()):.0f} in all" in page
    speeds = json.loads((results / "cpu-amd-epyc/data.json").read_text())["benchmarks"]
    (pillow,) = [entry for entry in speeds if entry["competitor"] == report.BASELINE_LOADER]
    for source, words in (("folder", "and DALI"), ("tar shards at 256", "and")):
        torch_loader, dali = (pillow["ratios"][f"fastmae-{name}, {source}"] for name in ("torch", "dali"))
        assert f"{torch_loader:.2f} {words} {dali:.2f} times" in page


COMMANDS = ["pretrain", "bench", "plan", "plot", "reconstruct", "consolidate", "env", "inspect", "features", "convert"]
COMMANDS += ["ablate", "fit-target"]
COMMANDS += [f"data {name}" for name in ("shard", "index", "verify", "stats")]
COMMANDS += [
    f"evaluate {name}" for name in ("knn", "linear", "attentive", "robustness", "finetune", "partial", "scratch")
]


def test_every_flag_and_command_that_is_named_exists(capsys):
    flags = set()
    for command in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([*command.split(), "--help-all"])
        flags |= set(re.findall(r"--[a-z][a-z.-]*[a-z]", capsys.readouterr().out))
    flags |= {"--requeue", "--shutdown-timeout", "--signal", "--nodes", "--time"}  # of Slurm and torchrun
    flags |= {"--ntasks-per-node", "--gpus-per-node", "--kill-on-bad-exit"}  # of Slurm
    flags |= {"--max-restarts", "--redirects", "--log-dir", "--tee"}  # of torchrun
    flags |= {"--benchmark", "--changes", "--second", "--help-all", "--help"}  # pytest, make gpu, every command
    flags |= {"--frozen", "--random", "--head"}  # of examples/dense.py
    for page in PAGES_WITH_FLAGS:
        text = re.sub(r"<!--.*?-->|```python.*?```|torchrun .*? -m fastmae", "", page.read_text(), flags=re.DOTALL)
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", text))
        assert named <= flags, f"{page.name}: {named - flags}"
        commands = set(re.findall(r"^fastmae ((?:(?:data|evaluate) )?[a-z-]+)", text, re.MULTILINE))
        assert commands <= set(COMMANDS), f"{page.name}: {commands - set(COMMANDS)}"


TRAINING = ROOT / "docs" / "training.md"


def first_column(page: Path, heading: str) -> set[str]:
    """What a table's first cells have between backticks: of the first table behind a heading."""
    table = re.search(rf"\n## {heading}\n.*?\n((?:\|[^\n]*\n)+)", page.read_text(), re.DOTALL)[1]
    return {name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_the_metrics_and_files_of_a_run_are_those_of_the_tables(tmp_path):
    """Of a run that has everything to log but trouble."""
    told = "--train.steps 4 --train.warmup-steps 1 --report.picture-every-steps 2 --report.profile-at-step 1"
    flags = f"{FLAGS} --data.progressive-sizes 16 32 --train.log-every-steps 2 {told} --report.profile-steps 1"
    images, run_folder = str(write_images(tmp_path / "images")), tmp_path / "run"
    assert main(["pretrain", "--out", str(run_folder), "--data.path", images, *flags.split()]) == 0
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    several, _ = combine_ranks([[0.01, 0.02, 1.0, 2.0]] * 2, 0.1, ["node"] * 2)
    assert first_column(TRAINING, "Rows of numbers") == {*rows[-1], *several}
    stated = {name.rstrip("/") for name in first_column(TRAINING, "The run folder")}
    patterns = {re.sub(r"-N\b", "-*", name) for name in stated}
    assert all(any(run_folder.glob(pattern)) for pattern in patterns), patterns
    names = {path.name for path in run_folder.iterdir()} - {".lock"}
    assert not {name for name in names if not any(fnmatch(name, p.partition("/")[0]) for p in patterns)}
