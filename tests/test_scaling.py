"""Plans on paper against what they describe: parameters, operations, memory and bytes, counted on the model itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmae.cli import main
from fastmae.layers import Linear
from fastmae.model import PRESETS, MaskedAutoencoderViT, create_model
from fastmae.ops import random_masking
from fastmae.train.scaling.communication import Collective, collectives
from fastmae.train.scaling.data import IMAGE_KB, IMAGES_PER_CPU_SECOND, MEASURED_IN, Data
from fastmae.train.scaling.hardware import Cluster, Hardware
from fastmae.train.scaling.kept import kept_per_image
from fastmae.train.scaling.memory import largest_batch, memory, states
from fastmae.train.scaling.moved import moved_per_image
from fastmae.train.scaling.plan import Plan, Run, make_plan
from fastmae.train.scaling.report import to_json
from fastmae.train.scaling.sizes import Sizes, architecture_sizes, parameters, preset_sizes
from fastmae.train.scaling.work import flops_per_batch, flops_per_image

ROOT = Path(__file__).parent.parent
COUNTED = json.loads((ROOT / "benchmarks/results/counted/step.json").read_text())["models"]
COUNTED = {"mae_vit_base_patch16": COUNTED["ViT-B/16"], "mae_vit_large_patch16": COUNTED["ViT-L/16"]}
LARGE = preset_sizes("mae_vit_large_patch16")

ODD = Sizes((24, 40), (4, 8), 2, 48, 3, 3, 32, 3, 2)
SHALLOW = Sizes((32, 32), (8, 8), 1, 64, 2, 4, 32, 1, 2, mlp_ratio=2.5)


def arguments(sizes: Sizes) -> dict:
    return {field.name: getattr(sizes, field.name) for field in fields(Sizes)}


@pytest.mark.parametrize("sizes", [*map(preset_sizes, PRESETS), ODD, SHALLOW], ids=[*PRESETS, "odd", "shallow"])
def test_parameters_are_those_of_the_model(sizes):
    with torch.device("meta"):
        model = MaskedAutoencoderViT(**arguments(sizes))
    assert architecture_sizes(model.architecture) == sizes
    planned = {p.name: p for p in parameters(sizes)}
    assert {name: p.shape for name, p in planned.items()} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {p.name for p in planned.values() if p.trainable} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    assert {p.name for p in planned.values() if p.has_copy} == linear
    blocks = {f"{name}.{i}" for name in ("blocks", "decoder_blocks") for i in range(len(getattr(model, name)))}
    assert {p.unit for p in planned.values()} == {"", *blocks}


@pytest.mark.parametrize("sizes", [ODD, SHALLOW], ids=["odd", "shallow"])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.4])
def test_flops_are_those_that_pytorch_counts(sizes, mask_ratio):
    model = MaskedAutoencoderViT(**arguments(sizes), attention="sdpa", seed=0)
    for batch in (1, 3):
        images = torch.zeros(batch, sizes.in_chans, *sizes.img_size, dtype=torch.uint8)
        masking = random_masking(batch, model.num_patches, mask_ratio, seed=0)
        # The fused backward makes scores again; the count is of what has to be computed.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(images, masking=masking, full_pred=False).loss.backward()
        planned = batch * flops_per_image(sizes, mask_ratio).model + flops_per_batch(sizes)
        assert counter.get_total_flops() == planned


def test_flops_of_a_preset_are_those_that_pytorch_counts():
    model = create_model("mae_vit_small_patch16", attention="sdpa", seed=0)
    images = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    masking = random_masking(1, model.num_patches, 0.75, seed=0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images, masking=masking, full_pred=False).loss.backward()
    sizes = preset_sizes("mae_vit_small_patch16")
    assert counter.get_total_flops() == flops_per_image(sizes).model + flops_per_batch(sizes)


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("backend", ["plain", "sdpa", "triton"])
def test_saved_activations_are_the_published_ones(name, backend):
    kept = kept_per_image(preset_sizes(name), attention="plain" if backend == "plain" else "fused")
    assert kept.activations / 1e6 == pytest.approx(COUNTED[name][f"fastmae, {backend}"]["saved"], abs=1e-3)


@pytest.mark.parametrize("name", COUNTED)
def test_moved_bytes_are_about_the_published_ones(name):
    counted = COUNTED[name]["fastmae, triton"]
    moved = moved_per_image(preset_sizes(name))
    assert moved.total / 1e6 == pytest.approx(counted["forward"] + counted["backward"], rel=0.015)


def test_memory_kinds_add_up_and_the_largest_batch_is_the_largest():
    hardware, kept = Hardware(), kept_per_image(LARGE)
    held = states(LARGE, "ddp", Cluster(8))
    most = largest_batch(LARGE, held, kept, hardware)
    limit = hardware.usable_bytes + hardware.reserved_gb * 1e9
    assert memory(LARGE, held, kept, most, hardware).total <= limit
    assert memory(LARGE, held, kept, most + 1, hardware).total > limit
    trained = sum(p.count for p in parameters(LARGE) if p.trainable)
    assert held.weights + held.gradients + held.optimizer == pytest.approx(16 * trained, rel=0.001)


def test_sharded_states_shrink_and_padding_is_counted():
    sharded = [states(LARGE, "fsdp", Cluster(n)).weights for n in (8, 64, 512)]
    assert sharded == sorted(sharded, reverse=True)
    huge = preset_sizes("mae_vit_huge_patch14")
    (whole,) = [c for c in collectives(huge, "fsdp", Cluster(64)) if c.name == "reduce-scatter"]
    (padded,) = [c for c in collectives(huge, "fsdp", Cluster(512)) if c.name == "reduce-scatter"]
    # 1280 rows are 20 for each of 64 processes, but 3 for each of 512, which makes 1536.
    assert padded.bytes / whole.bytes == pytest.approx(1.1, abs=0.01)
    gathered = [sum(c.bytes for c in collectives(LARGE, "fsdp", Cluster(8), reshard_after_forward=r)) for r in (0, 1)]
    assert gathered[0] < gathered[1]


@pytest.mark.parametrize(
    ("name", "ranks", "sent"), [("all-reduce", 4, 150.0), ("all-gather", 4, 75.0), ("reduce-scatter", 2, 50.0)]
)
def test_ring_factors(name, ranks, sent):
    assert Collective(name, "all", ranks, 1, 100).sent == sent


def test_links_that_bind():
    hardware = Hardware(nvlink_gb_per_s=400, network_gb_per_s=20, link_fraction=0.5, node_latency_us=0)
    hardware = replace(hardware, network_latency_us=0)
    one = Collective("all-gather", "all", 16, 1, 16 * 10**9)
    assert one.seconds(hardware, Cluster(16)) == pytest.approx(15 / 80)  # eight ports of a node, at half their rate
    inside = Collective("all-gather", "node", 8, 1, 16 * 10**9)
    assert inside.seconds(hardware, Cluster(16)) == pytest.approx(14 / 200)
    across = Collective("all-gather", "across", 2, 1, 16 * 10**9)
    assert across.seconds(hardware, Cluster(16)) == pytest.approx(8 / 10)
    slow = replace(hardware, node_latency_us=30, network_latency_us=5)
    added = one.seconds(slow, Cluster(64)) - one.seconds(hardware, Cluster(64))
    assert added == pytest.approx((30 + 5 * 3) * 1e-6)


def test_a_step_by_hand():
    """One GPU, no communication: operations over rate, bytes over bandwidth."""
    hardware = Hardware(matmul_tflops=100, matmul_fraction=0.5, hbm_tb_per_s=1, hbm_fraction=0.5)
    plan = make_plan(Run(LARGE, Cluster(1, 1), "none", 64, hardware=hardware))
    flops, moved = flops_per_image(LARGE).model, moved_per_image(LARGE)
    assert plan.step.products == pytest.approx((64 * flops + flops_per_batch(LARGE)) / 50e12)
    assert plan.step.passes == pytest.approx(64 * moved.passes / 0.5e12)
    copied = sum(p.count for p in parameters(LARGE) if p.has_copy)
    assert plan.step.weights == pytest.approx((32 * plan.parameters + 6 * copied) / 0.5e12)
    assert plan.step.exposed == plan.step.communication == 0
    assert plan.images_per_s == pytest.approx(64 / plan.step.seconds)
    assert plan.mfu == pytest.approx(flops * plan.images_per_s / 100e12)
    assert plan.days["800"] == pytest.approx(800 * 1_281_167 / plan.images_per_s / 86400)


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("gpus", [16, 64, 512])
@pytest.mark.parametrize("name", ["mae_vit_base_patch16", "mae_vit_huge_patch14"])
def test_overlap_hides_something_and_never_everything(name, mode, gpus):
    step = plan_of(name, gpus, mode).step
    assert 0 < step.exposed < step.communication
    assert 0 < step.share_exposed < step.share_without_overlap < 1


def test_faster_machines_make_faster_steps():
    base = plan_of("mae_vit_large_patch16", 512, "fsdp").step.seconds
    for name in ("matmul_tflops", "hbm_tb_per_s", "network_gb_per_s", "nvlink_gb_per_s"):
        better = replace(Hardware(), **{name: 2 * getattr(Hardware(), name)})
        again = make_plan(Run(LARGE, Cluster(512), "fsdp", hardware=better)).step.seconds
        if name == "nvlink_gb_per_s":
            assert again == base  # the ports of a node bind, not the links inside
        elif name == "matmul_tflops":
            assert again <= base  # eight images a GPU wait for the network and for memory
        else:
            assert again < base


def test_batches_accumulate_where_memory_is_short():
    small = Hardware(hbm_gb=40)
    plan = make_plan(Run(LARGE, Cluster(8), "ddp", 8192, hardware=small))
    assert plan.batch_size * plan.accumulation == 1024
    assert plan.accumulation > 1
    assert plan.batch_size <= plan.largest_batch < 1024
    assert plan.memory.total <= small.usable_bytes + small.reserved_gb * 1e9
    one = make_plan(Run(LARGE, Cluster(8), "fsdp", 4096))
    two = make_plan(Run(LARGE, Cluster(8), "fsdp", 4096, batch_size=256))
    assert (two.accumulation, one.accumulation) == (2, 1)
    sent = [{c.name: c.bytes for c in plan.collectives} for plan in (one, two)]
    assert sent[1] == {"all-gather": 2 * sent[0]["all-gather"], "reduce-scatter": sent[0]["reduce-scatter"]}
    assert two.memory.states.gradients > one.memory.states.gradients


def test_activation_checkpointing_trades_memory_for_operations():
    plans = [make_plan(Run(LARGE, activation_checkpointing=kind)) for kind in ("none", "selective", "full")]
    assert [p.memory.activations for p in plans] == sorted((p.memory.activations for p in plans), reverse=True)
    assert [p.step.products for p in plans] == sorted(p.step.products for p in plans)
    assert len({p.flops.model for p in plans}) == 1


def test_data_and_checkpoints():
    data = Data(images=1000, image_kb=50, images_per_core=100, masks_per_image=4)
    plan = make_plan(Run(LARGE, Cluster(16), "fsdp", 4096, data=data))
    decoded = plan.images_per_s / 4
    assert plan.data.images_per_s == pytest.approx(decoded)
    assert plan.data.cores_per_node == pytest.approx(decoded / 2 / 100)
    assert plan.data.storage_bytes_per_s == pytest.approx(decoded * 50e3)
    trained = sum(p.count for p in parameters(LARGE) if p.trainable)
    assert plan.checkpoint.bytes == pytest.approx(12 * trained, rel=0.001)
    assert plan.checkpoint.write_seconds == pytest.approx(plan.checkpoint.bytes / (2 * 2e9))


def test_decoding_rates_are_the_measured_ones():
    measured = {
        one["competitor"]: one["images_per_cpu_second"]
        for one in json.loads((ROOT / MEASURED_IN).read_text())["benchmarks"]
        if "images_per_cpu_second" in one
    }
    names = {"folder": "folder", "shards": "tar shards", "shards-256": "tar shards at 256"}
    for (loader, source), rate in IMAGES_PER_CPU_SECOND.items():
        assert rate == round(measured[f"fastmae-{loader}, {names[source]}"])
    stored = json.loads((ROOT / "benchmarks/results/counted/shards.json").read_text())["stored"]["90"]["share"]
    assert IMAGE_KB["shards-256"] == round(IMAGE_KB["folder"] * stored)
    plans = [make_plan(Run(LARGE, data=Data(loader="torch", source=source))) for source in IMAGE_KB]
    assert [plan.data.images_per_s / plan.data.cores_per_node for plan in plans] == [758, 792, 1852]
    assert plans[0].data.storage_bytes_per_s > 4 * plans[2].data.storage_bytes_per_s


def test_fp32_and_several_masks():
    plan = make_plan(Run(LARGE, precision="fp32"))
    assert plan.step.products > 10 * make_plan(Run(LARGE)).step.products
    assert plan.memory.states.copies == 0
    assert plan.memory.activations == plan.batch_size * kept_per_image(LARGE, compute_bytes=4).activations
    several = make_plan(Run(LARGE, data=Data(masks_per_image=4)))
    assert several.batch_size % 4 == 0
    assert several.memory.images * 4 == make_plan(Run(LARGE)).memory.images


@pytest.mark.parametrize(
    "flags",
    ["--gpus 1", "--gpus 4 --model mae_vit_tiny_patch16", "--gpus 6 --gpus-per-node 1 --global-batch 600",
     "--gpus 16 --decoder-depth 1 --img-size 32 64 --patch-size 8 --global-batch 16", "--gpus 2 --attention plain",
     "--gpus 16 --precision fp16 --residual bfloat16 --activation-checkpointing full --no-reshard-after-forward"],
)  # fmt: skip
def test_uncommon_runs_can_be_planned(capsys, flags):
    assert main(["plan", *flags.split(), "--json"]) == 0
    for shown in json.loads(capsys.readouterr().out):
        assert (
            shown["batch_size"] * shown["accumulation"] * shown["run"]["cluster"]["gpus"]
            == (shown["run"]["global_batch"])
        )
        assert 0 < shown["step"]["seconds"] < 100
        assert 0 < shown["mfu"] < 1


def plan_of(name: str, gpus: int, mode: str) -> Plan:
    return make_plan(Run(preset_sizes(name), Cluster(gpus), mode))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpus 63", "--gpus: expected whole nodes of 8, or part of one, got 63"),
        ("--gpus 0", "--gpus: expected at least 1, got 0"),
        ("--gpus 64 --global-batch 4000", "--global-batch: expected a multiple of 64 for 64 GPUs, got 4000"),
        ("--model mae_vit_giant", "--model: expected one of mae_vit_tiny_patch16"),
        ("--parallel none", "--parallel: expected ddp, fsdp or hsdp for 8 GPUs, got 'none'"),
        ("--parallel hsdp", "--parallel: expected ddp or fsdp for 1 x 8 GPUs, as hsdp needs"),
        ("--batch-size 300", "--batch-size: expected a divisor of the 512 images of a GPU, got 300"),
        ("--batch-size 4096 --global-batch 65536", "--batch-size: expected at most"),
        ("--hardware.hbm-gb 12 --parallel ddp --model mae_vit_huge_patch14", "--hardware.hbm-gb: expected room for"),
        ("--hardware.matmul-fraction 1.5", "--hardware.matmul-fraction: expected at most 1, got 1.5"),
        ("--data.images-per-core 0", "--data.images-per-core: expected a positive number, got 0.0"),
        ("--mask-ratio 1", "--mask-ratio: expected a number strictly between 0 and 1, got 1.0"),
        ("--img-size 200", "--img-size: expected a multiple of the patch size (16, 16), got (200, 200)"),
        ("--depth 0", "--depth: expected at least 1, got 0"),
        ("--epochs 0", "--epochs: expected positive numbers"),
    ],
)
def test_mistakes_name_the_flag(capsys, flags, message):
    assert main(["plan", *flags.split()]) == 2
    assert f"fastmae: error: {message}" in capsys.readouterr().err


def test_the_command_prints_every_kind_and_every_assumption(capsys):
    assert main(["plan", "--gpus", "16", "--hardware.link-fraction", "0.77"]) == 0
    text = capsys.readouterr().out
    for said in ("ddp", "fsdp", "hsdp", "saved activations", "all-reduce, across nodes", "CPU cores", "1600 epochs"):
        assert said in text
    flat = " ".join(text.split())
    assert "Nothing of this was measured on GPUs" in flat
    assert f"measured ({MEASURED_IN}): data.images-per-core 855" in flat
    for part, prefix in ((Hardware, "hardware"), (Data, "data")):
        for field in fields(part):
            assert field.name == "name" or f"{prefix}.{field.name.replace('_', '-')}" in flat
    assert "link-fraction 0.77" in flat


def test_json_holds_the_whole_plan(capsys):
    assert main(["plan", "--gpus", "16", "--parallel", "hsdp", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    plan = make_plan(Run(LARGE, Cluster(16), "hsdp"))
    assert shown == json.loads(json.dumps(to_json(plan)))
    assert shown["memory"]["total"] == plan.memory.total
    assert shown["step"]["seconds"] == plan.step.seconds
    assert [c["name"] for c in shown["collectives"]] == ["all-gather", "reduce-scatter", "all-reduce"]


def test_no_module_of_a_plan_needs_pytorch():
    code = "import sys, fastmae.cli; assert fastmae.cli.main(['plan']) == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_the_page_has_the_tables_that_the_formulas_give():
    sys.path.append(str(ROOT / "benchmarks"))
    import report_scaling

    text = report_scaling.PAGE.read_text()
    assert report_scaling.page(text) == text, "run python benchmarks/report_scaling.py"
    with pytest.raises(ValueError, match="images:begin"):
        report_scaling.page(text.replace("<!-- images:begin -->", ""))


def test_selective_is_the_part_that_spares_most_for_its_operations():
    sys.path.append(str(ROOT / "benchmarks"))
    import report_scaling

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report_scaling.parts().splitlines()[2:]]
    for where in {row[0] for row in rows}:
        ratios = {row[1]: float(row[-1]) for row in rows if row[0] == where}
        assert max(ratios, key=ratios.get) == "attention (`selective`)"


def test_the_commands_of_the_page_run(capsys):
    text = (ROOT / "docs/scaling.md").read_text()
    commands = text.split("```bash\n")[1].split("```")[0].replace("\\\n", "").splitlines()
    assert len(commands) == 3
    for command in commands:
        words = command.split("#")[0].split()
        assert words[0] == "fastmae"
        assert main(words[1:]) == 0
        assert capsys.readouterr().out


def test_what_the_page_concludes_is_what_the_formulas_say():
    found = {(n, g, m): plan_of(f"mae_vit_{n}", g, m) for n in _PAPER for g in (8, 64, 512) for m in _modes(g)}
    assert found["huge_patch14", 8, "ddp"].memory.states.total / 1e9 == pytest.approx(12, abs=0.5)
    assert {plan.accumulation for plan in found.values()} == {1}
    for name in _PAPER:
        by_mode = {g: {m: found[name, g, m] for m in _modes(g)} for g in (8, 64, 512)}
        assert all(0.025 < plan.step.share_without_overlap < 0.055 for plan in by_mode[8].values())
        assert 0.15 < by_mode[64]["ddp"].step.weights / by_mode[64]["ddp"].step.seconds < 0.25
        fastest = {g: min(plans, key=lambda m, plans=plans: plans[m].step.seconds) for g, plans in by_mode.items()}
        assert (fastest[64], fastest[512]) == ("fsdp", "hsdp")
        rates = {g: by_mode[g][fastest[g]].images_per_s for g in by_mode}
        assert 1.3 < rates[512] / rates[64] < 1.75
        assert all(plan.step.share_exposed > 0.5 for plan in by_mode[512].values())
        assert all(plan.step.share_exposed < 0.05 for plan in by_mode[64].values())
        slow = Hardware(network_gb_per_s=12.5 / 8)
        runs = [Run(preset_sizes(f"mae_vit_{name}"), Cluster(64), mode, hardware=slow) for mode in _modes(64)]
        assert all(make_plan(run).images_per_s < rates[8] for run in runs)
    base, huge = (found[name, 8, "fsdp"].data.images_per_s for name in (_PAPER[0], _PAPER[2]))
    assert (base, base / huge) == (pytest.approx(50_000, rel=0.1), pytest.approx(4, rel=0.1))
    assert found[_PAPER[0], 8, "fsdp"].data.cores_per_node == pytest.approx(60, abs=2)
    assert base / IMAGES_PER_CPU_SECOND["dali", "shards-256"] == pytest.approx(25, abs=1)
    costs = [plan.checkpoint for plan in found.values()]
    assert max(c.copy_seconds for c in costs) < 0.0405
    assert max(c.write_seconds for c in costs) < 4
    hours = [24 * found["large_patch16", g, "fsdp"].days["1600"] for g in (8, 64)]
    assert hours == [pytest.approx(21, abs=0.5), pytest.approx(3, abs=0.5)]


_PAPER = ("base_patch16", "large_patch16", "huge_patch14")


def _modes(gpus: int) -> list[str]:
    return ["ddp", "fsdp"] + ["hsdp"] * (gpus > 8)
