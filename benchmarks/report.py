"""Writes the tables of README and docs from the committed results; nothing in them is typed by hand.

    python benchmarks/report.py slim benchmarks/results/<machine>/*.json   # keep what is worth committing of a run
    python benchmarks/report.py write                                      # write the pages

A result is a file of ``pytest benchmarks/... --benchmark-json=FILE`` in ``benchmarks/results/<machine>/``, slimmed. A
page holds each table between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE = "README.md", "docs/benchmarks.md"
COUNTED, PHOTOGRAPHS, RUNNING = "docs/counted.md", "docs/photographs.md", "docs/running.md"

TIE = 0.995
"""A ratio from here up rounds to 1.00 and does not count as slower."""


# --- Results ----------------------------------------------------------------------------------------------------------


def slim(raw: dict) -> dict:
    """A pytest-benchmark file without its single times; a slim file is returned as it is."""
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


STEP, LOADERS, STAGES = "training step", "loader", "loader stages"
_ORDER = (
    STEP, "modes of compilation", "block", "attention", "norm_linear", "gelu_linear", "masked_patch_mse",
    "gather_patches",
)  # fmt: skip


class Machine:
    """All results of one folder: by group, in the order of the files, then by competitor.

    A group that two files have stays two groups, the second named after its file: ratios hold within one run only.
    """

    def __init__(self, name: str, results: dict[str, dict], end_to_end: dict[str, dict] | None = None):
        self.name, self.runs, self.end_to_end = name, list(results.values()), end_to_end or {}
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
        return sorted(found, key=lambda kind: _ORDER.index(kind) if kind in _ORDER else len(_ORDER))


def load(results: Path) -> list[Machine]:
    """Every folder of results that holds benchmarks, GPUs first."""
    machines = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        # Other JSON lies there too.
        runs = {name: slim(f) for name, f in files.items() if isinstance(f, dict) and f.get("benchmarks")}
        end_to_end = {name: f for name, f in files.items() if name.startswith("end-to-end-")}
        if runs:
            machines.append(Machine(folder.name, runs, end_to_end))
    return sorted(machines, key=lambda machine: not machine.is_gpu)


# --- Comparing --------------------------------------------------------------------------------------------------------


def ratio(entries: dict[str, dict], rival: str, ours: str) -> float:
    """The rival's time over ours: the median over rounds where both ran in turn, else of medians."""
    by_round = entries[rival].get("ratios", {}).get(ours)
    return by_round or entries[rival]["seconds"]["median"] / entries[ours]["seconds"]["median"]


def cpu_ratio(entries: dict[str, dict], rival: str, ours: str) -> float:
    """The rival's CPU time per image over ours."""
    by_round = entries[rival].get("cpu_ratios", {}).get(ours)
    return by_round or entries[rival]["cpu_seconds_per_image"] / entries[ours]["cpu_seconds_per_image"]


def counterpart(rival: str, names: Iterable[str]) -> str | None:
    """Which of ours a rival is compared with: compiled with compiled, a bf16 residual stream with one."""
    residual = "-bf16-residual" if rival.endswith("-bf16-residual") else ""
    compiled = "-compile" if "-compile" in rival else ""
    candidates = (f"fastmae{compiled}{residual}", f"fastmae{compiled}", f"fastmae{residual}", "fastmae")
    return next((ours for ours in candidates if ours in names), None)


def is_rival(name: str) -> bool:
    return not name.startswith(("fastmae", "lever"))


def losses(machine: Machine) -> list[tuple[str, str, str, float]]:
    """Group, ours, rival and ratio wherever a rival is faster; loaders compare on the same source only."""
    found = []
    for group, entries in machine.groups.items():
        for rival in filter(is_rival, entries):
            if kind_of(group) == LOADERS:
                same_source = [n for n in entries if not is_rival(n) and n.split(", ")[1] == rival.split(", ")[1]]
                for ours in same_source:
                    found.append((group, ours, rival, ratio(entries, rival, ours)))
                    found.append((group, f"{ours} (CPU time)", rival, cpu_ratio(entries, rival, ours)))
            elif ours := counterpart(rival, entries):
                found.append((group, ours, rival, ratio(entries, rival, ours)))
    return [loss for loss in found if loss[-1] < TIE]


