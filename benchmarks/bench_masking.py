"""Masks: one launch against rand, argsort, argsort, ones, gather; block-wise and grid-wise against the plain path."""

from __future__ import annotations

import op_benchmark as op
import torch

from fastmae.ops import masking_plain, random_masking

# (name, N, L); for strategies (name, N, side, strategy)
SHAPES, STRATEGIES = [(256, 64), (256, 196)], [(64, 14)]
if op.CUDA:
    SHAPES, STRATEGIES = [(4096, 196), (256, 196), (1024, 1024)], [(4096, 14), (256, 14), (256, 64)]
SHAPES = [(f"N={n} L={length}", n, length) for n, length in SHAPES]
STRATEGIES = [(f"N={n} L={s * s}", n, s, strategy) for strategy in ("block", "grid") for n, s in STRATEGIES]


def make(shape: tuple, device: torch.device, dtype: torch.dtype) -> op.OpCase:
    name, n, length = shape
    keep, ids = length // 4, torch.arange(n, device=device)

    def plain():
        shuffle = torch.rand(n, length, device=device).argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        mask = torch.ones(n, length, device=device)
        mask[:, :keep] = 0
        return shuffle[:, :keep], shuffle[:, keep:], restore, mask.gather(1, restore)

    ours = lambda: random_masking(n, length, 0.75, seed=0, epoch=1, sample_ids=ids)  # noqa: E731
    calls = {"fastmae": ours, "plain": plain, "plain-compile": plain}
    return op.OpCase("random_masking", name, {}, calls, moved=(n * (8 + length * (8 + 8 + 4)), 0))


def make_strategy(shape: tuple, device: torch.device, dtype: torch.dtype) -> op.OpCase:
    """The plain path draws the same masks, rectangle after rectangle for all samples at once."""
    name, n, side, strategy = shape
    length, ids = side * side, torch.arange(n, device=device)

    def plain():
        keys = masking_plain.keys_of_rows(n, 0, 1, None, ids, 0, 1, device)
        return masking_plain.draw_masks(keys, length, length // 4, strategy, side, side)

    options = {"seed": 0, "epoch": 1, "sample_ids": ids, "strategy": strategy, "grid_size": side}
    calls = {"fastmae": lambda: random_masking(n, length, 0.75, **options), "plain": plain}
    return op.OpCase(f"{strategy} masking", name, {}, calls, moved=(n * (8 + length * (8 + 8 + 4)), 0))


bench_random_masking = op.op_benchmark(make, SHAPES, directions=("",))
bench_strategies = op.op_benchmark(make_strategy, STRATEGIES, ("fastmae", "plain"), directions=("",))
