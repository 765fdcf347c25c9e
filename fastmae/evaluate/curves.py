"""Curves of runs: the loss, and each accuracy that was measured on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

_LABELS = {
    "loss": "training loss",
    "linear_top1": "linear probe, top-1 %",
    "knn_top1": "k-NN, top-1 %",
    "top1": "top-1 %",
}
_AXES = {"epoch": "epochs", "step": "steps", "samples": "images"}


class Curves(NamedTuple):
    """What a run has recorded.

    Attributes:
        name: for the legend.
        metrics: rows with ``step``, ``epoch``, ``samples`` and ``loss``; at least one.
        evaluations: rows with ``step`` and accuracies, whose names end in ``top1``; may be empty.
    """

    name: str
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]

    def points(self, name: str, x: str) -> tuple[np.ndarray, np.ndarray]:
        """Abscissas and values of the loss, or of an accuracy in percent."""
        rows = [row for row in (self.metrics if name == "loss" else self.evaluations) if row.get(name) is not None]
        steps, places = ([row[key] for row in self.metrics] for key in ("step", x))
        # From 0 on, since an accuracy may have been measured before the first row.
        at = np.interp([row["step"] for row in rows], [0, *steps], [0, *places])
        return at, np.array([row[name] for row in rows], float) * (1 if name == "loss" else 100)


def draw_curves(runs: Sequence[Curves], path: Path, *, x: str = "epoch", format: str = "png") -> None:
    """Draw a panel for the loss and one for each accuracy that a run has, with a line per run.

    Args:
        runs: at least one.
        path: of the file.
        x: the abscissa, "epoch", "step" or "samples".
        format: of the file, as matplotlib names it.
    """
    measured = {name for run in runs for row in run.evaluations for name in row if name in _LABELS}
    panels = ["loss", *(name for name in _LABELS if name in measured and name != "loss")]
    figure = Figure(figsize=(5.5 * len(panels), 4), dpi=120, layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for color, run in enumerate(runs):
            at, values = run.points(name, x)
            style = {"marker": "o", "markersize": 4} if name != "loss" else {}
            axes.plot(at, values, color=f"C{color}", label=run.name, **style)
        axes.set(xlabel=_AXES[x], ylabel=_LABELS[name])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, format=format)
