"""Random masks: one launch against rand, argsort, argsort, ones and gather."""

from __future__ import annotations

import pytest
import torch

from fastmae.ops.masking import random_masking

SHAPES = [(4096, 196), (1024, 1024)] if torch.cuda.is_available() else [(256, 64), (256, 196)]


def facebookresearch(n, length, ratio, device):
    """The expression of facebookresearch/mae, without the gather of the tokens."""
    kept = int(length * (1 - ratio))
    shuffle = torch.rand(n, length, device=device).argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    mask = torch.ones(n, length, device=device)
    mask[:, :kept] = 0
    return shuffle[:, :kept], shuffle[:, kept:], restore, mask.gather(1, restore)


@pytest.mark.parametrize("how", ["fastmae", "torch", "torch.compile"])
@pytest.mark.parametrize(("n", "length"), SHAPES)
def bench_random_masking(benchmark, device, synchronized, n, length, how):
    benchmark.group = f"random_masking N={n} L={length}"
    if how == "fastmae":
        ids = torch.arange(n, device=device)

        def step():
            return random_masking(n, length, 0.75, seed=0, epoch=1, sample_ids=ids)
    else:
        draw = torch.compile(facebookresearch) if how == "torch.compile" else facebookresearch

        def step():
            return draw(n, length, 0.75, device)

    step()
    benchmark.extra_info |= {"how": how, "useful_bytes": n * length * (8 + 8 + 4)}
    benchmark(synchronized(step))
