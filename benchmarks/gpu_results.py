"""The results of ``gpu.py``: JSON lines that survive a cut, and the tar files they leave the machine in.

Every line has a ``kind``: "machine", "environment", "benchmark" (an entry of a slimmed pytest-benchmark file), "round"
(one measurement of a competitor), "failed", "unavailable", "numerics", "kernels", "end_to_end", "choices", "test",
"stage". :func:`as_files` makes from them the files that the reports read.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import tarfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imports PyTorch, which gpu.py does without
    from comparison import Comparison, Results

LIMIT_BYTES = 16_000_000
"""Of a tar file."""
_MARGIN_BYTES = 200_000


class JsonLines:
    """Appends lines to a file; several processes may append to the same one."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def write(self, kind: str, **values: object) -> None:
        line = json.dumps({"kind": kind, "stage": self.stage, "at": round(time.time(), 1)} | values, default=str)
        # One write, so that lines of two processes do not mix.
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")
            if kind != "round":
                os.fsync(file.fileno())


def describe(error: BaseException) -> str:
    """Type, message and the last frames of an error; PyTorch's messages can be pages long."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__}: {str(error)[:1500]}\n{frames[-1500:]}"


def read_lines(path: Path) -> list[dict]:
    """All whole lines; the last one may have been cut."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def entry(group: str, competitor: str, seconds: list[float], **facts: object) -> dict:
    """What the reports read of one competitor."""
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    found = {"median": median, "iqr": q3 - q1, "q1": q1, "q3": q3, "min": min(seconds)}
    numbers = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in facts.items()}
    rounded = {key: float(f"{value:.5g}") for key, value in found.items()}
    return {"group": group, "competitor": competitor, "rounds": len(seconds), "seconds": rounded} | numbers


def write_comparison(results: JsonLines, comparison: Comparison, found: Results, **facts: object) -> None:
    """A line for each competitor of a comparison."""
    for name, times in found.times.items():
        results.write("benchmark", **entry(comparison.group, seconds=times, **found.info[name] | facts))


def benchmarks(lines: Iterable[dict]) -> list[dict]:
    """Entries of all competitors; of a comparison that was cut off, from the rounds that were run."""
    done: dict[tuple[str, str], dict] = {}
    rounds: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        if line["kind"] == "benchmark":
            values = {key: value for key, value in line.items() if key not in ("kind", "stage", "at")}
            done[line["group"], line["competitor"]] = values
        elif line["kind"] == "round":
            rounds.setdefault((line["group"], line["competitor"]), []).append(line["seconds"])
    for (group, competitor), seconds in rounds.items():
        if (group, competitor) not in done:
            done[group, competitor] = entry(group, competitor, seconds, cut_off=True)
    return list(done.values())


def as_files(lines: list[dict]) -> dict[str, str]:
    """The files of a folder of results: ``measured.json`` and ``attention.json`` as ``report.py slim`` leaves them, the
    end to end results, the table of choices, the environment."""
    files, texts = {}, {}
    entries = benchmarks(lines)
    for line in lines:
        if line["kind"] == "machine":
            head = {key: line[key] for key in ("machine", "date", "commit")}
            files["measured.json"] = head | {"benchmarks": [one for one in entries if "device_key" not in one]}
            files["attention.json"] = head | {"benchmarks": [one for one in entries if "device_key" in one]}
        elif line["kind"] == "end_to_end":
            files[f"end-to-end-{line['name']}.json"] = line["found"]
        elif line["kind"] in ("environment", "choices"):
            texts["environment.txt" if line["kind"] == "environment" else "attention_choices.json"] = line["text"]
    return texts | {name: json.dumps(value, indent=1) + "\n" for name, value in files.items()}


def pack_results(out: Path) -> None:
    """``results.tar.gz``: lines, log, and the files made of the lines."""
    with _Tar(out / "results.tar.gz") as tar:
        for name, text in as_files(read_lines(out / "results.jsonl")).items():
            tar.add(name, text.encode())
        for name in ("results.jsonl", "log.txt"):
            tar.add(name, (out / name).read_bytes())


def pack_caches(out: Path, caches: Path) -> None:
    """``caches.tar.gz``: what compilers left, smallest files first; what has no room is compiled again."""
    # Compilers at work rename what begins like this, or remove it.
    found = [path for path in caches.rglob("*") if path.is_file() and not {"tmp", "lock"} & set(path.name.split("."))]
    with _Tar(out / "caches.tar.gz") as tar:
        for _, path in sorted((path.stat().st_size, path) for path in found):
            tar.add(str(path.relative_to(caches)), path.read_bytes())


def unpack_caches(file: Path, caches: Path) -> None:
    caches.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file) as tar:
        tar.extractall(caches, filter="data")


class _Tar:
    """A compressed tar that stays under the limit and takes its name when it is whole."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(f".{path.name}")

    def __enter__(self):
        self.raw = self.partial.open("wb")
        self.tar = tarfile.open(fileobj=self.raw, mode="w:gz", compresslevel=6)
        return self

    def add(self, name: str, content: bytes) -> bool:
        """Whether there was room; random bytes grow no larger than they are."""
        if self.raw.tell() + len(content) + _MARGIN_BYTES > LIMIT_BYTES:
            return False
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = len(content), int(time.time()), 0o755
        self.tar.addfile(member, io.BytesIO(content))
        return True

    def __exit__(self, *error):
        self.tar.close()
        self.raw.close()
        if error[0] is None:
            self.partial.replace(self.path)
        else:
            self.partial.unlink()
