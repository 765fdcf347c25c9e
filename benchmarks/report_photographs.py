"""Writes the results in docs/photographs.md from the committed run of the README's first command."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE, SUMMARY = "docs/photographs.md", "benchmarks/results/photographs/summary.json"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def block(summary: dict) -> str:
    """The table of errors, the length of the run, and which baselines it did not beat."""
    lines = ["| masked patches of | model | mean visible colour | inverse distance | model, PSNR |"]
    lines.append("| --- | --- | --- | --- | --- |")
    worse = []
    for name, numbers in summary["sets"].items():
        errors = " | ".join(f"{numbers[key]:.3f}" for key in ("mse", "mse_mean_color", "mse_inverse_distance"))
        lines.append(f"| {name} | {errors} | {numbers['psnr']:.1f} dB |")
        worse += [f"On {name} it is worse than {' and '.join(numbers['worse_than'])}."] * bool(numbers["worse_than"])
    length = f"{summary['steps']:,} steps of {summary['samples'] // summary['steps']} crops in {summary['precision']}"
    lines += ["", " ".join([f"{length} took {summary['seconds']:.0f} s on two cores, one thread each.", *worse])]
    return "\n".join(lines)


def page(root: Path = ROOT) -> str:
    """The page with its block written anew."""
    before, rest = (root / PAGE).read_text().split(BEGIN)
    summary = json.loads((root / SUMMARY).read_text())
    return f"{before}{BEGIN}\n{block(summary)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    (ROOT / PAGE).write_text(page())
