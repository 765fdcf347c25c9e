"""What README and docs say is true: examples run, links lead somewhere, and figures are those of committed results."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

from fastmae import ops
from fastmae.cli import main
from fastmae.ops.attention import BACKENDS
from fastmae.ops.masking import STRATEGIES

ROOT = Path(__file__).parent.parent
README, OPS = ROOT / "README.md", ROOT / "docs" / "ops.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    stated = re.sub(r"=[^\s,)]+", "", stated).replace("*, ", "")
    for name in set(ops.__all__) - {"Masking"}:
        assert f"{name}({', '.join(inspect.signature(getattr(ops, name)).parameters)})" in stated
        assert any(f"ops.{name}(" in example for example in blocks(OPS, "python")), name
    assert all(f'| `"{name}"` |' in OPS.read_text() for name in (*BACKENDS, *STRATEGIES))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_tree_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_the_photographs_table_is_that_of_the_committed_run():
    summary = json.loads((ROOT / "benchmarks/results/photographs/summary.json").read_text())
    page = (ROOT / "docs/photographs.md").read_text()
    for name, numbers in summary["sets"].items():
        errors = (f"{numbers[key]:.3f}" for key in ("mse", "mse_mean_color", "mse_inverse_distance"))
        assert f"| {name} | {' | '.join(errors)} | {numbers['psnr']:.1f} dB |" in page
    assert f"{summary['steps']:,} steps of 32 crops took {summary['seconds']:.0f} s" in page


def test_the_table_of_packing_is_that_of_the_committed_measurement():
    measured = json.loads((ROOT / "benchmarks/results/counted/shards.json").read_text())
    page = (ROOT / "docs/data.md").read_text()
    assert f"on {measured['images']} of ImageNet's images" in page
    for name, numbers in measured["stored"].items():
        label, share = f"JPEG {name}", f"{numbers['share']:.1%}"
        if name == "uncompressed":
            label, share = "not compressed", ""
        assert f"| {label} | {numbers['difference']:.2f} | {share} |" in page


def test_the_cost_of_an_index_is_that_of_the_committed_measurement():
    measured = json.loads((ROOT / "benchmarks/results/counted/index.json").read_text())
    page = " ".join((ROOT / "docs/data.md").read_text().split())
    cache, disk = measured["from_cache"], measured["from_disk"]
    assert measured["images"] == 10**8
    assert f"costs {cache['sizes_ms']:.1f} ms for sizes and {cache['names_ms']:.1f} ms for names" in page
    assert f"{disk['sizes_ms']:.1f} and {disk['names_ms']:.1f} ms where the disk is read" in page


COMMANDS = ["pretrain", "bench", "plan", "reconstruct", "data shard", "data index", "data verify", "data stats"]


def test_every_flag_and_command_that_is_named_exists(capsys):
    flags = set()
    for command in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([*command.split(), "--help"])
        flags |= set(re.findall(r"--[a-z][a-z.-]*[a-z]", capsys.readouterr().out))
    for page in (README, ROOT / "docs" / "data.md"):
        text = re.sub(r"<!--.*?-->|```python.*?```|torchrun .*? -m fastmae", "", page.read_text(), flags=re.DOTALL)
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", text))
        assert len(named) > 4
        assert named <= flags, f"{page.name}: {named - flags}"
        commands = set(re.findall(r"^fastmae ((?:data )?[a-z]+)", text, re.MULTILINE))
        assert commands <= set(COMMANDS), f"{page.name}: {commands - set(COMMANDS)}"
