"""The global batch is kept whatever the number of processes; batch and accumulation follow, by a trial if asked."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrain_flags import FLAGS

from fastmae.cli import main
from fastmae.data.sampler import batch_positions
from fastmae.model import create_model
from fastmae.ops import random_masking
from fastmae.train.batch_size import describe_uneven_shares, divide_batch, find_batch_size, measured_batch_size
from fastmae.train.optim import create_optimizer, parameter_groups
from fastmae.train.parallel import Parallelism, parallelize
from fastmae.train.ranks import Ranks
from fastmae.train.recipes import RECIPES


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4096, 56, 256), (74, 1)),  # a node fewer: 8 take 74 and 48 take 73
        ((4096, 1, None), (4096, 1)),
        ((15, 1, 4), (3, 5)),  # five equal passes rather than four
        ((8, 3), (3, 1)),
        ((28, 2, 8, 4), (8, 2)),  # seven images with four masks each: four for one, three for the other
    ],
)
def test_passes_are_few_and_equal(arguments, expected):
    assert divide_batch(*arguments) == expected


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(1, 12), st.integers(1, 32), st.integers(0, 3), st.integers(0, 500))
def test_ranks_and_passes_divide_every_step_into_consecutive_parts(images, world_size, max_batch, step, position):
    images = max(images, world_size)
    max_batch = max(max_batch, 1 + (images % world_size > 0))
    batch, accumulation = divide_batch(images, world_size, max_batch)
    own = {"batch_size": batch, "position": position, "world_size": world_size, "total": images}
    parts = [
        [batch_positions(step * accumulation + number, rank=rank, **own) for rank in range(world_size)]
        for number in range(accumulation)
    ]
    first = position + step * images
    assert np.array_equal(np.concatenate([part for ranks in parts for part in ranks]), np.arange(first, first + images))
    sizes = np.array([[len(part) for part in ranks] for ranks in parts])
    assert sizes.max() == batch <= max_batch
    assert sizes.min() >= max(1, batch - 1)
    assert np.ptp(sizes.sum(0)) <= 1
    fewest = -(-images // (world_size * max_batch))
    assert accumulation == fewest or (accumulation < 2 * fewest and np.ptp(sizes) == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 8), "global_batch: expected at least 8 for 8 processes, got 4"),
        ((12, 8, None, 2), "global_batch: expected at least 16 for 8 processes with 2 masks per image, got 12"),
        ((96, 8, 4, 5), "global_batch: expected a multiple of 5 with 5 masks per image, got 96"),
        ((96, 8, 2, 3), "max_batch: expected at least 3 with 3 masks per image, got 2"),
        ((8, 3, 1), "max_batch: expected at least 2, since 8 do not divide evenly among 3 processes, got 1"),
        ((96, 8, 0), "max_batch: expected at least 1, got 0"),
        ((0, 8), "global_batch: expected at least 1, got 0"),
        ((8, 0), "world_size: expected at least 1, got 0"),
    ],
)
def test_fewer_images_than_processes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        divide_batch(*arguments)


def test_uneven_shares_are_described():
    assert describe_uneven_shares(4096, 64) is None
    assert "8 of them take 74 and 48 take 73" in describe_uneven_shares(4096, 56)
    assert "take 16 and 1 take 12" in describe_uneven_shares(28, 2, masks_per_image=4)


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(1, 3), st.floats(0.1, 5), st.floats(0, 50), st.floats(1, 900))
def test_the_trial_finds_the_largest_batch_that_fits_and_never_tries_one_far_beyond(share, masks, slope, fixed, budget):
    tried = []

    def peak(batch: int) -> float:
        tried.append(batch)
        return fixed + slope * batch

    sizes = {divide_batch(share, 1, most)[0] * masks for most in range(1, share + 1)}
    fitting = [size for size in sorted(sizes) if peak(size) <= budget]
    tried.clear()
    if not fitting:
        with pytest.raises(ValueError, match=r"--train.batch-size: auto found no room for one image: .*fsdp"):
            find_batch_size(share * masks, masks, peak, budget)
        return
    assert find_batch_size(share * masks, masks, peak, budget) in fitting[-2:]  # the slope is rounded
    assert max(tried) <= max(fitting[-1], 8 * masks)
    assert len(tried) <= 4


def test_a_batch_that_takes_more_than_two_small_ones_suggest_gives_way_to_a_smaller_one():
    jumps = lambda batch: batch if batch < 64 else 3 * batch  # noqa: E731
    assert find_batch_size(256, 1, jumps, 200) == 64
    assert find_batch_size(256, 1, jumps, 150) == 32
    assert find_batch_size(256, 1, lambda batch: batch if batch < 100 else float("inf"), 1000) == 64
    assert find_batch_size(107, 1, lambda batch: batch, 10) == 10  # eleven passes, of ten or nine images


@pytest.mark.gpu
@pytest.mark.parametrize("activation_checkpointing", ["none", "full"])
def test_what_the_trial_finds_fits_a_step_and_fills_the_memory(activation_checkpointing):
    device, config = torch.device("cuda", 0), RECIPES["imagenet-vit-b"]
    train = replace(config.train, precision="bf16", global_batch_size=5040)
    train = replace(train, activation_checkpointing=activation_checkpointing)
    model = create_model(**config.model_arguments())
    forward = parallelize(
        model, Parallelism(device=device), seed=0, activation_checkpointing=activation_checkpointing, precision="bf16"
    )
    batch, _ = measured_batch_size(replace(config, train=train), model, forward, Ranks())
    optimizer = create_optimizer(parameter_groups(model, 0.05), train)
    torch.cuda.reset_peak_memory_stats()
    images = torch.zeros(batch, 3, 224, 224, dtype=torch.uint8, device=device)
    masking = random_masking(batch, model.num_patches, 0.75, seed=0, device=device)
    for _ in range(2):
        with model.cast_weights(torch.bfloat16), torch.autocast("cuda", torch.bfloat16):
            loss = forward(images, masking=masking, full_pred=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    total = torch.cuda.get_device_properties(device).total_memory
    assert 0.6 * total < torch.cuda.max_memory_allocated() < 0.97 * total or batch == 5040


def test_pretrain_keeps_the_batch_of_the_checkpoint_that_it_resumes(tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*FLAGS, "--out", str(run), "--train.warmup-steps", "1"]
    assert main([*flags, "--train.steps", "2", "--train.batch-size", "4"]) == 0
    assert main([*flags, "--resume", "--train.steps", "3", "--train.batch-size", "auto"]) == 0
    out, err = capsys.readouterr()
    assert "3 steps of 2 x 4 images" in out
    assert "batch_size" not in err
    assert json.loads((run / "config.json").read_text())["train"]["batch_size"] == "auto"
    saved = json.loads((run / "checkpoints/step-3/manifest.json").read_text())
    assert saved["config"]["train"]["batch_size"] == 4
