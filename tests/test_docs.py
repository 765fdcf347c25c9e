"""What README and docs say is true: examples run, links lead somewhere, and figures are those of committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_ops_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "random_masking" in block]
    scope: dict = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["visible"].shape == (8, 49, 768)
    assert scope["full"].shape == (8, 196, 256)
    assert 0.5 < scope["loss"].item() < 3


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
