"""``fastmae plot``: curves of runs, finished or not, or the accuracies of a table of ``fastmae ablate``."""

from __future__ import annotations

import csv
from pathlib import Path

from fastmae.cli.commands import PlotConfig
from fastmae.cli.output import replacing
from fastmae.errors import UsageError
from fastmae.evaluate.curves import Curves, draw_ablation, draw_curves
from fastmae.train.run_folder import read_rows


def plot(config: PlotConfig) -> int:
    """Draw the figure.

    Raises:
        UsageError: not a run or table, nothing recorded yet, or another kind of file than matplotlib writes here.
    """
    kind = config.out.suffix.lstrip(".")
    if kind not in ("png", "pdf", "svg"):
        raise UsageError(f"--out: expected a .png, .pdf or .svg file, got {config.out}")
    if not config.runs:
        raise UsageError("RUN: expected at least one run folder, got none")
    tables = [path for path in config.runs if path.suffix == ".csv" or (path / "results.csv").is_file()]
    if tables:
        if len(config.runs) > 1:
            raise UsageError(f"RUN: expected run folders, or one table of fastmae ablate, got {tables[0]} and others")
        rows = _read_table(tables[0])
        with replacing(config.out) as part:
            draw_ablation(rows, part, format=kind)
        print(f"{config.out}: {len({row['variant'] for row in rows})} variants")
        return 0
    runs = []
    for path in config.runs:
        rows = read_rows(path / "metrics.jsonl")
        if not rows:
            raise UsageError(f"RUN: expected the folder of a run with rows in metrics.jsonl, got {path}")
        runs.append(Curves(str(path), rows, read_rows(path / "evaluations.jsonl")))
    with replacing(config.out) as part:
        draw_curves(runs, part, x=config.x, format=kind)
    print(f"{config.out}: {len(runs)} run{'s' * (len(runs) > 1)}")
    return 0


def _read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a results.csv, or of the one in a folder, that have an accuracy."""
    path = path if path.suffix == ".csv" else path / "results.csv"
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["variant"] and float(row["top1"] or "nan") >= 0]
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(f"RUN: expected a results.csv of fastmae ablate, got {path}: {error!r}") from error
    if not rows:
        raise UsageError(f"RUN: expected accuracies in {path}, got none; give the specification an [evaluate] section")
    return rows
