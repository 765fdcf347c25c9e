"""``--train.batch-size auto``: the largest batch that fits by the plan's estimate, the same on all ranks, kept on."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from distributed import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastmae.cli import bench, main
from fastmae.data import open_dataset
from fastmae.model import create_model
from fastmae.ops import random_masking
from fastmae.train.batching import free_memory
from fastmae.train.batching.auto_batch import CPU_KEEPS, Machine, settle_batch_size
from fastmae.train.checkpoint import Ranks
from fastmae.train.config import PretrainConfig
from fastmae.train.parallel import Parallelism
from fastmae.train.recipes import RECIPES
from fastmae.train.run_folder import RunFolder
from fastmae.train.scaling.hardware import Cluster, Hardware
from fastmae.train.scaling.kept import kept_per_image
from fastmae.train.scaling.plan import Run, make_plan
from fastmae.train.scaling.sizes import preset_sizes

LARGE = RECIPES["imagenet-vit-l"]
GB = 10**9


def with_train(config: PretrainConfig = LARGE, **values) -> PretrainConfig:
    return replace(config, train=replace(config.train, **{"batch_size": "auto"} | values))


def settled(config: PretrainConfig, machine: Machine, saved=None) -> int:
    return settle_batch_size(config, machine, saved).config.train.batch_size


@pytest.mark.parametrize(("mode", "gpus"), [("none", 1), ("ddp", 8), ("fsdp", 8)])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("gb", [16, 24, 40, 80])
def test_the_batch_is_that_of_the_plan_for_as_much_memory(mode, gpus, checkpointing, gb):
    config = with_train(activation_checkpointing=checkpointing)
    hardware = Hardware(hbm_gb=gb)
    run = Run(
        preset_sizes("mae_vit_large_patch16"),
        Cluster(gpus, gpus),
        mode,
        activation_checkpointing=checkpointing,
        hardware=hardware,
    )
    plan, machine = make_plan(run), Machine("cuda", gb * GB, gpus, mode)
    chosen = settle_batch_size(config, machine)
    assert chosen.config.train.batch_size == plan.batch_size
    used = plan.memory.total - plan.memory.reserved
    assert f"{plan.batch_size:,} images x {plan.accumulation}, an estimated {used / 1e9:.3g} GB of" in chosen.text
    assert used <= 0.85 * gb * GB - 2 * GB
    larger = [b for b in range(plan.batch_size + 1, 4096 // gpus + 1) if 4096 // gpus % b == 0]
    assert all(b > plan.largest_batch for b in larger)
    # Only the number is another: what the run was asked for is kept elsewhere.
    assert replace(chosen.config, train=replace(chosen.config.train, batch_size="auto")) == config


@given(st.integers(12, 90), st.sampled_from([1, 2, 3, 8]), st.integers(1, 6), st.integers(1, 40))
def test_it_divides_and_holds_whole_images(gb, gpus, masks, share):
    config = with_train(global_batch_size=gpus * masks * share, masks_per_image=masks)
    batch = settled(config, Machine("cuda", gb * GB, gpus, "ddp" if gpus > 1 else "none"))
    assert batch % masks == 0
    assert masks * share % batch == 0


def test_more_memory_never_makes_it_smaller_and_what_keeps_more_never_larger():
    batches = [settled(with_train(), Machine("cuda", gb * GB)) for gb in range(12, 200, 4)]
    assert batches == sorted(batches)
    assert len(set(batches)) > 5
    one, fine = Machine("cuda", 42 * GB), with_train(global_batch_size=5040)  # which has many divisors
    batch = settled(fine, one)
    assert settled(replace(fine, train=replace(fine.train, precision="fp32")), one) < batch
    assert settled(fine, replace(one, attention="plain")) < batch
    graphs = replace(fine, train=replace(fine.train, compile=True, compile_mode="reduce-overhead"))
    assert settled(graphs, one) < settled(replace(graphs, train=replace(fine.train, compile=True)), one) == batch
    assert settled(fine, replace(one, decoded_bytes=36 * 10**6)) < batch
    assert settled(replace(fine, data=replace(fine.data, progressive_sizes=(160, 192, 224))), one) == batch


def test_hybrid_sharding_counts_the_shards_and_not_the_processes():
    batches = [settled(with_train(), Machine("cuda", 6 * GB, 64, "hsdp", size)) for size in (4, 8)]
    assert batches[0] < batches[1] == settled(with_train(), Machine("cuda", 6 * GB, 64, "fsdp"))


def test_the_cpu_accumulates_only_where_its_memory_says_so():
    config = with_train(global_batch_size=256)
    assert settled(config, Machine("cpu", 512 * GB)) == 256
    assert settled(config, Machine("cpu", 512 * GB, 4, "ddp")) == 64
    assert settled(config, Machine("cpu", 20 * GB)) < 256
    unknown = settle_batch_size(config, Machine("cpu", None))
    assert unknown.config.train.batch_size == 256
    assert unknown.text == "Batch size auto: 256 images x 1; how much memory is free is not known"


@pytest.mark.parametrize(
    ("machine", "values", "advice"),
    [
        (Machine("cuda", 6 * GB, 8, "ddp"), {}, "--train.parallel fsdp"),
        (Machine("cuda", 6 * GB), {}, "a smaller model, or more processes with --train.parallel fsdp"),
        (
            Machine("cuda", int(10.18 * GB)),
            {"global_batch_size": 64, "masks_per_image": 16},
            "--train.activation-checkpointing selective or --train.activation-checkpointing full",
        ),
    ],
)
def test_what_would_help_is_said_where_not_one_image_fits(machine, values, advice):
    with pytest.raises(ValueError, match=r"--train.batch-size: auto expected room for .* and one image") as caught:
        settle_batch_size(with_train(**values), machine)
    assert str(caught.value).endswith(f"GB free on the GPU that has least; what would help: {advice}")


def test_a_global_batch_that_does_not_divide_is_named():
    for mode in ("ddp", "fsdp"):
        with pytest.raises(ValueError, match="global_batch: expected a multiple of 7"):
            settle_batch_size(with_train(), Machine("cuda", 80 * GB, 7, mode))


def manifest(batch_size, world_size=1, **train) -> dict:
    return {
        "config": {"train": {"batch_size": batch_size, "global_batch_size": 4096, **train}},
        "world_size": world_size,
    }


def test_a_continued_run_keeps_its_batch_where_it_fits():
    """Also where more would fit now; on other processes, or where it does not fit, the batch is found anew."""
    small, large = Machine("cuda", 24 * GB), Machine("cuda", 85 * GB)
    before = settled(with_train(), small)
    assert before < settled(with_train(), large) == 1024
    assert settled(with_train(), large, manifest(before)) == before
    assert settle_batch_size(with_train(), large, manifest(before)).text.endswith("; as before")
    assert settled(with_train(), small, manifest(1024)) == before
    assert settled(with_train(), large, manifest(before, world_size=2)) == 1024
    assert settled(with_train(), large, manifest(before, masks_per_image=2)) == 1024
    # A number above the share meant the share, and so it is said again: nothing differs from the saved configuration.
    assert settled(with_train(), replace(large, world_size=8, mode="ddp"), manifest(None, 8)) is None
    assert settled(with_train(), replace(large, world_size=8, mode="ddp"), manifest(1024, 8)) == 1024


@pytest.mark.parametrize("name", ["mae_vit_tiny_patch16", "mae_vit_small_patch16"])
@pytest.mark.parametrize("checkpointing", [("none", "nothing"), ("selective", "attention")], ids=lambda c: c[0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.ops
def test_the_cpu_keeps_at_most_what_is_reckoned_with(name, checkpointing, dtype):
    kind, recompute = checkpointing
    model, kept = create_model(name, seed=0), []
    for block in [*model.blocks, *model.decoder_blocks]:
        block.recompute = recompute
    for batch in (1, 2):
        images = torch.zeros(batch, 3, 224, 224, dtype=torch.uint8)
        masking = random_masking(batch, model.num_patches, 0.75, seed=0)
        known, found = {p.untyped_storage()._cdata for p in (*model.parameters(), images)}, {}
        pack = lambda t, found=found: found.setdefault(t.untyped_storage()._cdata, t) is None or t  # noqa: E731
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with hooks, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(images, masking=masking, full_pred=False)
        kept.append(sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in known))
    machine = Machine("cpu", 64 * GB)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    plain = free_memory.keeps_scores(with_train(precision=precision), preset_sizes(name), machine.device)
    options = {"attention": "plain" if plain else "fused", "activation_checkpointing": kind}
    planned = kept_per_image(preset_sizes(name), compute_bytes=dtype.itemsize, **options)
    assert 0.5 * planned.activations < kept[1] - kept[0] <= CPU_KEEPS * planned.activations


def test_free_memory_of_the_host_is_what_linux_and_the_container_say(tmp_path):
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    meminfo.write_text("MemTotal:       2000 kB\nMemFree:  5 kB\nMemAvailable:    1000 kB\n")
    group.mkdir()
    assert free_memory.host_free_bytes(meminfo, group) == 1_024_000
    (group / "memory.max").write_text("900000\n")
    (group / "memory.current").write_text("700000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert free_memory.host_free_bytes(meminfo, group) == 250_000
    (group / "memory.max").write_text("max\n")
    assert free_memory.host_free_bytes(meminfo, group) == 1_024_000
    assert free_memory.host_free_bytes(tmp_path / "none", tmp_path / "no") is None
    assert free_memory.free_bytes(torch.device("cpu")) > 0


def least(rank: int) -> list[int | None]:
    with Ranks.create() as ranks:
        devices = map(torch.device, ("cpu", "cuda"))
        return [free_memory.least_free_bytes(device, ranks, lambda _: (4 + rank) * GB) for device in devices]


def test_ranks_agree_on_the_smallest_and_share_a_host_but_not_a_gpu():
    assert run_ranks(least, 2) == [[2 * GB, 4 * GB]] * 2


def test_the_machine_of_a_process_alone():
    config = with_train(precision="fp32")
    machine = free_memory.find_machine(
        config, preset_sizes("mae_vit_large_patch16"), Parallelism(), Ranks(), open_dataset(None), "dali"
    )
    expected = Machine("cpu", machine.free_bytes, attention=machine.attention)
    assert machine == expected
    assert machine.free_bytes > 0


def test_decoded_images_are_as_large_as_the_index_says():
    dataset = open_dataset(None)
    rows = dataset.rows(np.arange(len(dataset)))
    assert free_memory.decoded_bytes(dataset) == int((3.0 * rows["height"] * rows["width"]).mean())


def test_pretrain_says_what_it_chose_and_goes_on_with_the_batch_it_had(tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--out", str(run), "--train.num-threads", "1"]
    assert main(["pretrain", *flags, "--train.steps", "2", "--train.batch-size", "16"]) == 0
    capsys.readouterr()
    assert main(["pretrain", *flags, "--resume", "--train.steps", "3", "--train.batch-size", "auto"]) == 0
    out, err = capsys.readouterr()
    assert "3 steps of 2 x 16 images" in out
    (said,) = (line for line in out.splitlines() if line.startswith("Batch size auto: 16 images x 2, an estimated "))
    assert said.endswith("; as before")
    assert "batch_size" not in err
    assert json.loads((run / "config.json").read_text())["train"]["batch_size"] == "auto"
    saved = json.loads((run / "checkpoints/step-3/manifest.json").read_text())
    assert saved["config"]["train"]["batch_size"] == 16


def test_bench_measures_the_batch_that_auto_means(tmp_path):
    config, console = with_train(RECIPES["photographs"], masks_per_image=2), Console(file=StringIO(), width=300)
    with RunFolder(tmp_path / "run") as run:
        trainer = bench._trainer(config, run, console)
    assert (trainer.batch_size, trainer.accumulation) == (32, 1)
    assert "Batch size auto: 32 images x 1, an estimated" in console.file.getvalue()