# --- Tables -----------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def times(value: float) -> str:
    return f"{value:.2f}x" if value >= TIE else f"**{value:.2f}x (slower)**"


def rows_to_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, without columns that are empty in every row."""
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
    return rows_to_table(["", "a step", "images/s", "slowdown", "relative to", "peak memory", "launches"], rows)


_BASELINE = "facebookresearch-sdpa"


def lever_table(entries: dict[str, dict]) -> str:
    """What each change brings on its own."""
    rows = []
    for name in [n for n in entries if n.startswith("lever: ")] + [n for n in entries if n.startswith("fastmae")]:
        label = name.removeprefix("lever: ") if name.startswith("lever") else f"all together (`{name}`)"
        rows.append([label, times(ratio(entries, _BASELINE, name))])
    return rows_to_table([f"change to `{_BASELINE}`", "speedup"], rows)


def share(entry: dict, *keys: str) -> str:
    return " / ".join(f"{entry[key]:.2f}" for key in keys) if all(entry.get(key) is not None for key in keys) else ""


def op_table(groups: dict[str, dict[str, dict]], *, bandwidth: bool) -> str:
    """Cases of one op: our time and how near it is to what the device can do, then every rival's.

    Without ``bandwidth``, as for a CPU, whose caches hold small copies, only the FLOP/s are compared with the device's.
    """
    names = list(dict.fromkeys(name for entries in groups.values() for name in entries))
    if "fastmae" not in names:
        return _fastest_table(groups, names)
    rivals = [name for name in names if name != "fastmae"]
    rows = []
    for group, entries in groups.items():
        ours = entries["fastmae"]
        computes = ours.get("share_of_matmul", 0) > 0.02
        row = [
            case_of(group), duration(ours["seconds"]["median"]),
            f"{ours['gb_per_s']:,.3g}" if bandwidth and "gb_per_s" in ours else "",
            share(ours, "share_of_copy", "share_of_copy_by_sectors") if bandwidth else "",
            f"{ours['tflop_per_s']:.3g}" if computes else "",
            share(ours, "share_of_matmul") if computes else "",
        ]  # fmt: skip
        for rival in rivals:
            if rival not in entries:
                row.append("")
                continue
            value = ratio(entries, rival, counterpart(rival, entries) if is_rival(rival) else "fastmae")
            text = times(value) if is_rival(rival) else f"{value:.2f}x"
            row.append(f"{duration(entries[rival]['seconds']['median'])}, {text}")
        rows.append(row)
    head = ["", "`fastmae`", "GB/s", "of a copy: bytes / sectors", "TFLOP/s", "of a matmul"]
    return rows_to_table(head + [f"`{rival}`" for rival in rivals], rows)


def _fastest_table(groups: dict[str, dict[str, dict]], names: list[str]) -> str:
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


BASELINE_LOADER = "pillow-uint8, folder"


def loader_table(entries: dict[str, dict]) -> str:
    """Every loader on every source, by the clock and by CPU time, and both as multiples of the Pillow loader's."""
    rows = []
    for name, entry in entries.items():
        loader, _, source = name.partition(", ")
        row = [f"`{loader}`", source]
        for rate, compare in (("images_per_s", ratio), ("images_per_cpu_second", cpu_ratio)):
            value = 1.0 if name == BASELINE_LOADER else compare(entries, BASELINE_LOADER, name)
            row += [f"{entry[rate]:,.0f}", f"{value:.2f}x" if is_rival(name) else times(value)]
        rows.append(row)
    return rows_to_table(["loader", "reads", "images/s", "speedup", "images per CPU-second", "speedup"], rows)


