"""Curves of runs (the loss, and accuracies that were measured on the way) and plots of tables of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
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
    figure.axes[0].legend(fontsize=8)
    _save(figure, path, format)


def draw_ablation(rows: Sequence[Mapping[str, str]], path: Path, *, format: str = "png") -> None:
    """Draw a panel per protocol with the accuracy of each variant, mean and standard deviation over seeds.

    If variants differ in one flag whose values are numbers, it is the abscissa, as in Figure 5 of the paper. Otherwise
    variants are listed by name.

    Args:
        rows: of results.csv, at least one, with ``variant``, ``protocol``, ``top1`` and a column for each flag in which
            variants differ, such as ``--model.mask-ratio``.
        path: of the file.
        format: of the file, as matplotlib names it.
    """
    protocols, variants = (list(dict.fromkeys(row[key] for row in rows)) for key in ("protocol", "variant"))
    flag, values = _numeric_flag(rows)
    size = (5.5 * len(protocols), 4) if flag else (1.5 + 4 * len(protocols), 1.2 + 0.35 * len(variants))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(protocols), sharey=not flag))
    for axes, protocol in zip(panels, protocols, strict=True):
        found: dict[float, list[float]] = {}
        for row in rows:
            if row["protocol"] == protocol:
                place = values[row["variant"]] if flag else variants.index(row["variant"])
                found.setdefault(place, []).append(100 * float(row["top1"]))
        places = sorted(found)
        means = [np.mean(found[place]) for place in places]
        spreads = [np.std(found[place], ddof=1) if len(found[place]) > 1 else 0 for place in places]
        label = _LABELS.get(f"{protocol}_top1", f"{protocol}, top-1 %")
        if flag:
            axes.errorbar(places, means, spreads, fmt="o-", capsize=3)
            axes.set(xlabel=flag, ylabel=label)
        else:
            axes.errorbar(means, places, xerr=spreads, fmt="o", capsize=3)
            axes.set(xlabel=label, ylim=(len(variants) - 0.5, -0.5))
            axes.set_yticks(range(len(variants)), variants)
    figure.suptitle("mean and standard deviation over seeds", fontsize=9)
    _save(figure, path, format)


def _numeric_flag(rows: Sequence[Mapping[str, str]]) -> tuple[str, dict[str, float]]:
    """The flag in which variants differ and its number by variant; an empty name if there are others or no numbers."""
    flags = [name for name in rows[0] if name.startswith("--")]
    if len(flags) == 1:
        with suppress(ValueError):
            return flags[0], {row["variant"]: float(row[flags[0]]) for row in rows}
    return "", {}


def _save(figure: Figure, path: Path, format: str) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format=format)
