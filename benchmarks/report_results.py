"""Committed results: reading them, comparing, and tables of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, README, FIGURES = "docs/benchmarks.md", "README.md", "docs/figures"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
TIE = 0.995
"""A ratio from here up, which rounds to 1.00, does not count as slower."""

_FIRST = (
    "training step",
    "modes of compilation",
    "block",
    "attention",
    "norm_linear",
    "gelu_linear",
    "masked_patch_mse",
    "gather_patches",
)
_BASELINE = "facebookresearch-sdpa"


def slim(raw: dict) -> dict:
    """A pytest-benchmark file without its single times and what only it needs; a slim one as it is."""
    if "machine" in raw:
        return raw
    commit = raw.get("commit_info") or {}
    benchmarks = []
    for one in raw["benchmarks"]:
        extra, stats = dict(one["extra_info"]), one["stats"]
        competitor = extra.pop("competitor", None) or extra.get("backend") or extra.get("how") or one["name"]
        seconds = {key: float(f"{stats[key]:.5g}") for key in ("median", "iqr", "q1", "q3", "min")}
        entry = {"group": one["group"] or one["name"].split("[")[0], "competitor": competitor}
        numbers = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in extra.items()}
        benchmarks.append(entry | {"rounds": stats["rounds"], "seconds": seconds} | numbers)
    return {
        "machine": raw["machine_info"]["fastmae"],
        "date": raw["datetime"][:10],
        "commit": str(commit.get("id") or "unknown")[:12] + ("-dirty" if commit.get("dirty") else ""),
        "benchmarks": benchmarks,
    }


def kind_of(group: str) -> str:
    """What comes before the case: "masked_patch_mse, 224px-p16 forward" is of the kind "masked_patch_mse"."""
    return "attention" if group.startswith("attention") else group.split(",")[0]


def case_of(group: str) -> str:
    return group.removeprefix(kind_of(group)).strip(" ,")


class Machine:
    """All results of one folder: by group, in the order of the files, then by competitor.

    A group that two files have stays two groups, the second named after its file: ratios hold within one run only.
    """

    def __init__(self, name: str, results: dict[str, dict]):
        self.name, self.runs = name, list(results.values())
        self.info = self.runs[0]["machine"]
        self.groups: dict[str, dict[str, dict]] = {}
        for file, result in results.items():
            before = set(self.groups)
            for entry in result["benchmarks"]:
                group = entry["group"] if entry["group"] not in before else f"{entry['group']} ({file})"
                self.groups.setdefault(group, {})[entry["competitor"]] = entry

    @property
    def is_gpu(self) -> bool:
        return self.info["cuda"] is not None

    def of(self, kind: str) -> dict[str, dict[str, dict]]:
        return {group: entries for group, entries in self.groups.items() if kind_of(group) == kind}

    def kinds(self) -> list[str]:
        """What was measured, most telling first."""
        found = dict.fromkeys(map(kind_of, self.groups))
        return sorted(found, key=lambda kind: _FIRST.index(kind) if kind in _FIRST else len(_FIRST))


def load(results: Path) -> list[Machine]:
    """Every folder of results that holds benchmarks, GPUs first."""
    machines = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        # Other JSON lives there too.
        files = {name: slim(f) for name, f in files.items() if isinstance(f, dict) and f.get("benchmarks")}
        if files:
            machines.append(Machine(folder.name, files))
    return sorted(machines, key=lambda machine: not machine.is_gpu)


def ratio(entries: dict[str, dict], rival: str, ours: str) -> float:
    """How many times our time the rival takes: the median over rounds where both ran in turn, else of medians."""
    by_round = entries[rival].get("ratios", {}).get(ours)
    return by_round or entries[rival]["seconds"]["median"] / entries[ours]["seconds"]["median"]


def counterpart(rival: str, names: Iterable[str]) -> str | None:
    """Which of ours is held against a rival: compiled against compiled, a bf16 residual stream against one."""
    residual = "-bf16-residual" if rival.endswith("-bf16-residual") else ""
    compiled = "-compile" if "-compile" in rival else ""
    candidates = (f"fastmae{compiled}{residual}", f"fastmae{compiled}", f"fastmae{residual}", "fastmae")
    return next((ours for ours in candidates if ours in names), None)


def is_rival(name: str) -> bool:
    return not name.startswith(("fastmae", "lever"))


def losses(machine: Machine) -> list[tuple[str, str, str, float]]:
    """Group, ours, rival and ratio wherever the rival is faster."""
    found = []
    for group, entries in machine.groups.items():
        for rival in filter(is_rival, entries):
            ours = counterpart(rival, entries)
            if ours and (value := ratio(entries, rival, ours)) < TIE:
                found.append((group, ours, rival, value))
    return found


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def times(value: float) -> str:
    return f"{value:.2f}x" if value >= TIE else f"**{value:.2f}x (slower)**"


def rows_to_table(head: list[str], rows: list[list[str]]) -> str:
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    lines = [[head[i] for i in kept], ["---"] + ["---:"] * (len(kept) - 1)]
    lines += [[row[i] or "-" for i in kept] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def step_table(entries: dict[str, dict]) -> str:
    rows = []
    for name, entry in entries.items():
        if name.startswith("lever"):
            continue
        ours = counterpart(name, entries) if is_rival(name) else None
        peak = entry.get("peak_memory_bytes")
        rows.append([
            f"`{name}`", duration(entry["seconds"]["median"]), f"{entry.get('images_per_s', 0):,.1f}",
            times(ratio(entries, name, ours)) if ours else "", f"`{ours}`" if ours else "",
            f"{peak / 2**30:.1f} GiB" if peak else "", str(entry["launches"]) if entry.get("launches") else "",
        ])  # fmt: skip
    head = ["", "a step", "images/s", "fastmae is faster by", "compared", "peak memory", "launches"]
    return rows_to_table(head, rows)


def lever_table(entries: dict[str, dict]) -> str:
    base = entries[_BASELINE]
    compared = [name for name in entries if name.startswith("lever: ")] + [
        n for n in entries if n.startswith("fastmae")
    ]
    rows = [["none", duration(base["seconds"]["median"]), "1.00x"]]
    for name in compared:
        label = name.removeprefix("lever: ") if name.startswith("lever") else f"all together (`{name}`)"
        rows.append([label, duration(entries[name]["seconds"]["median"]), times(ratio(entries, _BASELINE, name))])
    return rows_to_table([f"lever, on its own on `{_BASELINE}`", "a step", "faster by"], rows)


def share(entry: dict, *keys: str) -> str:
    return " / ".join(f"{entry[key]:.2f}" for key in keys) if all(entry.get(key) is not None for key in keys) else ""


def op_table(groups: dict[str, dict[str, dict]]) -> str:
    """Cases of one op: our time and how near it is to what the device can do, then every rival's."""
    names = list(dict.fromkeys(name for entries in groups.values() for name in entries))
    if "fastmae" not in names:
        return _plain_table(groups, names)
    rivals = [name for name in names if name != "fastmae"]
    rows = []
    for group, entries in groups.items():
        ours = entries["fastmae"]
        row = [
            case_of(group), duration(ours["seconds"]["median"]),
            f"{ours['gb_per_s']:,.3g}" if "gb_per_s" in ours else "",
            share(ours, "share_of_copy", "share_of_copy_by_sectors"),
            f"{ours['tflop_per_s']:.3g}" if ours.get("share_of_matmul", 0) > 0.02 else "",
            share(ours, "share_of_matmul") if ours.get("share_of_matmul", 0) > 0.02 else "",
        ]  # fmt: skip
        for rival in rivals:
            if rival not in entries:
                row.append("")
                continue
            against = counterpart(rival, entries) if is_rival(rival) else "fastmae"
            value = ratio(entries, rival, against)
            held = times(value) if is_rival(rival) else f"{value:.2f}x"
            row.append(f"{duration(entries[rival]['seconds']['median'])}, {held}")
        rows.append(row)
    head = ["", "`fastmae`", "GB/s", "of a copy: bytes / sectors", "TFLOP/s", "of a product"]
    return rows_to_table(head + [f"`{rival}`" for rival in rivals], rows)


def _plain_table(groups: dict[str, dict[str, dict]], names: list[str]) -> str:
    rows = []
    for group, entries in groups.items():
        fastest = min(entry["seconds"]["median"] for entry in entries.values())
        row = [case_of(group)]
        for name in names:
            seconds = entries[name]["seconds"]["median"] if name in entries else math.inf
            bold = "**" if seconds == fastest else ""
            row.append(f"{bold}{duration(seconds)}{bold}" if name in entries else "")
        rows.append(row)
    return rows_to_table(["", *(f"`{name}`" for name in names)], rows)