def stage_table(stages: dict[str, dict], loaders: dict[str, dict]) -> str:
    """Microseconds of each stage; behind them the sum, and what the whole loader takes."""
    columns = list(dict.fromkeys(stage for entry in stages.values() for stage in entry["stages_us"]))
    order = ("read", "decode", "crop copy", "resize", "hand over")
    columns.sort(key=lambda stage: order.index(stage) if stage in order else len(order))
    rows = []
    for who, entry in stages.items():
        found, whole = entry["stages_us"], loaders.get(f"{who}, folder")
        row = [f"`{who}`", *(f"{found[stage]:,.0f}" if stage in found else "" for stage in columns)]
        row += [f"{sum(found.values()):,.0f}", f"{whole['cpu_seconds_per_image'] * 1e6:,.0f}" if whole else ""]
        rows.append(row)
    return rows_to_table(["µs per image", *columns, "sum", "whole loader, CPU"], rows)


def end_to_end_tables(found: dict[str, dict]) -> str:
    """The trainer from JPEGs on a disk (``end_to_end.py``): rates, MFU, targets, and where a step's time goes."""
    rows = []
    for name, one in found.items():
        config, model, both = one["config"], one["model"], one["both"]
        compiled = " compiled" if config["train"]["compile"] not in (False, "none") else ""
        missed = [f"{t['what']} {t['found']:.2f} of {t['target']:.2f}" for t in one["targets"] if not t["reached"]]
        rows.append([
            f"{name.removeprefix('end-to-end-')}: {config['recipe']}{compiled}, batch "
            f"{config['train']['batch_size']}",
            *(f"{one[phase]['images_per_second']:,.0f}" for phase in ("loader", "model", "both")),
            f"{both['images_per_second'] / model['images_per_second']:.1%}", f"{model['mfu']:.1%}",
            f"{both['mfu']:.1%}", "missed: " + "; ".join(missed) if missed else "reached", one["sentence"],
        ])  # fmt: skip
    head = ["", "loader, images/s", "model", "both", "both of model", "MFU, model", "MFU, both", "targets", "in words"]
    stages = {name.removeprefix("end-to-end-"): one["step"] for name, one in found.items()}
    cells = [
        [what, *(f"{s['stages_ms'][what]:.2f} ms, {s['stages_ms'][what] / s['ms']:.1%}" for s in stages.values())]
        for what in next(iter(stages.values()))["stages_ms"]
    ]
    return f"{rows_to_table(head, rows)}\n\n{rows_to_table(['stage', *stages], cells)}"


# --- Pages ------------------------------------------------------------------------------------------------------------


def describe(runs: list[dict]) -> str:
    """Hardware, versions, dates and commits of the runs on one machine."""
    info, versions = runs[0]["machine"], {}
    for run in runs:
        versions |= run["machine"]["versions"]
    threads = f"{info['threads']} thread" + ("s" if info["threads"] != 1 else "")
    device = f"{info['device']}, CUDA {info['cuda']}" if info["cuda"] else f"{info['cpu']} ({info['cpu_capability']})"
    packages = ", ".join(f"{name} {v}" for name, v in versions.items() if name != "pytest-benchmark")
    dates, commits = (" and ".join(sorted({run[key] for run in runs})) for key in ("date", "commit"))
    return f"{device}, {threads}; {packages}; {dates}, commit {commits}."


_NO_GPU = "No result from a GPU is committed yet"


