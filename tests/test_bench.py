"""``fastmae bench``: counts that are exact, a diagnosis that follows from the numbers, and a complete report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_cli import mistake
from training import FLAGS, MODEL, make_trainer, write_images

from fastmae.cli import main
from fastmae.train.profiling import throughput
from fastmae.train.profiling.bottleneck import Facts, diagnose
from fastmae.train.profiling.breakdown import Breakdown
from fastmae.train.profiling.throughput import PHASES, Throughput, Turn

FACTS = Facts(
    loader_rate=1000.0, model_rate=500.0, both_rate=495.0, together=0.99, masks_per_image=1, batch_size=64, cores=8,
    loader_busy_cores=7.9, both_busy_cores=7.9, loader_threads=8, on_gpu=True, loader="dali", dali="used",
    path="/data", sharded=False, short_side=256, source_pixels=400_000.0, shrunk_pixels=100_000.0, slow_formats=0.0,
    precision="bf16",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def advice(facts: Facts) -> str:
    return "\n".join(diagnose(facts).advice)


def test_a_loader_with_time_to_spare_leaves_the_model_as_the_bottleneck():
    found = diagnose(FACTS)
    assert found.bottleneck == "model"
    assert found.sentence == "The model is the bottleneck: the loader is 2.0 times faster."
    assert found.advice == ()


def test_only_a_precision_that_was_measured_and_is_faster_is_recommended():
    slow = replace(FACTS, precision="fp32")
    assert advice(slow) == advice(replace(slow, other_precision="bf16", other_speedup=1.05)) == ""
    assert "--train.precision bf16: measured in this run, the model alone trains 1.8 times as many" in advice(
        replace(slow, other_precision="bf16", other_speedup=1.8)
    )


def test_a_slow_loader_is_named_with_both_rates():
    found = diagnose(replace(FACTS, model_rate=2000.0, both_rate=990.0))
    assert found.bottleneck == "loader"
    assert "makes 1,000 images/s" in found.sentence
    assert "could train 2,000" in found.sentence


@pytest.mark.parametrize("masks", [1, 2])
def test_several_masks_an_image_count_in_the_loaders_favour(masks):
    facts = replace(FACTS, model_rate=1900.0, both_rate=950.0 * masks, masks_per_image=masks)
    assert diagnose(facts).bottleneck == {1: "loader", 2: "balanced"}[masks]


@pytest.mark.parametrize(
    ("model_rate", "batch_size", "masks"),
    [(1900.0, 64, 2), (2900.0, 64, 4), (2900.0, 63, 3), (50_000.0, 64, 8), (2900.0, 17, None)],
)
def test_the_number_of_masks_balances_and_divides_the_batch(model_rate, batch_size, masks):
    text = advice(replace(FACTS, model_rate=model_rate, both_rate=990.0, batch_size=batch_size))
    assert (f"--train.masks-per-image {masks}:" in text) == (masks is not None)
    assert ("--train.masks-per-image" in text) == (masks is not None)


def test_what_would_help_a_slow_loader_follows_from_what_was_found():
    slow = replace(FACTS, model_rate=3000.0, both_rate=990.0)
    assert "fastmae data shard /data OUT --short-side 256" in advice(slow)
    assert "4.0 times fewer" in advice(slow)
    assert "--short-side" not in advice(replace(slow, source_pixels=120_000.0))
    assert "data shard" not in advice(replace(slow, path=None))
    assert "--reencode" in advice(replace(slow, slow_formats=0.9))
    assert "pip install 'fastmae[dali" in advice(replace(slow, loader="torch", dali="missing"))
    assert "--data.loader dali" in advice(replace(slow, loader="torch", dali="installed"))
    assert "dali" not in advice(replace(slow, loader="torch", dali="unfit"))
    assert "dali" not in advice(replace(slow, loader="torch", dali="missing", on_gpu=False))


def test_idle_cores_ask_for_threads_or_a_faster_file_system():
    slow = replace(FACTS, model_rate=3000.0, both_rate=990.0, loader="torch", dali="unfit")
    assert "num-threads" not in advice(slow)
    few = advice(replace(slow, loader_busy_cores=1.9, loader_threads=2))
    assert "--data.num-threads 8: the loader alone keeps 1.9 of 8 cores at work, with 2 threads." in few
    waiting = advice(replace(slow, loader_busy_cores=1.9))
    assert "--data.num-threads 16, or tar shards" in waiting
    assert "tar shards" not in advice(replace(slow, loader_busy_cores=1.9, sharded=True))


def test_on_a_cpu_both_may_be_held_up_by_each_other():
    found = diagnose(replace(FACTS, both_rate=350.0, together=0.7, on_gpu=False))
    assert found.bottleneck == "cores"
    assert "share 8 cores" in found.sentence
    assert "70% of what the slower one makes alone" in found.sentence
    assert any("--train.masks-per-image 2" in line for line in found.advice)
    cheap = diagnose(replace(FACTS, loader_rate=9000.0, together=0.7, on_gpu=False))
    assert cheap.advice == ()
    idle = diagnose(replace(FACTS, loader_rate=9000.0, together=0.7, on_gpu=False, both_busy_cores=2.0))
    assert "keep 2.0 of 8 cores at work" in idle.advice[0]


def test_on_a_gpu_a_loader_that_disturbs_the_host_is_another_matter():
    found = diagnose(replace(FACTS, both_rate=350.0, together=0.7))
    assert found.bottleneck == "host"
    assert "--data.num-threads 4" in found.advice[0]


def test_a_gpu_that_waits_for_the_host_wants_fewer_launches():
    idle = replace(FACTS, idle_share=0.25)
    assert advice(FACTS) == advice(replace(FACTS, idle_share=0.05)) == ""
    assert "--train.cuda-graph: the GPU is idle for 25% of a step" in advice(idle)
    assert advice(replace(idle, cuda_graphs=True)) == advice(replace(idle, on_gpu=False)) == ""


def test_rates_are_medians_of_rounds_and_ratios_are_taken_within_them():
    found = Throughput(decoded=10, masked=20, kind="torch", threads=1, cores=2)
    for batches, speed in ((4, 1.0), (8, 0.5), (4, 1.0)):
        found.turns["loader"].append(Turn(batches, 1 / speed * batches / 4, 0.0, 1.0))
        found.turns["model"].append(Turn(batches, 2 / speed * batches / 4, 0.0, 1.0))
        found.turns["both"].append(Turn(batches, 2.5 / speed * batches / 4, 0.5 / speed * batches / 4, 1.5))
    assert found.rates("loader") == [40.0, 20.0, 40.0]
    assert (found.rate("loader"), found.rate("model"), found.rate("both")) == (40.0, 40.0, 32.0)
    assert found.together() == pytest.approx(0.8)
    assert found.wait_share() == pytest.approx(0.2)
    assert found.busy_cores("both") == 1.5
    assert found.step_ms() == pytest.approx(625)


@pytest.mark.parametrize(("recorded", "idle", "share"), [(625, 250, 0.4), (725, 250, 0.24), (725, 50, 0), (600, 0, 0)])
def test_what_recording_costs_is_not_counted_as_idle(recorded, idle, share):
    found = Throughput(decoded=10, masked=20, kind="torch", threads=1, cores=2)
    found.turns["both"].append(Turn(1, 0.625, 0.0, 1.0))
    found.breakdown = Breakdown(3, recorded, {}, {"idle device": idle}, {})
    assert found.idle_share() == pytest.approx(share)


def test_the_trainers_own_steps_are_measured_on_resident_and_on_loaded_batches(tmp_path, images):
    trainer = make_trainer(tmp_path / "run", images, log_every_steps=100)
    trainer.config = throughput.config_to_measure(replace(trainer.config, train=replace(trainer.config.train, steps=9)))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    seen = []
    forward = trainer.forward
    trainer.forward = lambda images, **options: seen.append(images) or forward(images, **options)
    found = throughput.measure(trainer, 0.2)
    assert [len(found.turns[phase]) for phase in PHASES] == [len(found.turns["loader"])] * 3
    assert len(found.turns["loader"]) >= 2
    assert all(turn.batches >= 1 and turn.seconds > 0 for turns in found.turns.values() for turn in turns)
    assert all(turn.waited == 0 for turn in found.turns["model"])
    assert any(turn.waited > 0 for turn in found.turns["both"])
    assert min(found.loader_cpu_seconds) > 0
    # Resident batches are one tensor again and again, loaded ones are not.
    addresses = {id(images) for images in seen}
    assert 1 < len(addresses) < len(seen)
    trained = [name for name, p in trainer.model.named_parameters() if not torch.equal(p.detach(), before[name])]
    assert trained
    assert found.breakdown.steps >= 2
    assert sum(found.breakdown.stages.values()) == pytest.approx(found.breakdown.step_ms)
    parts = {"encoder", "decoder", "loss", "encoder, backward", "decoder, backward", "norm and optimiser"}
    assert parts <= found.breakdown.stages.keys()


def test_one_optimiser_step_for_each_batch_is_measured(tmp_path, images):
    config = make_trainer(tmp_path / "run", images, batch_size=4, masks_per_image=2).config
    measured = throughput.config_to_measure(config)
    assert (measured.train.global_batch_size, measured.train.batch_size) == (4, 4)
    assert config.train.global_batch_size == 8


def test_the_command_prints_a_sentence_and_writes_everything(tmp_path, images, capsys):
    out = tmp_path / "deep" / "found.json"
    flags = [*FLAGS.split(), "--data.path", str(images), "--data.loader", "torch", "--seconds", "0.3"]
    assert main(["bench", *flags, "--json", str(out), "--train.masks-per-image", "2"]) == 0
    text = capsys.readouterr().out
    found = json.loads(out.read_text())
    for phase in PHASES:
        assert found[phase]["images_per_second"] > 0
        assert min(found[phase]["rounds"]) <= found[phase]["images_per_second"] <= max(found[phase]["rounds"])
    assert 0 <= found["both"]["data_wait_share"] <= 1
    assert 0 < found["model"]["mfu"] <= 1
    assert f"a large matrix product in {found['model']['precision']}" in text
    assert found["loader"]["cpu_seconds_per_image"] > 0
    assert found["loader"]["kind"] == "torch"
    assert found["masks_per_image"] == 2
    assert found["config"]["data"]["path"] == str(images)
    recorded = found["step"]["recorded"]
    for table in ("stages", "kinds"):
        assert sum(row["share"] for row in recorded[table].values()) == pytest.approx(1)
    assert recorded["attributed_share"] == 1
    assert found["step"]["ms"] == pytest.approx(1e3 * 8 / found["both"]["images_per_second"])
    assert "matrix products" in text
    assert "of the time is of a known kind" in text
    assert found["sentence"] in text
    assert all(line in text for line in found["advice"])
    assert "loader alone" in text
    assert "images masked" not in text


def test_steps_that_are_faster_than_a_product_raise_the_peak(tmp_path, images, capsys, monkeypatch):
    """As where bf16 is emulated: products are slow in it, fp32 is measured beside it, and no utilisation exceeds 1."""
    rates = {torch.bfloat16: 1e6, torch.float32: 1e15}
    monkeypatch.setattr(throughput, "matmul_flops", lambda device, dtype, *args, **options: rates[dtype])
    out = tmp_path / "found.json"
    flags = [*FLAGS.split(), "--data.path", str(images), "--data.loader", "torch", "--seconds", "0.1"]
    seen, turn = [], throughput._take_turn
    monkeypatch.setattr(throughput, "_take_turn", lambda t, *args: seen.append((t.dtype, args[1])) or turn(t, *args))
    assert main(["bench", *flags, "--train.precision", "bf16", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["model"]["matmul_flops_per_second"] == 1e6
    assert max(found["model"]["mfu"], found["both"]["mfu"]) == 1
    assert "a large matrix product in bf16, timed between them, is slower" in capsys.readouterr().out
    assert seen.count((torch.float32, "model")) == seen.count((torch.bfloat16, "model")) == len(seen) / 4


def test_mistakes(tmp_path, images, capsys):
    assert "--seconds: expected a positive number, got 0" in mistake(capsys, "bench", "--seconds", 0)
    assert "/no/such/folder" in mistake(capsys, "bench", "--data.path", "/no/such/folder")
    assert "--model.mask-ratio" in mistake(capsys, "bench", "--model.mask-ratio", 1.5)


def test_several_processes_are_refused(capsys, monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert "expected to be started alone, got 4 processes of torchrun" in mistake(capsys, "bench")


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for_inside_a_turn(tmp_path, images):
    trainer = make_trainer(tmp_path / "run", images, device="cuda", model=MODEL)
    with trainer._open_loader() as loader:
        feed = trainer.loader = throughput.Feed(loader)
        trainer.model.train()
        feed.resident = next(feed)
        throughput._run(trainer, feed, "model", 2)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            throughput._run(trainer, feed, "model", 3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
