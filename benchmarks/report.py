"""Committed results to docs/benchmarks.md, the README's table and figures. Nothing in them is typed by hand.

    python benchmarks/report.py slim benchmarks/results/<machine>/*.json   # what is worth committing of a run
    python benchmarks/report.py write                                      # pages and figures from what is committed

A result is a file of ``pytest benchmarks/... --benchmark-json=FILE`` in ``benchmarks/results/<machine>/``, slimmed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from report_results import FIGURES, RESULTS, ROOT, load, slim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("slim", help="keep of pytest-benchmark's files what is worth committing")
    one.add_argument("files", nargs="+", type=Path)
    commands.add_parser("write", help="docs/benchmarks.md, the README's table, docs/figures")
    arguments = parser.parse_args()
    if arguments.command == "slim":
        for path in arguments.files:
            path.write_text(json.dumps(slim(json.loads(path.read_text())), indent=1) + "\n")
        return
    from report_figures import draw  # takes matplotlib, which slimming on a GPU machine does without
    from report_pages import pages

    machines = load(RESULTS)
    for machine in machines:
        draw(machine, ROOT / FIGURES)
    for path, text in pages(machines, ROOT).items():
        (ROOT / path).write_text(text)


if __name__ == "__main__":
    main()
