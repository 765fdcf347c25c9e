"""Writes all generated tables from the committed results: README, docs, and what ``backend="auto"`` of attention picks.

    python benchmarks/report.py collect benchmarks/results/<machine>/*.jsonl   # lines of JSON into files to commit
    python benchmarks/report.py write                                          # all pages
    python benchmarks/report.py choices RESULTS... --out FILE                  # attention's table alone, RESULTS added

A folder of ``benchmarks/results`` is a machine. A page holds each table between ``<!-- NAME:begin -->`` and
``<!-- NAME:end -->``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection, Iterable
from itertools import chain
from pathlib import Path

from results import collect

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE = "README.md", "docs/benchmarks.md"
CHOICES = "fastmae/ops/attention_choices.json"
TIE = 0.995
"""A ratio from here up rounds to 1.00 and does not count as slower."""


# --- Results ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict:
    """A file of results, or lines of JSON that are to become one."""
    if path.suffix == ".jsonl":
        return collect(path)
    # Earlier results call a change to the training step a lever.
    return json.loads(path.read_text().replace('"lever: ', '"change: '))


def kind_of(group: str) -> str:
    """What comes before the case: "masked_patch_mse, 224px-p16 forward" is of the kind "masked_patch_mse"."""
    return group.split(",")[0]


def case_of(group: str) -> str:
    return group.removeprefix(kind_of(group)).strip(" ,")


STEP, LOADERS = "training step", "loader"
_FIRST = (STEP, "block", "attention", "norm_linear", "gelu_linear", "masked_patch_mse", "gather_patches")


class Machine:
    """All results of one folder: by group, in the order of the files, then by competitor.

    A group that two files have stays two groups, the second named after its file: ratios hold within one run only.
    """

    def __init__(self, results: dict[str, dict]):
        self.runs = list(results.values())
        self.info = self.runs[0]["machine"]
        self.groups: dict[str, dict[str, dict]] = {}
        for file, result in results.items():
            before = set(self.groups)
            for entry in result["benchmarks"]:
                group = entry["group"] if entry["group"] not in before else f"{entry['group']} ({file})"
                self.groups.setdefault(group, {})[entry["competitor"]] = entry
        self.groups = {group: found for group, found in self.groups.items() if kind_of(group) != "loader stages"}

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
        files = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
        # Other JSON lies there too.
        runs = {name: found for name, found in files.items() if isinstance(found, dict) and found.get("benchmarks")}
        machines += [Machine(runs)] if runs else []
    return sorted(machines, key=lambda machine: not machine.is_gpu)


# --- Comparing --------------------------------------------------------------------------------------------------------


def ratio(entries: dict[str, dict], rival: str, ours: str, cpu: bool = False) -> float:
    """The rival's time (or CPU time per image) over ours, by rounds where both ran in turn, else of medians."""

    def seconds(name: str) -> float:
        return entries[name]["cpu_seconds_per_image"] if cpu else entries[name]["seconds"]["median"]

    by_round = entries[rival].get("cpu_ratios" if cpu else "ratios", {})
    return by_round.get(ours) or seconds(rival) / seconds(ours)


def counterpart(rival: str, names: Iterable[str]) -> str | None:
    """Which of ours a rival is compared with: compiled with compiled, a bf16 residual stream with one."""
    residual = "-bf16-residual" if rival.endswith("-bf16-residual") else ""
    compiled = "-compile" if "-compile" in rival else ""
    candidates = (f"fastmae{compiled}{residual}", f"fastmae{compiled}", f"fastmae{residual}", "fastmae")
    return next((ours for ours in candidates if ours in names), None)


def is_rival(name: str) -> bool:
    return not name.startswith(("fastmae", "change"))


def losses(machine: Machine) -> list[tuple[str, str, str, float]]:
    """Group, ours, rival and ratio wherever a rival is faster; loaders compare on the same source only."""
    found = []
    for group, entries in machine.groups.items():
        for rival in filter(is_rival, entries):
            if kind_of(group) == LOADERS:
                source = rival.split(", ")[1]
                for ours in (name for name in entries if not is_rival(name) and name.split(", ")[1] == source):
                    found.append((group, ours, rival, ratio(entries, rival, ours)))
                    found.append((group, f"{ours} (CPU time)", rival, ratio(entries, rival, ours, cpu=True)))
            elif ours := counterpart(rival, entries):
                found.append((group, ours, rival, ratio(entries, rival, ours)))
    return [loss for loss in found if loss[-1] < TIE]


# --- Tables -----------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def median(entry: dict) -> str:
    return duration(entry["seconds"]["median"])


