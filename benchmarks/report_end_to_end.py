"""The section of docs/benchmarks.md on the trainer from JPEGs on a disk, from the files of ``end_to_end.py``."""

from __future__ import annotations

import json
from pathlib import Path

from report_results import rows_to_table

_HEAD = """`fastmae bench`: the trainer's own steps on batches from JPEGs in the page cache, on one resident batch, and
the loader alone. MFU is of the rate of a large matrix product, measured in the same run.
"""
_GOES = """Where a step goes, loader and model together, by events around the stages.
"""


def section(folder: Path) -> str:
    """The text for a machine's folder of results; empty without such a file."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("end-to-end-*.json"))}
    if not found:
        return ""
    return "\n".join(["### From JPEGs to weights\n", _HEAD, _rates(found), "", _GOES, _stages(found), ""])


def _rates(found: dict[str, dict]) -> str:
    rows = []
    for name, one in found.items():
        config, model, both = one["config"], one["model"], one["both"]
        compiled = " compiled" if config["train"]["compile"] not in (False, "none") else ""
        missed = [f"{t['what']} {t['found']:.2f} of {t['target']:.2f}" for t in one["targets"] if not t["reached"]]
        share = both["images_per_second"] / model["images_per_second"]
        rows.append([
            f"{name.removeprefix('end-to-end-')}: {config['recipe']}{compiled}, batch "
            f"{config['train']['batch_size']}",
            *(f"{one[phase]['images_per_second']:,.0f}" for phase in ("loader", "model", "both")),
            f"{share:.1%}", f"{model['mfu']:.1%}", f"{both['mfu']:.1%}",
            "missed: " + "; ".join(missed) if missed else "reached", one["sentence"],
        ])  # fmt: skip
    head = ["", "loader, images/s", "model", "both", "both of model", "MFU, model", "MFU, both", "targets", "in words"]
    return rows_to_table(head, rows)


def _stages(found: dict[str, dict]) -> str:
    steps = {name.removeprefix("end-to-end-"): one["step"] for name, one in found.items()}
    names = list(dict.fromkeys(name for step in steps.values() for name in step["stages_ms"]))
    rows = [[name] for name in names]
    for row in rows:
        for step in steps.values():
            ms = step["stages_ms"].get(row[0], 0.0)
            row.append(f"{ms:.2f} ms, {ms / step['ms']:.1%}")
    return rows_to_table(["stage", *steps], rows)
