"""What was learned: one table of all runs, ``results.csv``, and the page and plot that are written from it.

    python benchmarks/learning/leaderboard.py        # writes docs/learning.md and docs/learning.png
    fastmae ablate claims.toml --out claims          # then add what the table of variants gave:
    python benchmarks/learning/leaderboard.py claims --data "CIFAR-10, the same 200 labels per class for all seeds" \\
        --images 50000 --model "128 wide, 4 deep, patch 4" --hardware "one thread of AMD EPYC"

``results.csv`` has a line per protocol of a run. A script beside this file, such as ``cifar10.py``, replaces its lines,
and so does the last command those of its ablation. ``published.csv`` holds what others report, by source.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from scipy.stats import t

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS, PUBLISHED = HERE / "results.csv", HERE / "published.csv"
PAGE, PLOT = ROOT / "docs" / "learning.md", ROOT / "docs" / "learning.png"
COLUMNS = (
    "data", "model", "features", "epochs", "images_seen", "wall_clock_s", "cpu_s", "hardware", "protocol", "top1",
    "spread", "seeds", "command", "log",
)  # fmt: skip
PROTOCOLS = {
    "finetune": "fine-tuning", "partial": "fine-tuning of the last blocks", "scratch": "training from scratch",
    "linear": "linear", "attentive": "attentive", "knn": "k-NN",
}  # fmt: skip
SOURCES = {
    "facebookresearch": "[facebookresearch/mae](https://github.com/facebookresearch/mae)",
    "mmpretrain": "[mmpretrain](https://github.com/open-mmlab/mmpretrain/blob/main/configs/mae/README.md)",
    "efficient-probing": "[efficient-probing](https://github.com/billpsomas/efficient-probing)",
    "lightly": "[lightly](https://docs.lightly.ai/getting_started/benchmarks.html)",
}
ABLATIONS = ("claims.csv", "mask_ratio.csv")
"""Results of ``fastmae ablate`` that the claims are judged by; a run that both have is the same."""


class Claim(NamedTuple):
    """What the paper says of ViT-L, pretrained for 800 epochs, and the variants that test it here.

    Attributes:
        text: the claim.
        paper: its table or figure and numbers, top-1 of the linear probe.
        better: the variant that should be better.
        others: those that should be worse.
        how_many: of the others: ``all``, or ``any`` if some may be as good.
    """

    text: str
    paper: str
    better: str
    others: Sequence[str]
    how_many: Callable[[Iterable[bool]], bool] = all


CLAIMS = (
    Claim(
        "Masking 75 % is best or near it",
        "figure 5: 73.5 at 75 %, 54.6 at 10 %",
        "MAE",
        ("mask 30 %", "mask 50 %", "mask 90 %"),
        any,
    ),
    Claim(
        "A deep enough decoder helps the linear probe",
        "table 1a: 71.9 with 4 blocks, 65.5 with 1",
        "decoder of 4 blocks",
        ("MAE",),
    ),
    Claim(
        "An encoder without mask tokens is better",
        "table 1c: 73.5 without, 59.6 with",
        "MAE",
        ("mask tokens in the encoder",),
    ),
    Claim("Normalised pixels help", "table 1d: 73.9 with, 73.5 without", "MAE", ("pixels not normalised",)),
    Claim(
        "Random masks beat blocks and grids",
        "table 1f, at 75 %: random 73.5, block 63.9, grid 66.0",
        "MAE",
        ("block masks", "grid masks"),
    ),
)


def read_rows(path: Path = RESULTS) -> list[dict[str, str]]:
    """The lines of a table, by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def replace_rows(rows: Iterable[dict[str, object]], log: str, path: Path = RESULTS) -> None:
    """Put lines in the place of those that have the same log; the others stay."""
    others = [row for row in read_rows(path) if row["log"] != log] if path.exists() else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*others, *rows], key=lambda row: row["log"]))


def summarize(results: Sequence[dict], about: dict[str, object], images: int, epochs: float) -> list[dict[str, object]]:
    """Lines for runs that differ in their seed: mean and standard deviation of each accuracy.

    Args:
        results: per seed, shares by features and protocol, and under ``pretraining`` its ``seconds`` and
            ``cpu_seconds``. A later one may lack features of the first.
        about: columns that all lines share; the model is that of the features that have weights.
        images, epochs: of the pretraining.
    """
    seconds, cpu = (round(mean(result["pretraining"][key] for result in results)) for key in ("seconds", "cpu_seconds"))
    lines = []
    for name in results[0].keys() - {"pretraining"}:
        trained = name.startswith("pretrained")
        cost = {"epochs": f"{epochs:.2f}", "images_seen": images, "wall_clock_s": seconds, "cpu_s": cpu}
        cost |= {} if name == "pretrained" else {"wall_clock_s": 0, "cpu_s": 0}  # only this one was timed
        cost |= {} if trained else {"epochs": 0, "images_seen": 0}
        model = about["model"] if trained or name == "random weights" else "none"
        for protocol in results[0][name]:
            values = [100 * result[name][protocol] for result in results if name in result]
            spread = f"{stdev(values):.1f}" if len(values) > 1 else ""
            found = {"protocol": protocol, "top1": f"{mean(values):.1f}", "spread": spread, "seeds": len(values)}
            lines.append(about | cost | found | {"features": name, "model": model})
    return sorted(lines, key=lambda line: (line["protocol"], -float(line["top1"]), line["features"]))