def times(value: float) -> str:
    return f"{value:.2f}x" if value >= TIE else f"**{value:.2f}x (slower)**"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, without columns that are empty in every row."""
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    lines = [[head[i] for i in kept], ["---"] + ["---:"] * (len(kept) - 1)]
    lines += [[row[i] or "-" for i in kept] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def step_table(entries: dict[str, dict]) -> str:
    rows = []
    for name, entry in entries.items():
        if name.startswith("change"):
            continue
        ours = counterpart(name, entries) if is_rival(name) else None
        slowdown = [times(ratio(entries, name, ours)), f"`{ours}`"] if ours else ["", ""]
        peak = f"{entry['peak_memory_bytes'] / 2**30:.1f} GiB" if "peak_memory_bytes" in entry else ""
        rate, launches = f"{entry.get('images_per_s', 0):,.1f}", str(entry.get("launches") or "")
        rows.append([f"`{name}`", median(entry), rate, *slowdown, peak, launches])
    return table(["", "a step", "images/s", "slowdown", "relative to", "peak memory", "launches"], rows)


_BASELINE = "facebookresearch-sdpa"


def change_table(entries: dict[str, dict]) -> str:
    """What each change brings on its own."""
    rows = []
    for name in sorted((n for n in entries if not is_rival(n)), key=lambda name: name.startswith("fastmae")):
        label = f"all together (`{name}`)" if name.startswith("fastmae") else name.removeprefix("change: ")
        rows.append([label, times(ratio(entries, _BASELINE, name))])
    return table([f"change to `{_BASELINE}`", "speedup"], rows)


def op_table(groups: dict[str, dict[str, dict]], *, bandwidth: bool) -> str:
    """Cases of one op: our time and how near it is to what the device can do, then every rival's.

    Without ``bandwidth``, as for a CPU, whose caches hold small copies, only the FLOP/s are compared with the device's.
    Where nothing is called fastmae, as with attention's backends, the fastest one stands out.
    """
    names = list(dict.fromkeys(chain.from_iterable(groups.values())))
    rivals, rows = [name for name in names if name != "fastmae"], []
    for group, entries in groups.items():
        if "fastmae" not in names:
            cells = {name: median(entry) for name, entry in entries.items()}
            fastest = min(entries, key=lambda name: entries[name]["seconds"]["median"])
            cells[fastest] = f"**{cells[fastest]}**"
            rows.append([case_of(group), *(cells.get(name, "") for name in names)])
            continue
        ours, row = entries["fastmae"], [case_of(group), median(entries["fastmae"]), "", "", "", ""]
        if bandwidth and "gb_per_s" in ours:
            row[2:4] = (
                f"{ours['gb_per_s']:,.3g}",
                f"{ours['share_of_copy']:.2f} / {ours['share_of_copy_by_sectors']:.2f}",
            )
        if ours.get("share_of_matmul", 0) > 0.02:
            row[4:6] = f"{ours['tflop_per_s']:.3g}", f"{ours['share_of_matmul']:.2f}"
        for rival in rivals:
            text = ""
            if rival in entries:
                value = ratio(entries, rival, counterpart(rival, entries) if is_rival(rival) else "fastmae")
                text = f"{median(entries[rival])}, {times(value) if is_rival(rival) else f'{value:.2f}x'}"
            row.append(text)
        rows.append(row)
    if "fastmae" not in names:
        return table(["", *(f"`{name}`" for name in names)], rows)
    head = ["", "`fastmae`", "GB/s", "of a copy: bytes / sectors", "TFLOP/s", "of a matmul"]
    return table(head + [f"`{rival}`" for rival in rivals], rows)


BASELINE_LOADER = "pillow-uint8, folder"


def loader_table(entries: dict[str, dict]) -> str:
    """Every loader on every source: images per second, CPU time per image, and both relative to the Pillow loader's."""
    rows = []
    for name, entry in entries.items():
        speedups = []
        for cpu in (False, True):
            speedup = 1.0 if name == BASELINE_LOADER else ratio(entries, BASELINE_LOADER, name, cpu)
            speedups.append(f"{speedup:.2f}x" if is_rival(name) else times(speedup))
        (loader, source), cpu_time = name.split(", "), entry["cpu_seconds_per_image"] * 1e6
        row = [f"`{loader}`", source, f"{entry['images_per_s']:,.0f}", speedups[0], f"{cpu_time:,.0f} µs", speedups[1]]
        rows.append(row)
    return table(["loader", "reads", "images/s", "speedup", "CPU time per image", "speedup"], rows)


