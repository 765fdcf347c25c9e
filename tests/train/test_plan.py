"""``fastmae plan``: FLOPs, activations and traffic are those that counting finds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from collective_bytes import pretended, sent_in_a_step
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmae.cli import main
from fastmae.model import MaskedAutoencoderViT, create_model
from fastmae.ops import random_masking
from fastmae.train.config import TrainConfig
from fastmae.train.flops import count_flops
from fastmae.train.plan import Hardware, PlanConfig, activation_bytes, make_plan, passes_per_image, sent_per_step
from fastmae.train.recipes import RECIPES

ROOT = Path(__file__).parents[2]
SIZES = {
    "img_size": (32, 32), "patch_size": (8, 8), "in_chans": 3, "embed_dim": 256, "depth": 2, "num_heads": 2,
    "decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 2,
}  # fmt: skip


def on_meta(name):
    with torch.device("meta"):
        return create_model(name)


@pytest.fixture(scope="module")
def base():
    return on_meta("mae_vit_base_patch16")


@pytest.mark.parametrize(("decoder_depth", "channels", "ratio", "batch"), [(1, 3, 0.75, 2), (3, 5, 0.3, 3)])
def test_flops_are_those_of_a_real_step(decoder_depth, channels, ratio, batch):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 4}
    model = MaskedAutoencoderViT(
        (32, 48), (8, 4), channels, decoder_depth=decoder_depth, mlp_ratio=3.0, attention="sdpa", **sizes
    )
    images = torch.randint(0, 256, (batch, channels, 32, 48), dtype=torch.uint8)
    masking = random_masking(batch, model.num_patches, ratio, seed=0)
    # PyTorch's fused backward computes scores again; FLOPs count what has to be computed.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images, masking=masking, full_pred=False).loss.backward()
    assert count_flops(model.architecture, batch, ratio) == counter.get_total_flops()


def test_flops_of_vit_b_are_the_formula_s(base):
    rows = [(50, 768)] * 12 + [(197, 512)] * 8
    products = sum(2 * n * 12 * d * d + 4 * n * n * d for n, d in rows) + 2 * (50 * 768 * 512 + 147 * 512 * 768)
    # What the decoder skips: queries and MLP of 50 visible rows in the last block, mask tokens in the first.
    skipped = 50 * (2 * 10 * 512**2 + 4 * 197 * 512) + 147 * 2 * 3 * 512**2
    pixels = 2 * 49 * 768 * 768  # they need no gradient
    assert plan(base)["flops_per_image"] == 3 * (products - skipped) + 2 * pixels


def test_activation_checkpointing_costs_flops_and_saves_activations(base):
    kinds = ("none", "selective", "full")
    plans = [plan(base, activation_checkpointing=kind) for kind in kinds]
    products = [one["seconds"]["matrix products"] for one in plans]
    assert [round(seconds / products[0] - 1, 2) for seconds in products] == [0, 0.09, 0.22]
    kept = [activation_bytes(base, 0.75, 2, 4, kind)[0] for kind in kinds]
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("name", ["ViT-B/16", "ViT-L/16"])
def test_bytes_of_an_image_are_close_to_the_committed_count(name):
    counted = json.loads((ROOT / "benchmarks/results/counted/step.json").read_text())
    model = on_meta({"ViT-B/16": "mae_vit_base_patch16", "ViT-L/16": "mae_vit_large_patch16"}[name])
    ours = counted["models"][name]["fastmae, triton"]
    assert activation_bytes(model, 0.75)[0] / 1e6 == pytest.approx(ours["saved"], rel=0.03)
    # The count has matrix products' operands too, which the time of the products covers.
    assert 0.5 < passes_per_image(model, 0.75) / 1e6 / (ours["forward"] + ours["backward"]) < 0.7


@pytest.mark.parametrize(
    ("mode", "gpus", "accumulation", "reshard"),
    [("fsdp", 8, 1, True), ("fsdp", 64, 2, False), ("hsdp", 64, 2, True)],
)
def test_bytes_sent_are_those_of_real_collectives(monkeypatch, mode, gpus, accumulation, reshard):
    with pretended(gpus, 8, monkeypatch):
        measured = sent_in_a_step(mode, SIZES, accumulation, reshard)
    train = TrainConfig(precision="bf16", reshard_after_forward=reshard)
    planned = sent_per_step(MaskedAutoencoderViT(**SIZES, seed=0), train, mode, gpus, min(gpus, 8), accumulation)
    # FSDP cuts whole rows, so that small tensors are padded up to the number of processes.
    assert measured == pytest.approx(planned, rel=0.03 if gpus <= 8 else 0.1)


def plan(model, mode="ddp", gpus=8, memory_gb=80, **train):
    recipe = RECIPES["imagenet-vit-b"]
    config = replace(recipe, train=replace(recipe.train, **train))
    return make_plan(config, model, mode, PlanConfig(gpus=gpus, hardware=Hardware(memory_gb=memory_gb)))


def test_more_memory_fits_more_and_shards_need_less(base):
    fit = [plan(base, memory_gb=gb)["batch"]["images at a time that fit"] for gb in (2, 16, 24, 80)]
    assert fit[0] == 0 < fit[1] < fit[2] < fit[3]
    ddp, fsdp = plan(base), plan(base, "fsdp")
    assert fsdp["memory"]["AdamW"] == ddp["memory"]["AdamW"] / 8
    accumulating = plan(base, "fsdp", memory_gb=8)
    assert accumulating["batch"]["micro-batches per step"] > 1
    assert accumulating["memory"]["gradients"] == ddp["memory"]["gradients"]
    scattered = plan(base, "fsdp", memory_gb=8, reduce_every="micro-batch")
    assert scattered["memory"]["gradients"] == fsdp["memory"]["gradients"]
    assert (
        scattered["sent"]["reduce-scatter"]
        == scattered["batch"]["micro-batches per step"] * fsdp["sent"]["reduce-scatter"]
    )
    assert plan(base, reduce_dtype="bf16")["sent"]["all-reduce"] == ddp["sent"]["all-reduce"] / 2


def test_the_gpu_with_the_largest_share_sets_the_pace(base):
    even, uneven = plan(base, gpus=8, global_batch_size=64), plan(base, gpus=7, global_batch_size=64)
    assert uneven["batch"]["images at a time"] == 10
    assert uneven["seconds"]["matrix products"] == 10 / 8 * even["seconds"]["matrix products"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "12"], "--gpus: expected whole nodes of 8 or part of one, got 12"),
        (
            ["--gpus", "6", "--train.global-batch-size", "4", "--train.batch-size", "4"],
            "--train.global-batch-size: expected at least 6 for 6 processes, got 4",
        ),
        (["--train.batch-size", "0"], "--train.batch-size: expected a positive number, got 0"),
        (["--train.parallel", "none"], "--train.parallel: expected ddp, fsdp or hsdp for 8 GPUs, got none"),
    ],
)
def test_impossible_plans_are_refused(flags, message, capsys):
    assert main(["plan", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_page_shows_what_the_command_prints(capsys):
    page = (ROOT / "docs/scaling.md").read_text()
    flags, shown = re.search(r"```\n\$ fastmae plan ?(.*)\n\n((?:.|\n)*?)```", page).groups()
    assert main(["plan", *flags.split()]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "\n".join(lines) + "\n" == shown