def of_ablation(rows: Sequence[dict[str, str]], about: dict[str, object], images: int) -> list[dict[str, object]]:
    """Lines for a results.csv of ``fastmae ablate``: a line per variant and protocol, over its seeds.

    Args:
        rows: of results.csv.
        about: columns that all lines share.
        images: in the data set that was pretrained on.
    """
    lines = []
    for variant, protocol in dict.fromkeys((row["variant"], row["protocol"]) for row in rows):
        own = [row for row in rows if (row["variant"], row["protocol"]) == (variant, protocol)]
        seconds, values = (mean_and_spread(own, column) for column in ("seconds", "top1"))
        seen = round(mean(float(row["seconds"]) * float(row["images_per_second"]) for row in own))
        line = {"features": variant, "epochs": f"{seen / images:.2f}", "images_seen": seen}
        line |= {"wall_clock_s": round(seconds[0]), "cpu_s": ""}
        if protocol == "scratch":
            line = {"features": "random weights", "epochs": 0, "images_seen": 0, "wall_clock_s": 0, "cpu_s": 0}
        spread = "" if math.isnan(values[1]) else f"{values[1]:.1f}"
        line |= {"protocol": protocol, "top1": f"{values[0]:.1f}", "spread": spread, "seeds": len(own)}
        lines.append(about | line)
    return lines


def mean_and_spread(rows: Iterable[dict[str, str]], column: str) -> tuple[float, float]:
    """Mean and standard deviation (nan of a single value) over seeds; of accuracies in percent."""
    values = [float(row[column]) * (100 if column == "top1" else 1) for row in rows]
    return mean(values), stdev(values) if len(values) > 1 else math.nan


def with_spread(value: float, spread: float) -> str:
    """As ``45.1 ± 2.4``."""
    return f"{value:.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")


def judge(claim: Claim, rows: Sequence[dict[str, str]]) -> tuple[str, str, str]:
    """What was measured, by how much, and what follows: "confirmed", "contradicted", "undecided" or "not run".

    Seeds draw the same weights, crops and masks for all variants, so that differences are taken per seed. A difference
    counts if the interval of its mean, 95 % by Student's t, leaves out 0.
    """
    names = (claim.better, *claim.others)
    linear = [row for row in rows if row["variant"] in names and row["protocol"] == "linear"]
    found = {name: {row["seed"]: row for row in linear if row["variant"] == name} for name in names}
    shown = {name: with_spread(*mean_and_spread(own.values(), "top1")) for name, own in found.items() if own}
    measured = "; ".join(f"{name} {text}" for name, text in shown.items())
    best, *others = found.values()
    gains = []
    for other in others:
        pairs = [100 * (float(best[seed]["top1"]) - float(other[seed]["top1"])) for seed in best.keys() & other.keys()]
        if len(pairs) < 2:
            return measured, "", "not run"
        gains.append((mean(pairs), t.ppf(0.975, len(pairs) - 1) * stdev(pairs) / math.sqrt(len(pairs))))
    by = "; ".join(f"{gain:+.1f} ± {limit:.1f}" for gain, limit in gains)
    if any(gain < -limit for gain, limit in gains):
        return measured, by, "contradicted"
    return measured, by, "confirmed" if claim.how_many(gain > limit for gain, limit in gains) else "undecided"


def claims(rows: Sequence[dict[str, str]]) -> str:
    """A table of the claims and what was found here."""
    head = ["claim", "in the paper", "here, mean ± standard deviation", "better by, per seed", "verdict"]
    return table(head, ([claim.text, claim.paper, *judge(claim, rows)] for claim in CLAIMS))


def read_ablations() -> list[dict[str, str]]:
    """The rows of the committed ablations, each run once."""
    rows = [row for name in ABLATIONS if (HERE / name).exists() for row in read_rows(HERE / name)]
    return list({(row["run"], row["protocol"]): row for row in rows}.values())


