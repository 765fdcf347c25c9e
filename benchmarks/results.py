"""Results as they are stored: lines of JSON while they are measured, which survive a cut, and files made of them.

A line has a ``kind``: "machine", "benchmark" (an entry), "round" (one time of a competitor), "end_to_end", "stage".
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path


def entry(group: str, competitor: str, seconds: list[float], **facts: object) -> dict:
    """What results hold of one competitor."""
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    found = _rounded({"median": median, "iqr": q3 - q1, "q1": q1, "q3": q3, "min": min(seconds)})
    return {"group": group, "competitor": competitor, "rounds": len(seconds), "seconds": found} | _rounded(facts)


def _rounded(values: dict) -> dict:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()}


class JsonLines:
    """Appends lines to a file, if there is one; several processes may append to the same."""

    def __init__(self, path: Path | None):
        self.path = path

    def write(self, kind: str, **values: object) -> None:
        if self.path is None:
            return
        # One write, so that lines of two processes do not mix.
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps({"kind": kind} | values, default=str).encode() + b"\n")
            if kind != "round":
                os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict]:
    """All whole lines; the last one may have been cut."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def collect(lines: list[dict]) -> dict:
    """Machine, date and commit; the entries; end-to-end results; how the stages of ``gpu.py`` ended.

    Of a benchmark that was cut off, the rounds that were run count.
    """
    found: dict = {}
    entries: dict[tuple[str, str], dict] = {}
    rounds: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        kind = line.pop("kind")
        if kind == "machine":
            found |= line
        elif kind == "benchmark":
            entries[line["group"], line["competitor"]] = line
        elif kind == "round":
            rounds.setdefault((line["group"], line["competitor"]), []).append(line["seconds"])
        else:
            found.setdefault(kind, {})[line["name"]] = line["found"]
    for (group, competitor), seconds in rounds.items():
        entries.setdefault((group, competitor), entry(group, competitor, seconds, cut_off=True))
    return found | {"benchmarks": list(entries.values())}
