"""Counts what each op moves through memory, next to eager and compiled PyTorch; needs no GPU and measures no time.

    python benchmarks/count_traffic.py

writes ``benchmarks/results/counted/traffic.json``; ``report.py`` puts it into docs/counted.md. The numbers are the same
on every machine; those of ``torch.compile`` belong to the version of PyTorch in the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]

from traffic import SECTOR, EagerTraffic, Moved, compiled_traffic, counted_traffic  # noqa: E402
from traffic_cases import OPS, VIT_B, VIT_H, VIT_L, Op, Sizes  # noqa: E402

RESULT = ROOT / "benchmarks/results/counted/traffic.json"
MODELS = {"ViT-B/16": VIT_B, "ViT-L/16": VIT_L, "ViT-H/14": VIT_H}
# What depends on the encoder's width: the rest of ViT-L is that of ViT-B.
ENCODER = ("gather_tokens", "norm_linear", "gelu_linear", "attention, encoder")
# An image's share is the difference between these two batches: what is read once a launch drops out.
SMALL, LARGE = 2, 4


def count_ours(op: Op, sizes: Sizes) -> dict[str, int]:
    """Totals of a batch, counted in Triton's interpreter, and the small PyTorch operators around the kernels."""
    call = op.call(sizes)
    with counted_traffic() as traffic, EagerTraffic() as around:
        call()
    moved = [*traffic.reads.items(), *traffic.writes.items()]
    total = sum((m for _, m in moved), Moved())
    return {
        "budget": sum(op.reads(sizes).values()) + sum(op.writes(sizes).values()),
        "bytes": sum(m.unique if name in op.tables else m.accessed for name, m in moved),
        "from cache": sum(m.accessed - m.unique for name, m in moved if name in op.tables),
        "sector bytes": SECTOR * total.sectors,
        "kernels": traffic.launches,
        "operators around": around.launches - sum(around.launches_by_op[name] for name in PRODUCTS),
    }


def count_eager(op: Op, sizes: Sizes) -> dict[str, int]:
    call = op.call(sizes, plain=True)
    with EagerTraffic() as traffic:
        call()
    return {"bytes": traffic.bytes, "launches": traffic.launches}


def count_compiled(op: Op, sizes: Sizes) -> dict[str, int]:
    _, plain, inputs = op.pair(sizes)
    scheduled = compiled_traffic(plain, *inputs)[op.backward]
    return {"bytes": scheduled.bytes, "launches": scheduled.launches}


PRODUCTS = ("aten.mm.default", "aten.addmm.default")
COUNTERS = {"fastmae": count_ours, "eager": count_eager, "compiled": count_compiled}


def count(name: str, sizes: Sizes, who: str) -> dict[str, float]:
    """Of one op: bytes per image, bytes once per launch, and launches."""
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


def main() -> None:
    from fastmae.ops import _dispatch

    if not _dispatch.is_interpreted():
        subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
        return
    results = count_all()
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
