"""Reads registers, shared memory, spills and access widths off the code of every kernel for every target; no GPU.

    python benchmarks/count_code.py

compiles for a few minutes and writes ``benchmarks/results/counted/code.json`` and ``docs/code.md`` from it. The numbers
belong to the version of Triton, and so of the assemblers that come with it, in the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import triton

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from code_cases import LINES, compiled  # noqa: E402
from cross_compile import SHARED_LIMIT, TARGETS, Compiled  # noqa: E402

RESULT, PAGE = ROOT / "benchmarks/results/counted/code.json", ROOT / "docs/code.md"


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


def table(lines: dict, cell) -> str:
    rows = [f"| kernel | {' | '.join(TARGETS)} |", f"| --- |{' ---: |' * len(TARGETS)}"]
    rows += [f"| {name} | {' | '.join(cell(found[target]) for target in TARGETS)} |" for name, found in lines.items()]
    return "\n".join(rows)


def _resources(found: dict) -> str:
    spilled = found["spills"] or found["stack"]
    return f"{found['registers']} / {found['shared']:,}" + (f", **{found['spills']} spills**" if spilled else "")


def _accesses(found: dict) -> str:
    load, store = (", ".join(f"{n} x {bits}" for bits, n in found[key].items()) or "-" for key in ("loads", "stores"))
    return f"{load} / {store}"


def page(results: dict) -> str:
    lines = results["lines"]
    cells = [found for targets in lines.values() for found in targets.values()]
    spilled = sum(1 for found in cells if found["spills"] or found["stack"])
    limits = ", ".join(f"{SHARED_LIMIT[target] >> 10} KiB on {target}" for target in TARGETS)
    return f"""# The code of the kernels

Read, not measured, and without a GPU: `python benchmarks/count_code.py` writes this page from code that Triton
{results["triton"]} compiles for each target, with block shapes, strides and alignment of real calls of the ops. Shapes
are those of training ViT-B/16 in bf16 where nothing else is said; attention is "tokens of channels a head". A test
holds every line to bounds (`tests/code_cases.py`), save for the forward of attention with 197 keys and more on gfx942,
which takes LLVM half a minute each: these are read for this page alone.

**{spilled} of {len(cells)} spill or use a stack.**

## Registers a thread, and bytes of shared memory a block

**Lower is better.** At most 255 registers (gfx942: 512) and, of shared memory,
{limits}.

{table(lines, _resources)}

## Accesses to global memory

Instructions by width in bits, **wider is better**: loads / stores. Not weighted by how often they run. Bulk data moves
in 128 bits; narrower are indices, numbers that there is one of a row, and parameters; on gfx942 also the stores of
attention and of the mask token's partial sums. What gfx942 loads into scalar registers is not listed.

{table(lines, _accesses)}
"""


def main() -> None:
    results = count_all()
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
