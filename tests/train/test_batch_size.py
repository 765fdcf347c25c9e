"""The global batch is kept whatever the number of processes; batch and accumulation follow, by a trial if asked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmae.cli import main
from fastmae.model import create_model
from fastmae.ops import random_masking
from fastmae.train.batch_size import divide_batch, find_batch_size, measured_batch_size
from fastmae.train.optim import create_optimizer, parameter_groups
from fastmae.train.parallel import Parallelism, parallelize
from fastmae.train.recipes import RECIPES


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4096, 64, 64), (64, 1)),
        ((4096, 32, 64), (64, 2)),  # half the nodes: the same batch, twice the passes
        ((4096, 16, 256), (256, 1)),
        ((4096, 1, None), (4096, 1)),
        ((96, 4, 10), (8, 3)),  # the largest divisor of 24 up to 10
        ((4096, 4096, 64), (1, 1)),
    ],
)
def test_batch_is_the_largest_that_fits(arguments, expected):
    assert divide_batch(*arguments) == expected


def test_batch_holds_all_masks_of_an_image():
    assert divide_batch(96, 2, 20, multiple_of=4) == (16, 3)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 4), st.integers(1, 64))
def test_product_is_the_global_batch(share, world_size, multiple_of, max_batch):
    global_batch = share * world_size * multiple_of
    most = max(max_batch, multiple_of)
    batch, accumulation = divide_batch(global_batch, world_size, most, multiple_of=multiple_of)
    assert batch * accumulation * world_size == global_batch
    assert batch <= most
    assert batch % multiple_of == 0
    larger = range(batch + 1, min(most, global_batch // world_size) + 1)
    assert not [b for b in larger if (global_batch // world_size) % b == 0 and b % multiple_of == 0]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((100, 8), {}, "multiple of 8 for 8 processes, such as 96 or 104, got 100"),
        ((4, 8), {}, "such as 8, got 4"),
        ((96, 8, 4), {"multiple_of": 5}, "multiple of 40 for 8 processes with 5 masks per image, such as 80 or 120"),
        ((96, 8, 2), {"multiple_of": 3}, "max_batch: expected at least 3, got 2"),
        ((96, 8, 0), {}, "max_batch: expected at least 1, got 0"),
        ((0, 8), {}, "global_batch: expected at least 1, got 0"),
        ((8, 0), {}, "world_size: expected at least 1, got 0"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        divide_batch(*arguments, **options)


@given(st.integers(1, 600), st.integers(1, 3), st.floats(0.1, 5), st.floats(0, 50), st.floats(1, 900))
def test_the_trial_finds_the_largest_batch_that_fits_and_never_tries_one_far_beyond(share, masks, slope, fixed, budget):
    tried = []

    def peak(batch: int) -> float:
        tried.append(batch)
        return fixed + slope * batch

    fitting = [b for b in range(masks, share * masks + 1, masks) if (share * masks) % b == 0 and peak(b) <= budget]
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
    assert find_batch_size(107, 1, lambda batch: batch, 10) == 1  # a prime share has no divisor in between


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
    batch, _ = measured_batch_size(replace(config, train=train), model, forward, 5040, lambda value: value)
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
    flags = ["--out", str(run), "--train.num-threads", "1", "--train.global-batch-size", "16"]
    assert main(["pretrain", *flags, "--train.steps", "2", "--train.batch-size", "8"]) == 0
    assert main(["pretrain", *flags, "--resume", "--train.steps", "3", "--train.batch-size", "auto"]) == 0
    out, err = capsys.readouterr()
    assert "3 steps of 2 x 8 images" in out
    assert "batch_size" not in err
    assert json.loads((run / "config.json").read_text())["train"]["batch_size"] == "auto"
    saved = json.loads((run / "checkpoints/step-3/manifest.json").read_text())
    assert saved["config"]["train"]["batch_size"] == 8
