"""``fastmae plan``: what it says of a model and of the processes' traffic is what counting finds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from collective_bytes import pretended, sent_in_a_step
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmae.cli import main
from fastmae.model import MaskedAutoencoderViT, create_model
from fastmae.ops import random_masking
from fastmae.train.flops import count_flops
from fastmae.train.plan import Hardware, kept_per_image, make_plan, passes_per_image, sent_per_step

ROOT = Path(__file__).parents[2]
SIZES = {
    "img_size": (32, 32), "patch_size": (8, 8), "in_chans": 3, "embed_dim": 256, "depth": 3, "num_heads": 2,
    "decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def base():
    with torch.device("meta"):
        return create_model("mae_vit_base_patch16")


@pytest.mark.parametrize("decoder_depth", [1, 2, 4])
@pytest.mark.parametrize(("channels", "ratio", "batch"), [(3, 0.75, 2), (5, 0.3, 3)])
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
    expected = 3 * (products - skipped) + 2 * pixels
    per_image = count_flops(base.architecture, 3, 0.75) - count_flops(base.architecture, 2, 0.75)
    assert per_image == expected


def test_activation_checkpointing_costs_flops_and_saves_activations(base):
    flops = [count_flops(base.architecture, 8, 0.75, kind) for kind in ("none", "selective", "full")]
    kept = [kept_per_image(base, 0.75, 2, 4, kind)[0] for kind in ("none", "selective", "full")]
    assert flops == sorted(flops)
    assert kept == sorted(kept, reverse=True)
    assert [round(f / flops[0] - 1, 2) for f in flops] == [0, 0.09, 0.22]


@pytest.mark.parametrize("name", ["ViT-B/16", "ViT-L/16"])
def test_bytes_of_an_image_are_close_to_the_committed_count(name):
    counted = json.loads((ROOT / "benchmarks/results/counted/step.json").read_text())
    with torch.device("meta"):
        model = create_model({"ViT-B/16": "mae_vit_base_patch16", "ViT-L/16": "mae_vit_large_patch16"}[name])
    ours = counted["models"][name]["fastmae, triton"]
    assert kept_per_image(model, 0.75)[0] / 1e6 == pytest.approx(ours["saved"], rel=0.03)
    # The count has matrix products' operands too, which the time of the products covers.
    assert 0.5 < passes_per_image(model, 0.75) / 1e6 / (ours["forward"] + ours["backward"]) < 0.7


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
@pytest.mark.parametrize(("mode", "gpus"), [("fsdp", 8), ("fsdp", 64), ("hsdp", 64)])
@pytest.mark.parametrize(("accumulation", "reshard"), [(1, True), (2, False)])
def test_bytes_sent_are_those_of_real_collectives(monkeypatch, mode, gpus, accumulation, reshard):
    with pretended(gpus, 8, monkeypatch):
        measured = sent_in_a_step(mode, SIZES, accumulation, reshard)
    model = MaskedAutoencoderViT(**SIZES, seed=0)
    blocks = [sum(p.numel() for p in block.parameters()) for block in (*model.blocks, *model.decoder_blocks)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    planned = sent_per_step(trained, blocks, mode, gpus, min(gpus, 8), 2, accumulation, reshard)
    # FSDP cuts whole rows, so that small tensors are padded up to the number of processes.
    assert measured == pytest.approx(planned, rel=0.03 if gpus <= 8 else 0.1)


def test_more_memory_fits_more_and_shards_need_less(base):
    batches = [make_plan(base, hardware=Hardware(memory_gb=gb)).largest_batch for gb in (16, 24, 40, 80)]
    assert batches == sorted(batches)
    assert batches[0] > 0
    ddp, fsdp = (make_plan(base, gpus=8, mode=mode) for mode in ("ddp", "fsdp"))
    assert fsdp.memory["AdamW"] == ddp.memory["AdamW"] / 8
    assert make_plan(base, gpus=1, mode="none", hardware=Hardware(memory_gb=2)).largest_batch == 0
    accumulating = make_plan(base, gpus=8, mode="fsdp", hardware=Hardware(memory_gb=8))
    assert accumulating.accumulation > 1
    assert accumulating.memory["gradients, fp32"] == ddp.memory["gradients, fp32"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "12"], "--gpus: expected whole nodes of 8 or part of one, got 12"),
        (["--gpus", "6"], "--train.global-batch-size: expected a multiple of 6, got 4096"),
        (["--train.parallel", "none"], "--train.parallel: expected ddp, fsdp or hsdp for 8 GPUs, got none"),
    ],
)
def test_what_cannot_be_is_refused_by_its_flag(flags, message, capsys):
    assert main(["plan", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_page_shows_what_the_command_prints(capsys):
    page = (ROOT / "docs/scaling.md").read_text()
    for flags, shown in re.findall(r"```\n\$ fastmae plan ?(.*)\n\n((?:.|\n)*?)```", page):
        assert main(["plan", *flags.split()]) == 0
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert "\n".join(lines) + "\n" == shown
        break
    else:
        pytest.fail("docs/scaling.md shows no command")
