"""``fastmae plot``: curves of runs, finished or not."""

from __future__ import annotations

from fastmae.cli.commands import PlotConfig
from fastmae.cli.output import replacing
from fastmae.errors import UsageError
from fastmae.evaluate.curves import Curves, draw_curves
from fastmae.train.run_folder import read_rows


def plot(config: PlotConfig) -> int:
    """Draw the figure.

    Raises:
        UsageError: not a run, nothing recorded yet, or another kind of file than matplotlib writes here.
    """
    kind = config.out.suffix.lstrip(".")
    if kind not in ("png", "pdf", "svg"):
        raise UsageError(f"--out: expected a .png, .pdf or .svg file, got {config.out}")
    if not config.runs:
        raise UsageError("RUN: expected at least one run folder, got none")
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