def end_to_end_table(found: dict[str, dict]) -> str:
    """The trainer from JPEGs on a disk: rates, MFU, and where a step's time goes."""
    rows = []
    for name, one in found.items():
        train, model, both, step = one["config"]["train"], one["model"], one["both"], one["step"]
        compiled = " compiled" if train["compile"] not in (False, "none") else ""
        rows.append([
            f"{name}: {one['config']['recipe']}{compiled}, batch {train['batch_size']}",
            *(f"{one[phase]['images_per_second']:,.0f}" for phase in ("loader", "model", "both")),
            f"{both['images_per_second'] / model['images_per_second']:.1%}", f"{model['mfu']:.1%}",
            f"{both['mfu']:.1%}", ", ".join(f"{what} {ms / step['ms']:.0%}" for what, ms in step["stages_ms"].items()),
        ])  # fmt: skip
    head = ["", "loader, images/s", "model", "both", "both of model", "MFU, model", "MFU, both", "stages of a step"]
    return table(head, rows)


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
        of_runs = lambda key: [item for run in machine.runs for item in run.get(key, {}).items()]  # noqa: B023, E731
        if failed := [f"{stage}: {end}" for stage, end in of_runs("stage") if end != "done"]:
            parts.append(f"**Not complete.** {'; '.join(failed)}.")
        if end_to_end := dict(of_runs("end_to_end")):
            parts += ["### From JPEGs to weights", end_to_end_table(end_to_end)]
        for kind in machine.kinds():
            groups = machine.of(kind)
            parts.append(f"### {kind.capitalize() if kind in (STEP, LOADERS) else f'`{kind}`'}")
            if kind not in (STEP, LOADERS):
                parts.append(op_table(groups, bandwidth=machine.is_gpu))
                continue
            for group, entries in groups.items():
                parts += [f"**{case_of(group)}**", step_table(entries) if kind == STEP else loader_table(entries)]
                if any(name.startswith("change") for name in entries):
                    parts.append(change_table(entries))
        rows = [[group, f"`{ours}`", f"`{rival}`", f"{value:.2f}x"] for group, ours, rival, value in losses(machine)]
        head = ["", "ours", "is slower than", "whose time is"]
        parts += ["### Where fastmae is slower", table(head, rows) if rows else "Nowhere in these results."]
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
            found = {entries[name]["images_per_s"]: name for name in ("fastmae", "fastmae-compile") if name in entries}
            row = [case_of(group), f"{max(found):,.1f} (`{found[max(found)]}`)"]
            for rival in rivals.values():
                row.append(times(ratio(entries, rival, counterpart(rival, entries))) if rival in entries else "")
            rows.append(row)
        if rows:
            results = sum(len(entries) for entries in machine.groups.values())
            steps = [run for run in machine.runs if any(kind_of(one["group"]) == STEP for one in run["benchmarks"])]
            parts += [
                "Slowdown of a training step relative to fastmae (higher is worse), bf16, compiled against compiled. "
                + describe(steps),
                table(["", "images/s", *rivals], rows),
                f"[All {results} results]({PAGE}), with the {len(losses(machine))} comparisons where fastmae is "
                "slower.",
            ]
    return "\n\n".join(parts)


def traffic_table(counted: dict, model: str) -> str:
    """Kilobytes per image of every op."""
    rows = []
    for name, found in counted["models"][model].items():
        ours, eager, compiled = (found[who] for who in ("fastmae", "eager", "compiled"))
        around = f" + {ours['operators around']}" if ours["operators around"] else ""
        rows.append([
            name, *(f"{v / 1e3:,.1f}" for v in (ours["budget"], ours["bytes"])), f"{ours['kernels']}{around}",
            *(t for o in (eager, compiled) for t in (f"{o['bytes'] / ours['bytes']:.1f}x", str(o["launches"]))),
        ])  # fmt: skip
    head = ["op", "budget", "fastmae", "launches", "eager", "launches", "torch.compile", "launches"]
    return table(head, rows)


def step_bytes_table(counted: dict) -> str:
    """Megabytes per image of a training step."""
    rows = []
    for label, found in counted["models"].items():
        for who, c in found.items():
            numbers = (c["saved"], c["forward"], c["backward"], c["forward"] + c["backward"])
            rows.append([f"{label}, {who}", *(f"{n:,.1f}" for n in numbers)])
    return table(["", "saved for backward", "forward", "backward", "forward + backward"], rows)


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
    return f"{table(head, rows)}\n\n{text}"


def soak_block(result: dict) -> str:
    """The kills of ``make soak``, by mode, and its verdict."""
    rows = []
    for mode, name in {"none": "one process", "ddp": "two, DDP", "fsdp": "two, FSDP"}.items():
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
    return f"{table(['processes', 'rounds', 'kills', 'steps repeated'], rows)}\n\n{text}"


