"""Masks: one launch against rand, argsort, argsort, ones and gather; block-wise and grid-wise against plain PyTorch."""

from __future__ import annotations

import plain
import pytest
import torch
from comparison import Comparison, compiled

from fastmae.ops import masking_plain, random_masking

SHAPES = [(4096, 196), (256, 196), (1024, 1024)] if torch.cuda.is_available() else [(256, 64), (256, 196)]
STRATEGY_SHAPES = [(4096, 14), (256, 14), (256, 64)] if torch.cuda.is_available() else [(64, 14)]


def build(n: int, length: int, device: torch.device) -> Comparison:
    keep, ids = length // 4, torch.arange(n, device=device)
    compiled_form = compiled(plain.random_masking)
    return Comparison(
        f"random_masking, N={n} L={length}",
        {
            "fastmae": lambda: random_masking(n, length, 0.75, seed=0, epoch=1, sample_ids=ids),
            "plain": lambda: plain.random_masking(n, length, keep, device),
            "plain-compile": lambda: compiled_form(n, length, keep, device),
        },
        useful_bytes=n * (8 + length * (8 + 8 + 4)),
    )


@pytest.mark.parametrize("competitor", ["fastmae", "plain", "plain-compile"])
@pytest.mark.parametrize(("n", "length"), SHAPES)
def bench_random_masking(compete, device, n, length, competitor):
    compete(build, n, length, device)


def build_strategy(strategy: str, n: int, side: int, device: torch.device) -> Comparison:
    """The plain path draws the same masks, rectangle after rectangle for all samples at once."""
    length, keep, ids = side * side, side * side // 4, torch.arange(n, device=device)

    def plain_path():
        keys = masking_plain.keys_of_rows(n, 0, 1, None, ids, 0, 1, device)
        return masking_plain.draw_masks(keys, length, keep, strategy, side, side)

    options = {"seed": 0, "epoch": 1, "sample_ids": ids, "strategy": strategy, "grid_size": side}
    return Comparison(
        f"{strategy} masking, N={n} L={length}",
        {"fastmae": lambda: random_masking(n, length, 0.75, **options), "plain": plain_path},
        useful_bytes=n * (8 + length * (8 + 8 + 4)),
    )


@pytest.mark.parametrize("competitor", ["fastmae", "plain"])
@pytest.mark.parametrize(("n", "side"), STRATEGY_SHAPES)
@pytest.mark.parametrize("strategy", ["block", "grid"])
def bench_strategies(compete, device, strategy, n, side, competitor):
    compete(build_strategy, strategy, n, side, device)