def benchmarks_block(machines: list[Machine]) -> str:
    """Every machine's tables, and every case where fastmae is slower."""
    parts = []
    if not any(machine.is_gpu for machine in machines):
        parts.append(
            f"**{_NO_GPU}.** All numbers below are from a CPU, where the ops are plain PyTorch; they say nothing about "
            "the Triton kernels. `make gpu` measures on a GPU."
        )
    for machine in machines:
        parts += [f"## {machine.info['device']}", describe(machine.runs)]
        if machine.end_to_end:
            parts += ["### From JPEGs to weights", end_to_end_tables(machine.end_to_end)]
        for kind in machine.kinds():
            groups = machine.of(kind)
            if kind == STAGES:
                continue
            parts.append(f"### {kind.capitalize() if kind in (STEP, LOADERS) else f'`{kind}`'}")
            if kind == LOADERS:
                for group, entries in groups.items():
                    parts += [f"**{group.partition(', ')[2]}**", loader_table(entries)]
                parts += [stage_table(stages, entries) for stages in machine.of(STAGES).values()]
            elif kind == STEP:
                for group, entries in groups.items():
                    parts += [f"**{case_of(group)}**", step_table(entries)]
                    if any(name.startswith("lever") for name in entries):
                        parts.append(lever_table(entries))
            else:
                parts.append(op_table(groups, bandwidth=machine.is_gpu))
        rows = [[group, f"`{ours}`", f"`{rival}`", f"{value:.2f}x"] for group, ours, rival, value in losses(machine)]
        head = ["", "ours", "is slower than", "whose time is"]
        parts += ["### Where fastmae is slower", rows_to_table(head, rows) if rows else "Nowhere in these results."]
    return "\n\n".join(parts)


def readme_block(machines: list[Machine]) -> str:
    rivals = {
        "facebookresearch, fp16": "facebookresearch-plain-fp16",
        "facebookresearch, bf16": "facebookresearch-plain",
        "with SDPA": "facebookresearch-sdpa",
        "with SDPA, fused AdamW, `torch.compile`": "reference-compile",
        "Hugging Face": "transformers",
    }  # fmt: skip
    parts = [] if any(machine.is_gpu for machine in machines) else [f"{_NO_GPU}; these were measured on a CPU."]
    for machine in machines:
        rows = []
        for group, entries in machine.of(STEP).items():
            ours = max(
                (n for n in ("fastmae", "fastmae-compile") if n in entries), key=lambda n: entries[n]["images_per_s"]
            )
            row = [case_of(group), f"{entries[ours]['images_per_s']:,.1f} (`{ours}`)"]
            for rival in rivals.values():
                row.append(times(ratio(entries, rival, counterpart(rival, entries))) if rival in entries else "")
            rows.append(row)
        if rows:
            results = sum(len(entries) for entries in machine.groups.values())
            steps = [run for run in machine.runs if any(kind_of(one["group"]) == STEP for one in run["benchmarks"])]
            parts += [
                "Slowdown of a training step relative to fastmae (higher is worse), bf16, compiled against compiled. "
                + describe(steps),
                rows_to_table(["", "images/s", *rivals], rows),
                f"[All {results} results]({PAGE}), with the {len(losses(machine))} comparisons where fastmae is "
                "slower.",
            ]
    return "\n\n".join(parts)


def traffic_table(counted: dict, model: str) -> str:
    """Kilobytes per image of every op, from ``count_traffic.py``."""
    rows = []
    for name, found in counted["models"][model].items():
        ours, eager, compiled = (found[who] for who in ("fastmae", "eager", "compiled"))
        around = f" + {ours['operators around']}" if ours["operators around"] else ""
        rows.append([
            name, *(f"{v / 1e3:,.1f}" for v in (ours["budget"], ours["bytes"])), f"{ours['kernels']}{around}",
            *(t for o in (eager, compiled) for t in (f"{o['bytes'] / ours['bytes']:.1f}x", str(o["launches"]))),
        ])  # fmt: skip
    head = ["op", "budget", "fastmae", "launches", "eager", "launches", "torch.compile", "launches"]
    return rows_to_table(head, rows)


def step_bytes_table(counted: dict) -> str:
    """Megabytes per image of a training step, from ``count_step.py``."""
    rows = []
    for label, found in counted["models"].items():
        for who, c in found.items():
            numbers = (c["saved"], c["forward"], c["backward"], c["forward"] + c["backward"])
            rows.append([f"{label}, {who}", *(f"{n:,.1f}" for n in numbers)])
    return rows_to_table(["", "saved for backward", "forward", "backward", "forward + backward"], rows)


