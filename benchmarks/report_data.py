"""Tables of the loader benchmark (bench_data.py), for docs/benchmarks.md and docs/data.md."""

from __future__ import annotations

from report_results import TIE, Machine, is_rival, kind_of, ratio, rows_to_table, times

DATA_PAGE = "docs/data.md"
BEGIN, END = "<!-- loaders:begin -->", "<!-- loaders:end -->"
LOADERS, STAGES = "loader", "loader stages"
BASELINES = {"pillow-uint8, folder": "`pillow-uint8`", "pillow-float, folder": "`pillow-float`"}
_PACKAGES = ("python", "torch", "torchvision", "pillow", "webdataset")
_DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
_STAGES = ("read", "decode", "crop copy", "resize", "hand over")

TEXT = """All loaders make the same crops of the same images, in turn in one run, with one thread or worker process a
core and a warm page cache; medians over rounds, ratios within rounds. `pillow-uint8` is facebookresearch/mae's
`ImageFolder` and transform with `PILToTensor`, `pillow-float` the same as it is there (`ToTensor`, normalisation);
`webdataset` has the uint8 transform behind a WebDataset pipeline. **2.00x**: twice as fast as that baseline on the
folder. Processor time counts worker processes. "At 256" are shards whose images were re-encoded at that short side.
"""
STAGES_TEXT = """Where the time of an image goes: microseconds of processor time in one thread, stage by stage, and
beside them those of the whole loader, which also plans, wakes threads and passes batches on. Pillow reads while it
decodes, and ours mirror while they write the resized crop into the batch. DALI decodes the crop only.
"""


def is_data(kind: str) -> bool:
    """Whether results of this kind are the loaders'."""
    return kind in (LOADERS, STAGES)


def source_of(name: str) -> str:
    """ "fastmae-dali, tar shards" reads "tar shards"."""
    return name.partition(", ")[2]


def cpu_ratio(entries: dict[str, dict], rival: str, ours: str) -> float:
    """How many times our processor time an image costs the rival: the median over rounds."""
    by_round = entries[rival].get("cpu_ratios", {}).get(ours)
    return by_round or entries[rival]["cpu_seconds_per_image"] / entries[ours]["cpu_seconds_per_image"]


def loader_table(entries: dict[str, dict]) -> str:
    """Every loader on every source: images/s and images per CPU-second, and both as multiples of the baselines'."""
    baselines = {name: label for name, label in BASELINES.items() if name in entries}
    rows = []
    for name, entry in entries.items():
        row = [f"`{name.partition(', ')[0]}`", source_of(name), f"{entry['images_per_s']:,.0f}"]
        row += [_against(name, baseline, ratio(entries, baseline, name)) for baseline in baselines]
        row.append(f"{entry['images_per_cpu_second']:,.0f}")
        row += [_against(name, baseline, cpu_ratio(entries, baseline, name)) for baseline in baselines]
        rows.append(row)
    labels = list(baselines.values())
    head = ["loader", "reads", "images/s", *labels, "images per CPU-second", *(f"CPU, {label}" for label in labels)]
    return rows_to_table(head, rows)


def _against(name: str, baseline: str, value: float) -> str:
    if name == baseline:
        return "1.00x"
    return f"{value:.2f}x" if is_rival(name) else times(value)


def stage_table(stages: dict[str, dict], loaders: dict[str, dict]) -> str:
    """Microseconds of each stage; behind them the sum, and what the whole loader takes."""
    columns = [stage for stage in _STAGES if any(stage in entry["stages_us"] for entry in stages.values())]
    rows = []
    for who, entry in stages.items():
        found, whole = entry["stages_us"], loaders.get(f"{who}, folder")
        row = [f"`{who}`", *(f"{found[stage]:,.0f}" if stage in found else "" for stage in columns)]
        row += [f"{sum(found.values()):,.0f}", f"{whole['cpu_seconds_per_image'] * 1e6:,.0f}" if whole else ""]
        rows.append(row)
    return rows_to_table(["µs an image", *columns, "stages together", "whole loader, CPU"], rows)


def losses(machine: Machine) -> list[tuple[str, str, str, float]]:
    """Group, ours, rival and ratio wherever a rival is faster on the same source, by the clock or in processor time."""
    found = []
    for group, entries in machine.of(LOADERS).items():
        for rival in filter(is_rival, entries):
            for ours in (n for n in entries if not is_rival(n) and source_of(n) == source_of(rival)):
                found.append((group, ours, rival, ratio(entries, rival, ours)))
                found.append((group, f"{ours} (CPU)", rival, cpu_ratio(entries, rival, ours)))
    return [loss for loss in found if loss[-1] < TIE]


def describe(machine: Machine) -> str:
    """Hardware, versions, date and commit of the run that measured the loaders, in a sentence."""
    run = next(run for run in machine.runs if any(kind_of(one["group"]) == LOADERS for one in run["benchmarks"]))
    info, names = run["machine"], (*_PACKAGES, *_DALI)
    versions = [f"{name} {info['versions'][name]}" for name in names if name in info["versions"]]
    return f"Measured on {info['device']} with {', '.join(versions)}; {run['date']}, commit {run['commit']}."


def section(machine: Machine) -> str:
    """The loaders' part of a machine, without a heading; empty where they were not measured."""
    parts, loaders = [], {}
    for group, loaders in machine.of(LOADERS).items():
        parts += [f"**{group.partition(', ')[2]}**\n", loader_table(loaders) + "\n"]
    for stages in machine.of(STAGES).values():
        parts += [STAGES_TEXT, stage_table(stages, loaders) + "\n"]
    return "\n".join([f"{describe(machine)}\n", TEXT, *parts]) if parts else ""


def data_block(machines: list[Machine]) -> str:
    """What docs/data.md holds between its markers: every machine's tables, and where ours are slower."""
    parts = []
    for machine in machines:
        if not (text := section(machine)):
            continue
        parts.append(text)
        rows = [[f"`{ours}`", f"`{rival}`", f"{value:.2f}x"] for _, ours, rival, value in losses(machine)]
        if rows:
            parts.append(rows_to_table(["of ours", "is slower than", "whose time is"], rows) + "\n")
        else:
            parts.append("No loader here is faster than fastmae's on the same source.\n")
    return "\n".join(parts).strip()
