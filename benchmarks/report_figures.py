"""Figures of the results of one machine: the step, the ops as bars, and the ops under the device's measured limits."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from report_pages import figures
from report_results import Machine, case_of, counterpart, is_rival, kind_of, ratio

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

OURS, RIVAL, COMPILED = "#1b6ca8", "#b8b8b8", "#e0a458"
_STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "legend.frameon": False, "savefig.dpi": 150, "svg.hashsalt": "fastmae",
}  # fmt: skip


def draw(machine: Machine, folder: Path) -> None:
    """Write every figure of this machine into a folder, and remove none."""
    folder.mkdir(parents=True, exist_ok=True)
    painters = {"step": _step, "ops": _ops, "roofline": _roofline}
    for file in figures(machine):
        kind = file.removesuffix(".png").rsplit("-", 1)[1]
        with plt.rc_context(_STYLE):
            figure = painters[kind](machine)
            figure.savefig(folder / file, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)


def _colour(name: str) -> str:
    if "fastmae" in name:
        return OURS
    return COMPILED if "compile" in name else RIVAL


def _step(machine: Machine) -> plt.Figure:
    groups = machine.of("training step")
    named = {g: {n: e for n, e in entries.items() if not n.startswith("lever")} for g, entries in groups.items()}
    height = 0.6 + 0.28 * max(len(entries) for entries in named.values())
    figure, axes = plt.subplots(1, len(named), figsize=(5.2 * len(named), height), squeeze=False, layout="constrained")
    for axis, (group, entries) in zip(axes[0], named.items(), strict=True):
        order = sorted(entries, key=lambda name: entries[name]["images_per_s"])
        values = [entries[name]["images_per_s"] for name in order]
        bars = axis.barh(order, values, color=[_colour(name) for name in order])
        axis.bar_label(bars, [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values], padding=3)
        axis.set(title=case_of(group), xlabel="images per second", xlim=(0, 1.15 * max(values)))
    return figure


def _ops(machine: Machine) -> plt.Figure:
    rows = []
    for kind in machine.kinds():
        for group, entries in {} if kind == "training step" else machine.of(kind).items():
            if "fastmae" in entries:
                rivals = {n: ratio(entries, n, counterpart(n, entries)) for n in entries if is_rival(n)}
                rows.append((group, rivals))
    figure, axis = plt.subplots(figsize=(7.5, 0.6 + 0.17 * sum(len(r) + 0.8 for _, r in rows)), layout="constrained")
    place, ticks, seen = 0.0, [], set()
    for group, rivals in rows:
        begun = place
        for name, value in rivals.items():
            kind = "torch.compile" if "compile" in name else "eager"
            bar = axis.barh(
                place, value - 1, left=1, height=0.85, color=_colour(name), label=None if kind in seen else kind
            )
            seen.add(kind)
            axis.bar_label(bar, [f"{value:.2f}  {name}"], padding=3, fontsize=6.5)
            place += 1
        ticks.append(((begun + place - 1) / 2, group))
        place += 0.8
    axis.set_yticks([t for t, _ in ticks], [label for _, label in ticks], fontsize=7.5)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    low, high = min(min(r.values()) for _, r in rows if r), max(max(r.values()) for _, r in rows if r)
    axis.set_xlim(min(0.6, low / 5), max(2, high) * 2.8)
    axis.set_ylim(place - 0.5, -1)
    axis.axvline(1, color=OURS, linewidth=1.5)
    axis.set_xlabel("time / fastmae's time (right of the line fastmae is faster)")
    axis.legend(loc="upper right")
    return figure


def _roofline(machine: Machine) -> plt.Figure:
    points: dict[str, list[tuple[float, float]]] = {}
    copies, products = [], []
    for group, entries in machine.groups.items():
        entry = entries.get("fastmae", {})
        if "tflop_per_s" in entry and "gb_per_s" in entry:
            intensity = entry["flops"] / entry["useful_bytes"]
            points.setdefault(kind_of(group), []).append((intensity, entry["tflop_per_s"]))
            copies.append(entry["copy_gb_per_s"])
            products.append(entry["matmul_tflop_per_s"])
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    bandwidth, product = max(copies) / 1e3, max(products)
    low = min(x for found in points.values() for x, _ in found) / 3
    high = max(3 * max(x for found in points.values() for x, _ in found), 3 * product / bandwidth)
    corner = product / bandwidth
    axis.plot([low, corner, high], [low * bandwidth, product, product], color="black", linewidth=1.2)
    axis.annotate(
        f"fastest copy: {bandwidth * 1e3:,.0f} GB/s", (low * 1.5, low * 1.5 * bandwidth), xytext=(8, -10),
        textcoords="offset points", fontsize=8,
    )  # fmt: skip
    axis.annotate(
        f"product: {product:.3g} TFLOP/s",
        (high, product),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    for (kind, found), marker in zip(points.items(), "os^DvPX*<>" * 3, strict=False):
        axis.scatter(*zip(*found, strict=True), label=kind, marker=marker, s=32, alpha=0.85)
    axis.set(xscale="log", yscale="log", xlabel="floating-point operations per useful byte", ylabel="TFLOP/s")
    axis.legend(loc="lower right", fontsize=8)
    return figure
