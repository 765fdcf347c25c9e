"""Random masks: one launch against rand, argsort, argsort, ones and gather."""

from __future__ import annotations

import plain
import pytest
import torch
from contest import Contest

from fastmae.ops import random_masking

SHAPES = [(4096, 196), (256, 196), (1024, 1024)] if torch.cuda.is_available() else [(256, 64), (256, 196)]


def build(n: int, length: int, device: torch.device) -> Contest:
    keep, ids = length // 4, torch.arange(n, device=device)
    compiled = torch.compile(plain.random_masking)
    return Contest(
        f"random_masking, N={n} L={length}",
        {
            "fastmae": lambda: random_masking(n, length, 0.75, seed=0, epoch=1, sample_ids=ids),
            "plain": lambda: plain.random_masking(n, length, keep, device),
            "plain-compile": lambda: compiled(n, length, keep, device),
        },
        useful_bytes=n * (8 + length * (8 + 8 + 4)),
    )


@pytest.mark.parametrize("competitor", ["fastmae", "plain", "plain-compile"])
@pytest.mark.parametrize(("n", "length"), SHAPES)
def bench_random_masking(compete, device, n, length, competitor):
    compete(build, n, length, device)