def shuffle(images: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Images (H, W, ...) with their pixels permuted, each in another way: the colours are left, and nothing else."""
    generator = np.random.default_rng(0)
    return [generator.permutation(image.reshape(-1, *image.shape[2:])).reshape(image.shape) for image in images]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def measured(rows: Sequence[dict[str, str]]) -> str:
    """A table for each data set, the best first within a protocol."""
    parts = []
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == data]
        own.sort(key=lambda row: (list(PROTOCOLS).index(row["protocol"]), -float(row["top1"])))
        lines = [
            [
                PROTOCOLS[row["protocol"]],
                row["features"],
                row["model"],
                row["epochs"],
                f"{int(row['images_seen']):,}",
                _seconds(row),
                f"{row['top1']} ± {row['spread']}" if row["spread"] else row["top1"],
                row["seeds"],
                f"[log](../benchmarks/learning/{row['log']})",
            ]
            for row in own
        ]
        head = ["protocol", "features", "model", "epochs", "images seen", "seconds (of CPU)", "top-1 %", "seeds", "log"]
        parts.append(f"### {data}\n\n{table(head, lines)}")
        for text in dict.fromkeys(f"`{row['command']}`, on {row['hardware']}." for row in own):
            parts.append(text)
    return "\n\n".join(parts)


def _seconds(row: dict[str, str]) -> str:
    """Nothing without the CPU time: wall time depends on what else the machine did."""
    return "" if row["cpu_s"] in ("", "0") else f"{int(row['wall_clock_s']):,} ({int(row['cpu_s']):,})"


def published(rows: Sequence[dict[str, str]]) -> str:
    """What others report of ImageNet-1k: a line per source, model and length of pretraining."""
    lines = []
    names = [name for name in PROTOCOLS if any(row["protocol"] == name for row in rows)]
    for key in dict.fromkeys((row["model"], int(row["epochs"]), row["source"]) for row in rows):
        own = {row["protocol"]: row for row in rows if (row["model"], int(row["epochs"]), row["source"]) == key}
        values = [
            own[name]["top1"] + "*" * (own[name]["same_as_ours"] == "no") if name in own else "" for name in names
        ]
        lines.append([key[0], str(key[1]), *values, SOURCES[key[2]]])
    lines.sort(key=lambda line: ("BLH".index(line[0][-1]), int(line[1])))
    return table(["model", "epochs", *(PROTOCOLS[name] for name in names), "source"], lines)


def page(text: str) -> str:
    """The page with its tables written anew."""
    blocks = {"measured": measured(read_rows()), "claims": claims(read_ablations())}
    blocks["published"] = published(read_rows(PUBLISHED))
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"
    return text


def plot(rows: Sequence[dict[str, str]], others: Sequence[dict[str, str]], path: Path) -> None:
    """On the left what was measured here, on the right what others report by length of pretraining."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    linear = sorted((row for row in rows if row["protocol"] == "linear"), key=lambda row: float(row["top1"]))
    names = [row["features"] for row in linear]
    for offset, protocol in ((0.2, "linear"), (-0.2, "knn")):
        own = {row["features"]: row for row in rows if row["protocol"] == protocol}
        places = [names.index(name) + offset for name in own]
        values, spreads = ([float(row[key] or 0) for row in own.values()] for key in ("top1", "spread"))
        left.barh(places, values, 0.36, xerr=spreads, label=PROTOCOLS[protocol])
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="top-1 %", title=rows[0]["data"], xlim=(0, 50))
    left.axvline(10, color="grey", linestyle=":", label="chance")
    left.legend(loc="lower right", fontsize=8)
    for model, color in (("ViT-B", "C0"), ("ViT-L", "C1")):
        for protocol, style in (("finetune", "o-"), ("linear", "s--")):
            own = [r for r in others if (r["model"], r["protocol"], r["source"]) == (model, protocol, "mmpretrain")]
            epochs, values = ([float(row[key]) for row in own] for key in ("epochs", "top1"))
            right.plot(epochs, values, style, color=color, label=f"{model}, {PROTOCOLS[protocol]}")
    right.set(xlabel="epochs of pretraining", title="ImageNet-1k, published (mmpretrain)", xscale="log")
    right.set(ylabel="top-1 %", ylim=(52, 88))
    right.set_xticks([300, 400, 800, 1600], ["300", "400", "800", "1600"], minor=False)
    right.minorticks_off()
    right.legend(loc="lower right", ncols=2, fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Add an ablation if one is given, then write the page and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="--out of fastmae ablate, named as its specification")
    parser.add_argument("--images", type=int, help="images in the data set that was pretrained on")
    for name in ("data", "model", "hardware"):
        parser.add_argument(f"--{name}", help="the column of results.csv")
    given = parser.parse_args()
    if given.folder:
        name = given.folder.resolve().name
        about = {key: getattr(given, key) for key in ("data", "model", "hardware")}
        if not given.images or None in about.values():
            parser.error("expected --images, --data, --model and --hardware with a folder")
        shutil.copy(given.folder / "results.csv", HERE / f"{name}.csv")
        log = f"{name}.csv"
        about |= {"command": f"fastmae ablate {name}.toml --out {name}", "log": log}
        identity = itemgetter("data", "features", "protocol", "top1", "spread")
        shared = {identity(row) for row in read_rows() if row["log"] != log}  # runs of another specification
        lines = of_ablation(read_rows(HERE / log), about, given.images)
        replace_rows([line for line in lines if identity(line) not in shared], log)
    PAGE.write_text(page(PAGE.read_text()))
    plot([row for row in read_rows() if row["log"] == "cifar10.json"], read_rows(PUBLISHED), PLOT)


if __name__ == "__main__":
    main()