def photographs_block(summary: dict, avx2: dict) -> str:
    """Errors of the first command's run, its length, which baselines it did not beat, and where it ended on AVX2."""
    rows, worse = [], []
    for name, numbers in summary["sets"].items():
        errors = [f"{numbers[key]:.3f}" for key in ("mse", "mse_mean_color", "mse_inverse_distance")]
        rows.append([name, *errors, f"{numbers['psnr']:.1f} dB"])
        worse += [f"On {name} it is worse than {' and '.join(numbers['worse_than'])}."] * bool(numbers["worse_than"])
    length = f"{summary['steps']:,} steps of {summary['samples'] // summary['steps']} crops in {summary['precision']}"
    text = " ".join([f"{length} took {summary['seconds']:.0f} s on two cores, one thread each.", *worse])
    errors = " and ".join(f"{numbers['mse']:.3f}" for numbers in avx2["sets"].values())
    text += (
        f" On the same machine held to AVX2, which has no bf16, {avx2['steps']:,} steps in {avx2['precision']} took "
        f"{avx2['seconds']:.0f} s and ended at {errors}."
    )
    head = ["masked patches of", "model", "mean visible colour", "inverse distance", "model, PSNR"]
    return f"{rows_to_table(head, rows)}\n\n{text}"


def soak_block(result: dict) -> str:
    """The kills of ``make soak``, by mode, and its verdict."""
    names = {"none": "one process", "ddp": "two, DDP", "fsdp": "two, FSDP"}
    rows = []
    for mode, name in names.items():
        rounds = [entry for entry in result["rounds"] if entry["mode"] == mode]
        kills, again = (sum(entry[key] for entry in rounds) for key in ("kills", "steps_done_again"))
        rows.append([name, str(len(rounds)), str(kills), f"{again:,}"])
    by, survivors, versions = result["by"], result["survivors"], result["versions"]
    text = (
        f"{result['kills']} kills in {result['seconds'] / 60:.0f} minutes on {result['machine']['cores']} cores: "
        f"{by['while_saving']} while a checkpoint was being written, {by['starting_up']} before the first step, "
        f"{by['one_of_two']} of one process of two. {survivors['by themselves']} of the survivors ended by themselves, "
        f"the slowest after {result['slowest_survivor_seconds']:.1f} s; a launcher would have had to end "
        f"{survivors['SIGTERM'] + survivors['SIGKILL']}. Verdict: {result['verdict']} (fastmae {versions['fastmae']}, "
        f"PyTorch {versions['torch']})."
    )
    return f"{rows_to_table(['processes', 'rounds', 'kills', 'steps repeated'], rows)}\n\n{text}"


def fill(text: str, name: str, block: str) -> str:
    """Replace what a page holds between the markers of a block."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def pages(machines: list[Machine]) -> dict[str, str]:
    """Path to text, for every page that holds results."""
    read = lambda path: json.loads((RESULTS / path).read_text())  # noqa: E731
    blocks = {
        README: {"benchmarks": readme_block(machines)},
        PAGE: {"results": benchmarks_block(machines)},
        COUNTED: {
            "traffic": traffic_table(read("counted/traffic.json"), "ViT-B/16"),
            "step": step_bytes_table(read("counted/step.json")),
        },
        PHOTOGRAPHS: {
            "results": photographs_block(read("photographs/summary.json"), read("photographs/summary-avx2.json"))
        },
        RUNNING: {"soak": soak_block(read("cpu-amd-epyc/soak.json"))},
    }
    texts = {}
    for path, named in blocks.items():
        text = (ROOT / path).read_text()
        for name, block in named.items():
            text = fill(text, name, block)
        texts[path] = text
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("slim", help="keep what is worth committing of pytest-benchmark's files")
    one.add_argument("files", nargs="+", type=Path)
    commands.add_parser("write", help="write the tables of README and docs from the committed results")
    arguments = parser.parse_args()
    if arguments.command == "slim":
        for path in arguments.files:
            path.write_text(json.dumps(slim(json.loads(path.read_text())), indent=1) + "\n")
        return
    for path, text in pages(load(RESULTS)).items():
        (ROOT / path).write_text(text)


if __name__ == "__main__":
    main()