def pages(machines: list[Machine]) -> dict[str, str]:
    """Path to text, for every page that holds results."""
    file = lambda path: read(RESULTS / path)  # noqa: E731
    photographs = photographs_block(file("photographs/summary.json"), file("photographs/summary-avx2.json"))
    blocks = {
        (README, "benchmarks"): readme_block(machines),
        (PAGE, "results"): benchmarks_block(machines),
        ("docs/counted.md", "traffic"): traffic_table(file("counted/traffic.json"), "ViT-B/16"),
        ("docs/counted.md", "step"): step_bytes_table(file("counted/step.json")),
        ("docs/photographs.md", "results"): photographs,
        ("docs/running.md", "soak"): soak_block(file("cpu-amd-epyc/soak.json")),
    }
    texts = {CHOICES: attention_choices(attention_results())}
    for (path, name), block in blocks.items():
        texts.setdefault(path, (ROOT / path).read_text())
        before, rest = texts[path].split(f"<!-- {name}:begin -->")
        after = rest.split(f"<!-- {name}:end -->")[1]
        texts[path] = f"{before}<!-- {name}:begin -->\n{block}\n<!-- {name}:end -->{after}"
    return texts


# --- What ``backend="auto"`` of attention picks -----------------------------------------------------------------------

# PyTorch's kernels by name are measured to know them; only these can be picked.
BACKENDS = ("plain", "sdpa", "triton", "xformers")


def attention_results() -> list[dict]:
    return [read(path) for path in sorted(RESULTS.glob("*/*.json")) if '"device_key"' in path.read_text()]


def attention_choices(results: Iterable[dict], without: Collection[str] = ()) -> str:
    """JSON: for every kind of device the names, the versions of PyTorch, and a row for each measured shape.

    Two results of one kind of device are joined by the geometric mean. ``without``: backends not to pick.
    """
    tables: dict[str, dict] = {}
    for result in results:
        for one in result["benchmarks"]:
            if "device_key" not in one or one["competitor"] not in BACKENDS or one["competitor"] in without:
                continue
            found = tables.setdefault(one["device_key"], {"devices": set(), "torch": set(), "shapes": {}})
            found["devices"].add(result["machine"]["device"])
            found["torch"].add(one["torch"])
            shape = found["shapes"].setdefault((one["dtype"], one["tokens"], one["head_dim"]), {})
            over_sdpa = 1.0 if one["competitor"] == "sdpa" else one.get("ratios", {}).get("sdpa")
            if over_sdpa is not None:
                shape.setdefault(one["competitor"], []).append(over_sdpa)

    def row(key: tuple[str, int, int], shape: dict[str, list[float]]) -> str:
        means = {name: math.exp(sum(map(math.log, values)) / len(values)) for name, values in shape.items()}
        ratios = {name: round(mean, 3) for name, mean in sorted(means.items(), key=lambda item: item[::-1])}
        return json.dumps(dict(zip(("dtype", "tokens", "head_dim"), key, strict=True)) | {"ratios": ratios})

    texts = []
    for key, found in sorted(tables.items()):
        heads = ", ".join(f'"{name}": {json.dumps(sorted(found[name]))}' for name in ("devices", "torch"))
        rows = ",\n".join(row(*item) for item in sorted(found["shapes"].items()))
        texts.append(f'{json.dumps(key)}: {{{heads}, "rows": [\n{rows}\n]}}')
    about = "Time of each backend over SDPA's; written by benchmarks/report.py"
    return f'{{\n"about": {json.dumps(about)},\n"tables": {{\n' + ",\n".join(texts) + "\n}\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="make a JSON file to commit of each file of JSON lines")
    collecting.add_argument("files", nargs="+", type=Path)
    commands.add_parser("write", help="write all pages from the committed results")
    choosing = commands.add_parser("choices", help="write attention's table from the committed results and others")
    choosing.add_argument("files", nargs="+", type=Path)
    choosing.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "collect":
        for path in arguments.files:
            path.with_suffix(".json").write_text(json.dumps(read(path), indent=1) + "\n")
            path.unlink()
    elif arguments.command == "choices":
        new = [read(path) for path in arguments.files]
        # Nobody is to get a kernel whose tests failed on the device.
        wrong = any(result.get("stage", {}).get("numerics", "").startswith("exit code") for result in new)
        table = attention_choices([*new, *attention_results()], without=("triton",) if wrong else ())
        arguments.out.write_text(table)
    else:
        for path, text in pages(load(RESULTS)).items():
            (ROOT / path).write_text(text)


if __name__ == "__main__":
    main()
