"""The table of docs/surviving.md, from the result of ``soak.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "surviving.md"
BEGIN, END = "<!-- written by tests/soak.py -->", "<!-- end of what tests/soak.py writes -->"
SAME = "the same weights, losses and samples"
"""The verdict that there has to be."""
_NAMES = {"none": "one process", "ddp": "two, DDP", "fsdp": "two, FSDP"}


def table(result: dict[str, Any]) -> str:
    """What is written of a result: a table by mode, and a sentence."""
    lines = ["| processes | rounds | kills | steps done again |", "|---|---|---|---|"]
    for mode, name in _NAMES.items():
        rounds = [entry for entry in result["rounds"] if entry["mode"] == mode]
        again = sum(entry["steps_done_again"] for entry in rounds)
        lines.append(f"| {name} | {len(rounds)} | {sum(entry['kills'] for entry in rounds)} | {again:,} |")
    by, survivors, versions = result["by"], result["survivors"], result["versions"]
    made = survivors["SIGTERM"] + survivors["SIGKILL"]
    minutes, slowest = result["seconds"] / 60, result["slowest_survivor_seconds"]
    text = (
        f"{result['kills']} kills in {minutes:.0f} minutes on {result['machine']['cores']} cores: {by['while_saving']} "
        f"while a checkpoint was being written, {by['starting_up']} before the first step, {by['one_of_two']} of one "
        f"process of two. Of those that were left and trained, {survivors['by themselves']} ended by themselves, the "
        f"slowest after {slowest:.1f} s, and {made} had to be ended as a launcher does. Verdict: {result['verdict']} "
        f"(fastmae {versions['fastmae']}, PyTorch {versions['torch']})."
    )
    return "\n".join([*lines, "", text])


def write_page(result: dict[str, Any]) -> None:
    """Put the table between its markers."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(result)}\n\n{END}{rest.split(END)[1]}")
