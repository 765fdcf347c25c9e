"""What a run measures: precision, batch and number of steps follow from it, and a resumed run keeps them."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import load_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from training import FLAGS, TRAIN, write_images

from fastmae import pretraining
from fastmae.cli import main
from fastmae.data.sampler import batch_positions
from fastmae.model import create_model
from fastmae.ops import random_masking
from fastmae.train import autotune
from fastmae.train import trainer as loop
from fastmae.train.autotune import (
    LAST,
    Speeds,
    StepFit,
    describe_uneven_shares,
    divide_batch,
    find_batch_size,
    measure_products,
    measured_batch_size,
    settle_precision,
    with_saved,
)
from fastmae.train.checkpoint import Ranks
from fastmae.train.config import PretrainConfig, to_json
from fastmae.train.optim import create_optimizer, parameter_groups
from fastmae.train.parallel import Parallelism, parallelize
from fastmae.train.recipes import RECIPES
from fastmae.train.task import MaskedAutoencoding

OLD, NEW = Speeds(fp32=56.0, bf16=1.1), Speeds(fp32=100.0, bf16=200.0)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [24, 1280])
def test_both_rates_are_measured(width):
    state = torch.get_rng_state()
    assert all(0.01 < rate < 1e5 for rate in measure_products(width))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("asked", "device", "first", "expected", "text", "warning"),
    [
        ("auto", CPU, OLD, "fp32", "1.1 GFLOP/s in bf16, 56 in fp32", ""),
        ("auto", CPU, NEW, "bf16", "200 GFLOP/s in bf16, 100 in fp32", ""),
        ("bf16", CPU, OLD, "bf16", "", "--train.precision bf16: matrix products run at 0.02 of fp32's rate"),
        ("bf16", CPU, NEW, "bf16", "", ""),
        *((asked, CUDA, True, "bf16", "", "") for asked in ("auto", "bf16")),
        ("auto", CUDA, False, "fp16", "fp16; this GPU has no bfloat16", ""),
        *((asked, CPU, None, asked, "", "") for asked in ("fp16", "fp32")),
    ],
)
def test_the_first_rank_chooses_the_precision(asked, device, first, expected, text, warning):
    """By speed on a CPU, on a GPU by what it has. What needs no measurement gets none; bf16 that is asked for is kept,
    with a warning where it is slow."""

    class Second(Ranks):
        def first(self, what, function):
            assert first is not None, "measured"
            return first

    config = PretrainConfig(train=replace(TRAIN, precision=asked))
    settled, *found = settle_precision(config, 64, device, Second())
    assert settled.train.precision == expected
    for said, part in zip(found, (text, warning), strict=True):
        assert part in said
        assert bool(part) == bool(said)


# ---- batch size: the global batch is kept whatever the number of processes -------------------------------------------


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
        ((4, 8), "--train.global-batch-size: expected at least 8 for 8 processes, got 4"),
        ((12, 8, None, 2), "expected at least 16 for 8 processes with 2 masks per image, got 12"),
        ((96, 8, 4, 5), "expected a multiple of --train.masks-per-image 5, got 96"),
        ((8, 3, 1), "--train.batch-size: expected at least 2, since 8 do not divide evenly among 3 processes, got 1"),
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
    forward = parallelize(model, Parallelism(device=device), train)
    task = MaskedAutoencoding(replace(config, train=train), model, None, None)
    batch, _ = measured_batch_size(train, task, forward, Ranks())
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
    flags = ["pretrain", *FLAGS.split(), "--out", str(run), "--train.warmup-steps", "1"]
    assert main([*flags, "--train.steps", "2", "--train.batch-size", "4"]) == 0
    assert main([*flags, "--resume", "--train.steps", "3", "--train.batch-size", "auto"]) == 0
    out, err = capsys.readouterr()
    assert "3 steps of 2 x 4 images" in out
    assert "batch_size" not in err
    assert json.loads((run / "config.json").read_text())["train"]["batch_size"] == "auto"
    saved = json.loads((run / "checkpoints/step-3/manifest.json").read_text())
    assert saved["config"]["train"]["batch_size"] == 4


# ---- number of steps -------------------------------------------------------------------------------------------------


class Run:
    """What a fit asks of a trainer."""

    def __init__(self, steps: int, answer: int | None = None) -> None:
        self.step, self.length, self.device = 0, None, torch.device("cpu")
        self.schedule = SimpleNamespace(total_steps=steps)
        self.ranks = SimpleNamespace(first=lambda what, function: function() if answer is None else answer)
        self.config = SimpleNamespace(train=SimpleNamespace(max_minutes=1.0))
        self.console = Console(file=io.StringIO())

    def set_length(self, steps: int) -> None:
        self.length = steps


@pytest.mark.parametrize(
    ("deadline", "steps", "answer", "expected"),
    [
        (1000.0, 5000, None, LAST + 460),  # 0.92 of 500 s, at a second a step
        (1000.0, 300, None, 300),  # never more than the most
        (520.0, 5000, None, LAST + 18),
        (400.0, 5000, None, LAST + 1),  # too late already: it ends
        (1000.0, 5000, 77, 77),  # what the first rank says
    ],
)
def test_the_median_of_steps_after_the_first_decides(monkeypatch, deadline, steps, answer, expected):
    # Ten slow first steps, then a second each; one is disturbed. They end 500 s after the fit began to look.
    pauses = [(500 - 29 - 101) / 10] * 10 + [1.0] * 29 + [101.0]
    ends = itertools.accumulate(pauses)
    monkeypatch.setattr(autotune, "time", SimpleNamespace(monotonic=lambda: next(ends)))
    run, fit = Run(steps, answer), StepFit(deadline)
    for run.step in range(1, LAST + 1):
        assert run.length is None
        fit.after_step(run)
    assert run.length == expected
    assert "1e+03 ms per step: " in run.console.file.getvalue()


def test_the_cosine_ends_with_the_run_and_a_resumed_run_keeps_its_length_and_precision(
    tmp_path, images, monkeypatch, capsys
):
    begun, clock = time.monotonic(), itertools.count(1)
    monkeypatch.setattr(autotune, "time", SimpleNamespace(monotonic=lambda: begun + 500.0 * next(clock)))
    monkeypatch.setattr(autotune, "LAST", 16)
    monkeypatch.setattr(loop, "StepFit", lambda deadline: StepFit(begun + 500.0 * (16 + 15 / 0.92 + 0.1)))
    monkeypatch.setattr(pretraining, "_CROPS", 12)
    monkeypatch.setattr(autotune, "measure_products", lambda width: Speeds(fp32=100.0, bf16=200.0))
    flags = [*FLAGS.split(), "--train.fit-steps", "--train.max-minutes", "100", "--train.keep-checkpoints", "100"]
    flags += ["--train.warmup-steps", "100", "--train.log-every-steps", "1", "--report.picture-every-steps", "None"]
    flags += ["--train.precision", "auto"]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    assert main(["pretrain", "--out", str(run), "--data.path", str(images), *flags]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 16 + 15
    peak = RECIPES["photographs"].train.base_lr * 8 / 256
    rates = [row["lr"] for row in rows]
    assert rates[:16] == pytest.approx([peak * step / 100 for step in range(16)])  # the warm-up that was given
    assert rates[-1] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * 24 / 25)))  # the end of a shorter one's
    saved = {
        step: json.loads((run / f"checkpoints/step-{step}/manifest.json").read_text())["config"]["train"]
        for step in (12, 20, 31)
    }
    lengths = {step: [saved[step][name] for name in ("steps", "warmup_steps", "fit_steps")] for step in saved}
    assert lengths == {12: [240, 100, True], 20: [31, 6, False], 31: [31, 6, False]}

    shutil.copytree(run, resumed)
    for step in (24, 28, 31):
        shutil.rmtree(resumed / f"checkpoints/step-{step}")
    monkeypatch.setattr(autotune, "measure_products", lambda width: Speeds(fp32=56.0, bf16=1.1))  # another machine
    assert main(["pretrain", "--out", str(resumed), "--resume"]) == 0
    one, other = (load_checkpoint(folder / "checkpoints/step-31") for folder in (run, resumed))
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items() if not name.startswith("rng."))
    assert json.loads((resumed / "metrics.jsonl").read_text().splitlines()[-1])["lr"] == rates[-1]
    assert one[1]["config"]["train"]["precision"] == other[1]["config"]["train"]["precision"] == "bf16"
    assert json.loads((resumed / "config.json").read_text())["train"]["precision"] == "auto"
    printed = capsys.readouterr()
    assert "Precision auto: bf16; matrix" in printed.out
    assert printed.out.count("Precision auto") == 1
    assert "run at 0.02 of fp32's rate" in printed.err
    assert "train.precision" not in printed.err.replace("--train.precision", "")


def test_a_resumed_run_keeps_what_it_had_decided_and_decides_the_rest():
    train = replace(TRAIN, precision="auto", batch_size="auto", fit_steps=True, max_minutes=1.0)
    config = PretrainConfig(train=train)
    assert with_saved(config, None, 1) is config
    manifest = {"config": to_json(replace(config, train=replace(train, precision="fp32"))), "world_size": 2}
    assert with_saved(config, manifest, 2).train == replace(train, precision="fp32")
    manifest["config"]["train"] |= {"fit_steps": False, "steps": 7, "warmup_steps": 1, "batch_size": 4}
    found = with_saved(config, manifest, 2).train
    assert (found.steps, found.warmup_steps, found.fit_steps, found.batch_size) == (7, 1, False, 4)
    assert with_saved(config, manifest, 1).train.batch_size == "auto"  # other shares of the global batch
    named = replace(config, train=replace(train, precision="bf16", batch_size=2, fit_steps=False))
    assert with_saved(named, manifest, 2) == named
