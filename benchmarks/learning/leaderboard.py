"""What was learned: one table of all runs, ``results.csv``, and the page and plot that are written from it.

    python benchmarks/learning/leaderboard.py        # writes docs/learning.md and docs/learning.png

``results.csv`` has a line per protocol of a run. A script beside this file, such as ``cifar10.py``, replaces its lines;
add others by hand, with the command and the log. ``published.csv`` holds what others report, by source.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS, PUBLISHED = HERE / "results.csv", HERE / "published.csv"
PAGE, PLOT = ROOT / "docs" / "learning.md", ROOT / "docs" / "learning.png"
COLUMNS = (
    "data", "model", "features", "epochs", "images_seen", "wall_clock_s", "cpu_s", "hardware", "protocol", "top1",
    "spread", "seeds", "command", "log",
)  # fmt: skip
PROTOCOLS = {"finetune": "fine-tuning", "linear": "linear", "attentive": "attentive", "knn": "k-NN"}
SOURCES = {
    "facebookresearch": "[facebookresearch/mae](https://github.com/facebookresearch/mae)",
    "mmpretrain": "[mmpretrain](https://github.com/open-mmlab/mmpretrain/blob/main/configs/mae/README.md)",
    "efficient-probing": "[efficient-probing](https://github.com/billpsomas/efficient-probing)",
    "lightly": "[lightly](https://docs.lightly.ai/getting_started/benchmarks.html)",
}


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
                f"{int(row['wall_clock_s']):,} ({int(row['cpu_s']):,})" if row["wall_clock_s"] != "0" else "",
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


def published(rows: Sequence[dict[str, str]]) -> str:
    """What others report of ImageNet-1k: a line per source, model and length of pretraining."""
    lines = []
    for key in dict.fromkeys((row["model"], int(row["epochs"]), row["source"]) for row in rows):
        own = {row["protocol"]: row for row in rows if (row["model"], int(row["epochs"]), row["source"]) == key}
        values = [
            own[name]["top1"] + "*" * (own[name]["same_as_ours"] == "no") if name in own else "" for name in PROTOCOLS
        ]
        lines.append([key[0], str(key[1]), *values, SOURCES[key[2]]])
    lines.sort(key=lambda line: ("BLH".index(line[0][-1]), int(line[1])))
    return table(["model", "epochs", *PROTOCOLS.values(), "source"], lines)


def page(text: str, rows: Sequence[dict[str, str]], others: Sequence[dict[str, str]]) -> str:
    """The page with its tables written anew."""
    for name, block in (("measured", measured(rows)), ("published", published(others))):
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
    """Write the page and the plot."""
    rows, others = read_rows(), read_rows(PUBLISHED)
    PAGE.write_text(page(PAGE.read_text(), rows, others))
    plot([row for row in rows if row["log"] == "cifar10.json"], others, PLOT)


if __name__ == "__main__":
    main()
