"""The page's section on the trainer from JPEGs: every number from the file, missed targets named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import report_end_to_end


def result(recipe: str, both: float, mfu: float) -> dict:
    reached = both >= 950
    return {
        "config": {"recipe": recipe, "train": {"compile": recipe.endswith("l"), "batch_size": 256}},
        "loader": {"images_per_second": 3000.0},
        "model": {"images_per_second": 1000.0, "mfu": mfu},
        "both": {"images_per_second": both, "mfu": mfu * both / 1000},
        "sentence": "The model is the bottleneck.",
        "targets": [{"what": "both / model", "target": 0.95, "found": both / 1000, "reached": reached}],
        "step": {"ms": 100.0, "stages_ms": {"forward": 60.0, "backward": 40.0}},
    }  # fmt: skip


def test_nothing_without_results(tmp_path):
    assert report_end_to_end.section(tmp_path) == ""


def test_rates_shares_and_targets_are_those_of_the_files(tmp_path):
    for name, found in (("large", result("vit-l", 960, 0.51)), ("huge", result("vit-h", 900, 0.6))):
        (tmp_path / f"end-to-end-{name}.json").write_text(json.dumps(found))
    text = report_end_to_end.section(tmp_path)
    assert "| large: vit-l compiled, batch 256 | 3,000 | 1,000 | 960 | 96.0% | 51.0% | 49.0% | reached |" in text
    assert "| huge: vit-h, batch 256 | 3,000 | 1,000 | 900 | 90.0% | 60.0% | 54.0% | missed: both / model 0.90" in text
    assert "| forward | 60.00 ms, 60.0% | 60.00 ms, 60.0% |" in text
