"""The texts that are written from results: docs/benchmarks.md and the README's block."""

from __future__ import annotations

from pathlib import Path

import report_data
import report_end_to_end
from report_results import (
    BEGIN,
    END,
    FIGURES,
    PAGE,
    README,
    RESULTS,
    ROOT,
    Machine,
    case_of,
    counterpart,
    lever_table,
    losses,
    op_table,
    ratio,
    rows_to_table,
    step_table,
    times,
)

_NO_GPU = """**No result from a GPU is committed yet.** All numbers below are from a CPU, where the ops are plain
PyTorch; they say nothing about the Triton kernels. `make gpu` measures on a GPU.
"""
_HEAD = """# Benchmarks

Written by `python benchmarks/report.py write` from the files in `benchmarks/results/`; nothing is typed by hand. On
your machine: `pytest benchmarks`.

- The competitors of a table run in turn, each once a round, so that a busy moment hits all alike. Times are medians
  over rounds; ratios are taken within each round, and their median is shown.
- **1.30x**: the competitor takes 1.30 times as long as fastmae. **(slower)**: fastmae takes longer. All such cases are
  listed again at the end.
- Compiled competitors are compared with compiled fastmae where that was measured, and bf16 residual streams with the
  same.
- `plain` is the op written out in PyTorch as facebookresearch/mae and timm have it; `-compile` the same through
  `torch.compile`. `fastmae` is eager unless the name says otherwise.
- GB/s counts the bytes that the job has to move, whoever does it. "Of a copy": the time of a device copy of as many
  bytes (behind the stroke: of the whole 32-byte sectors that they lie in) over ours. "Of a product": our FLOP/s over
  those of a large matrix product. Both are measured in the same run. On a CPU a small copy stays in its caches, and
  fresh memory costs time that a copy to memory that is there does not need.
"""
_STEP = """A step begins with a batch on the device and ends after the optimiser; bf16 autocast unless the name says
fp16. `facebookresearch-plain` is its model with the attention of timm 0.3.2, which it pins, `-sdpa` with that of
today's timm, both with AdamW as PyTorch has it by default; `reference-compile` is `-sdpa` with `torch.compile` and
fused AdamW; `transformers` has fused AdamW too.
"""


def pages(machines: list[Machine], root: Path) -> dict[str, str]:
    """Path to text, for every page that holds results."""
    readme = (root / README).read_text()
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    texts = {
        PAGE: _page(machines, root / RESULTS.relative_to(ROOT)),
        README: f"{before}{BEGIN}\n{_readme_block(machines)}\n{END}{after}",
    }
    page = root / report_data.DATA_PAGE
    block = report_data.data_block(machines)
    if block and page.exists() and report_data.BEGIN in (text := page.read_text()):
        before, rest = text.split(report_data.BEGIN)
        after = rest.split(report_data.END)[1]
        texts[report_data.DATA_PAGE] = f"{before}{report_data.BEGIN}\n{block}\n{report_data.END}{after}"
    return texts


def describe(machine: Machine) -> str:
    """Hardware, versions and date, in a sentence."""
    info, versions = machine.info, dict(machine.info["versions"])
    python = versions.pop("python")
    threads = f"{info['threads']} thread" + ("s" if info["threads"] != 1 else "")
    device = f"{info['device']}, CUDA {info['cuda']}" if machine.is_gpu else f"{info['cpu']} ({info['cpu_capability']})"
    dates = sorted({run["date"] for run in machine.runs})
    packages = ", ".join(f"{name} {number}" for name, number in versions.items() if name != "pytest-benchmark")
    return f"{device}, {threads}; Python {python}, {packages}; {' and '.join(dates)}."


def _page(machines: list[Machine], results: Path) -> str:
    parts = [_HEAD]
    if not any(machine.is_gpu for machine in machines):
        parts.append(_NO_GPU)
    for machine in machines:
        commits = sorted({run["commit"] for run in machine.runs})
        parts += [f"## {machine.info['device']}\n", f"{describe(machine)} Commits: {', '.join(commits)}.\n"]
        if end_to_end := report_end_to_end.section(results / machine.name):
            parts.append(end_to_end)
        for kind in machine.kinds():
            groups = machine.of(kind)
            if report_data.is_data(kind):
                continue
            parts.append(f"### {kind[0].upper()}{kind[1:]}\n" if kind == "training step" else f"### `{kind}`\n")
            if kind != "training step":
                parts.append(op_table(groups) + "\n")
                continue
            parts.append(_STEP)
            for group, entries in groups.items():
                parts += [f"**{case_of(group)}**\n", step_table(entries) + "\n"]
                if any(name.startswith("lever") for name in entries):
                    parts.append(lever_table(entries) + "\n")
        if loaders := report_data.section(machine):
            parts.append(f"### Loaders\n\n{loaders}")
        for figure, caption in figures(machine).items():
            parts.append(f"![{caption}](figures/{figure})\n\n*{caption}*\n")
        parts.append("### Where fastmae is slower\n")
        found = losses(machine) + report_data.losses(machine)
        rows = [[group, f"`{ours}`", f"`{rival}`", f"{value:.2f}x"] for group, ours, rival, value in found]
        table = rows_to_table(["", "of ours", "is slower than", "whose time is"], rows)
        parts.append((table if rows else "Nowhere in these results.") + "\n")
    return "\n".join(parts)


def figures(machine: Machine) -> dict[str, str]:
    """File name to caption, of the figures that this machine's results are enough for."""
    found = {}
    if machine.of("training step"):
        found[f"{machine.name}-step.png"] = "The training step: images per second, more is better"
    if any(kind != "training step" and "fastmae" in next(iter(machine.of(kind).values())) for kind in machine.kinds()):
        found[f"{machine.name}-ops.png"] = "Ops: how many times fastmae's time each competitor takes, logarithmic"
    if any("tflop_per_s" in e.get("fastmae", {}) and "gb_per_s" in e["fastmae"] for e in machine.groups.values()):
        found[f"{machine.name}-roofline.png"] = "fastmae's ops under the measured limits of the device"
    return found


def _readme_block(machines: list[Machine]) -> str:
    lines = []
    if not any(machine.is_gpu for machine in machines):
        lines.append("No result from a GPU is committed yet; what follows was measured on a CPU.\n")
    rivals = {
        "facebookresearch, fp16": "facebookresearch-plain-fp16",
        "facebookresearch, bf16": "facebookresearch-plain",
        "with SDPA": "facebookresearch-sdpa",
        "with SDPA, fused AdamW, `torch.compile`": "reference-compile",
        "Hugging Face": "transformers",
    }  # fmt: skip
    for machine in machines:
        rows = []
        for group, entries in machine.of("training step").items():
            ours = max(
                (n for n in ("fastmae", "fastmae-compile") if n in entries), key=lambda n: entries[n]["images_per_s"]
            )
            row = [case_of(group), f"{entries[ours]['images_per_s']:,.1f} (`{ours}`)"]
            for rival in rivals.values():
                row.append(times(ratio(entries, rival, counterpart(rival, entries))) if rival in entries else "")
            rows.append(row)
        if rows:
            lost = len(losses(machine) + report_data.losses(machine))
            held = sum(len(entries) for entries in machine.groups.values())
            lines += [
                "How many times fastmae's time a training step takes, bf16 unless it says fp16; compiled against "
                f"compiled. {describe(machine)}\n",
                rows_to_table(["", "images/s", *rivals], rows),
                f"\n[All {held} results]({PAGE}), with the {lost} comparisons where fastmae is slower.\n",
            ]
    return "\n".join(lines).strip()


__all__ = ["FIGURES", "describe", "figures", "pages"]
