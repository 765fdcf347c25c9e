"""Counts what each op moves through memory, next to eager and compiled PyTorch; needs no GPU and measures no time.

    python benchmarks/count_traffic.py

writes ``benchmarks/results/counted/traffic.json`` and ``docs/traffic.md`` from it. The numbers are the same on every
machine; those of ``torch.compile`` belong to the version of PyTorch in the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from traffic import SECTOR, Moved, counted_traffic  # noqa: E402
from traffic_cases import OPS, Op  # noqa: E402
from traffic_compiled import compiled_traffic  # noqa: E402
from traffic_eager import EagerTraffic  # noqa: E402
from traffic_inputs import VIT_B, VIT_H, VIT_L, Sizes, gradient_of  # noqa: E402

RESULT, PAGE = ROOT / "benchmarks/results/counted/traffic.json", ROOT / "docs/traffic.md"
MODELS = {"ViT-B/16": VIT_B, "ViT-L/16": VIT_L, "ViT-H/14": VIT_H}
# What hangs on the encoder's width: the rest of ViT-L is that of ViT-B.
ENCODER = ("gather_tokens", "norm_linear", "gelu_linear", "attention, encoder")
# An image's share is the difference between these two batches: what is read once a launch drops out.
SMALL, LARGE = 2, 4


def count_ours(op: Op, sizes: Sizes) -> dict[str, int]:
    """Totals of a batch, counted in Triton's interpreter, and the small PyTorch operators around the kernels."""
    call = op.make(sizes)
    with counted_traffic() as traffic, EagerTraffic() as around:
        call()
    moved = [*traffic.reads().items(), *traffic.writes().items()]
    total = sum((m for _, m in moved), Moved())
    return {
        "budget": sum(op.reads(sizes).values()) + sum(op.writes(sizes).values()),
        "bytes": sum(m.unique if name in op.tables else m.accessed for name, m in moved),
        "from cache": sum(m.accessed - m.unique for name, m in moved if name in op.tables),
        "sector bytes": SECTOR * total.sectors,
        "kernels": len(traffic.launches),
        "operators around": around.launches - sum(around.launches_by_op[name] for name in PRODUCTS),
    }


def count_eager(op: Op, sizes: Sizes) -> dict[str, int]:
    function, arguments = op.eager(sizes)
    call = lambda: function(*arguments)  # noqa: E731
    if op.backward:
        call = gradient_of(call(), *(a for a in arguments if a.requires_grad))
    with EagerTraffic() as traffic:
        call()
    return {"bytes": traffic.bytes, "launches": traffic.launches}


def count_compiled(op: Op, sizes: Sizes) -> dict[str, int]:
    function, arguments = op.eager(sizes)
    scheduled = compiled_traffic(function, *arguments)[op.backward]
    return {"bytes": scheduled.bytes, "launches": scheduled.launches}


PRODUCTS = ("aten.mm.default", "aten.addmm.default")
COUNTERS = {"fastmae": count_ours, "eager": count_eager, "compiled": count_compiled}


def count(name: str, sizes: Sizes, who: str) -> dict[str, float]:
    """Of one op: bytes an image, bytes once a launch, and launches."""
    torch.manual_seed(0)
    small, large = (COUNTERS[who](OPS[name], sizes._replace(N=n)) for n in (SMALL, LARGE))
    found: dict[str, float] = {}
    for key in small:
        if key in ("kernels", "launches", "operators around"):
            found[key] = large[key]
        else:
            found[key] = (large[key] - small[key]) / (LARGE - SMALL)
            if key in ("budget", "bytes"):
                found[f"{key} once"] = large[key] - LARGE * found[key]
    return found


def count_all() -> dict:
    results = {}
    for model, sizes in MODELS.items():
        names = [n for n in OPS if model != "ViT-L/16" or n.startswith(ENCODER)]
        results[model] = {name: {who: count(name, sizes, who) for who in COUNTERS} for name in names}
        print(f"{model}: {len(names)} ops counted", file=sys.stderr)
    return {"torch": torch.__version__.split("+")[0], "models": results}


def table(ops: dict) -> str:
    lines = [
        "| op | budget | fastmae | in sectors | launches | eager | launches | torch.compile | launches |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in ops.items():
        ours, eager, compiled = (found[who] for who in COUNTERS)
        around = f" + {ours['operators around']}" if ours["operators around"] else ""
        kilobytes = (f"{v / 1e3:,.1f}" for v in (ours["budget"], ours["bytes"], ours["sector bytes"]))
        others = (
            f"{o['bytes'] / 1e3:,.1f} ({o['bytes'] / ours['bytes']:.1f}x) | {o['launches']}" for o in (eager, compiled)
        )
        lines.append(f"| {name} | {' | '.join(kilobytes)} | {ours['kernels']}{around} | {' | '.join(others)} |")
    return "\n".join(lines)


def page(results: dict) -> str:
    tables = "\n\n".join(f"### {model}\n\n{table(ops)}" for model, ops in results["models"].items())
    return f"""# What the ops move through memory

Counted, not timed, and without a GPU: `python benchmarks/count_traffic.py` writes this page. Training shapes: 224 x 224
pixels, three quarters of the patches masked, uint8 images channels last, bf16 activations, 512-wide decoder.
**Kilobytes (1,000 bytes) an image, lower is better**; in brackets how many times what fastmae moves.

{tables}

ViT-L/16 is listed where it differs from ViT-B/16.

Of `norm_linear` and `gelu_linear` everything but the matrix products is counted, on all sides: eager and compiled are
the add, the norm or the activation alone, and in their backward the bias's gradient too. Of attention the products
count, on all sides; it is the Triton backend, packed, in float16 for bfloat16. Its forward is split by queries, and
every part reads all keys and values. With Hopper's tiles, which are counted, that is four times in the decoders of
ViT-B and L, and twice and five times in the encoder and the decoder of ViT-H. The budget has them once.

- **budget**: the bytes that the op's definition makes it move, a formula of the sizes (`tests/traffic_cases.py`).
- **fastmae**: what the kernels really loaded and stored, seen access by access in Triton's interpreter. Something read
  twice counts twice, except small tables that many programs share (indices, mean and std, the mask token,
  positions): these count once a launch, since a cache serves the rest. What is read once a launch, whatever the batch
  size, is no image's share and is left out (at most the position table, {_positions(results):,.0f} kB).
- **in sectors**: distinct 32-byte sectors, what DRAM can deliver no less than. A patch's row of 48 bytes touches two.
- **launches**: our kernels, then the operators on small tensors around them, such as the last sum of partial sums.
- **eager**: the same result written in plain PyTorch as facebookresearch/mae does, every operator charged its inputs
  and outputs; views are free, and gathering is charged what it picks. A lower bound.
- **torch.compile**: the same function scheduled by Inductor (torch {results["torch"]}) with its rules for Triton, on
  the CPU and without running it; its own count of the buffers that each kernel touches. A lower bound too: rows that do
  not fit a block are read once a pass, and a sum over everything takes a second launch on a GPU.
"""


def _positions(results: dict) -> float:
    return max(f["fastmae"]["bytes once"] for ops in results["models"].values() for f in ops.values()) / 1e3


def main() -> None:
    from fastmae.ops import _dispatch

    if not _dispatch.is_interpreted():
        subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
        return
    results = count_all()
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
