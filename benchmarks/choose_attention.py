"""Writes what ``backend="auto"`` of attention picks, from results of bench_attention.py.

    python benchmarks/choose_attention.py benchmarks/results/*/attention.json

Results are read as pytest-benchmark or ``report.py slim`` wrote them. Every device of the table has to be among the
results: the file is written anew. Two results of one kind of device are joined by the geometric mean.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection, Iterable
from pathlib import Path

from report import slim

# PyTorch's kernels by name are measured to know them; only these can be picked.
BACKENDS = ("plain", "sdpa", "triton", "xformers")
ROOT = Path(__file__).parents[1]
TABLE = ROOT / "fastmae" / "ops" / "attention_choices.json"


def choices(results: Iterable[dict], without: Collection[str] = ()) -> dict:
    """The table: for every kind of device the names, the versions of PyTorch, and a row for each measured shape.

    ``without``: backends that are not to be picked.
    """
    found: dict[str, dict[tuple, dict[str, list[float]]]] = {}
    origins: dict[str, dict[str, set[str]]] = {}
    for result in map(slim, results):
        for one in result["benchmarks"]:
            if one["competitor"] not in BACKENDS or one["competitor"] in without:
                continue
            shapes = found.setdefault(one["device_key"], {})
            origin = origins.setdefault(one["device_key"], {"devices": set(), "torch": set()})
            origin["devices"].add(result["machine"]["device"])
            origin["torch"].add(one["torch"])
            ratios = shapes.setdefault((one["dtype"], one["tokens"], one["head_dim"]), {})
            ratio = 1.0 if one["competitor"] == "sdpa" else one.get("ratios", {}).get("sdpa")
            if ratio is not None:
                ratios.setdefault(one["competitor"], []).append(ratio)
    return {
        key: {
            **{name: sorted(values) for name, values in origins[key].items()},
            "rows": [
                {"dtype": dtype, "tokens": tokens, "head_dim": head_dim, "ratios": _joined(ratios)}
                for (dtype, tokens, head_dim), ratios in sorted(shapes.items())
            ],
        }
        for key, shapes in sorted(found.items())
    }


def _joined(ratios: dict[str, list[float]]) -> dict[str, float]:
    """Fastest first; of equals the first in the alphabet."""
    means = {name: math.exp(sum(map(math.log, values)) / len(values)) for name, values in ratios.items()}
    return {name: round(mean, 3) for name, mean in sorted(means.items(), key=lambda item: (item[1], item[0]))}


def write(tables: dict) -> str:
    """JSON with a line for every row."""
    lines = [
        "{",
        '"about": "Time of each backend over SDPA\'s; written by benchmarks/choose_attention.py",',
        '"tables": {',
    ]
    for i, (key, entry) in enumerate(tables.items()):
        heads = ", ".join(f'"{name}": {json.dumps(entry[name])}' for name in ("devices", "torch"))
        lines += [f'{json.dumps(key)}: {{{heads}, "rows": [']
        lines += [",\n".join(json.dumps(row) for row in entry["rows"])]
        lines += ["]}" + ("," if i + 1 < len(tables) else "")]
    return "\n".join([*lines, "}", "}", ""])


def committed() -> list[dict]:
    """Results of other machines, which the table keeps."""
    return [json.loads(path.read_text()) for path in sorted(ROOT.glob("benchmarks/results/*/attention.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=TABLE)
    arguments = parser.parse_args()
    arguments.out.write_text(write(choices(json.loads(path.read_text()) for path in arguments.results)))


if __name__ == "__main__":
    main()
