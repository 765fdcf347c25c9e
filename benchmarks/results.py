"""Results as they are stored: lines of JSON while they are measured, which survive a cut, and files made of them.

A line has a ``kind``: "machine", "benchmark" (an entry), "round" (one time of a competitor), "end_to_end", "stage".
"""

from __future__ import annotations

import json
import os
import statistics
from contextlib import suppress
from pathlib import Path


def entry(group: str, competitor: str, seconds: list[float], **facts: object) -> dict:
    """What results hold of one competitor."""
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    found = _rounded({"median": median, "iqr": q3 - q1, "q1": q1, "q3": q3, "min": min(seconds)})
    return {"group": group, "competitor": competitor, "rounds": len(seconds), "seconds": found} | _rounded(facts)


def _rounded(values: dict) -> dict:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()}


def append(path: Path | None, kind: str, **values: object) -> None:
    """Append a line to a file, if there is one; several processes may append to the same."""
    if path is None:
        return
    # One write, so that lines of two processes do not mix.
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps({"kind": kind} | values, default=str).encode() + b"\n")
        if kind != "round":
            os.fsync(file.fileno())


def collect(path: Path) -> dict:
    """Machine, date and commit; the entries; end-to-end results; how the stages of ``gpu.py`` ended.

    Of a benchmark that was cut off, the rounds that were run count.
    """
    found: dict = {}
    entries: dict[tuple[str, str], dict] = {}
    rounds: dict[tuple[str, str], list[float]] = {}
    for text in path.read_text().splitlines():
        line = {"kind": None}
        with suppress(json.JSONDecodeError):  # the last line may have been cut
            line = json.loads(text)
        match line.pop("kind"):
            case "machine":
                found |= line
            case "benchmark":
                entries[line["group"], line["competitor"]] = line
            case "round":
                rounds.setdefault((line["group"], line["competitor"]), []).append(line["seconds"])
            case "end_to_end" | "stage" as kind:
                found.setdefault(kind, {})[line["name"]] = line["found"]
    for (group, competitor), seconds in rounds.items():
        entries.setdefault((group, competitor), entry(group, competitor, seconds, cut_off=True))
    return found | {"benchmarks": list(entries.values())}
