"""Reads registers, shared memory, spills and access widths off the code of every kernel for every target; no GPU.

    python benchmarks/count_code.py

compiles for a few minutes and writes ``benchmarks/results/counted/code.json``. The numbers belong to the version of
Triton, and so of the assemblers that come with it, in the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import triton

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]

from code_cases import LINES, compiled  # noqa: E402
from cross_compile import TARGETS, Compiled  # noqa: E402

RESULT = ROOT / "benchmarks/results/counted/code.json"


def numbers(code: Compiled) -> dict[str, object]:
    """What is published of a compiled kernel; widths in bits by number of instructions, as text for JSON's sake."""
    loads, stores = ({str(bits): n for bits, n in sorted(accesses.items())} for accesses in (code.loads, code.stores))
    return {
        "registers": code.registers,
        "shared": code.shared,
        "stack": code.stack,
        "spills": code.spills,
        "loads": loads,
        "stores": stores,
    }


def count_all() -> dict:
    lines = {}
    for name in LINES:
        lines[name] = {target: numbers(compiled(name, target)) for target in TARGETS}
        print(name, file=sys.stderr)
    return {"triton": triton.__version__, "lines": lines}


def main() -> None:
    results = count_all()
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
