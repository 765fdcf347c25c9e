"""``fastmae bench``: counts that are exact, a diagnosis that follows from the numbers, and a complete report."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from commands import mistake
from training import FLAGS, MODEL, make_trainer, write_images

from fastmae.cli import main
from fastmae.train import bench
from fastmae.train.bench import PHASES, Measured, Turn, config_to_measure, diagnose, measure
from fastmae.train.trainer import Trainer


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def measured(loader: float, model: float, both: float, *, masks: int = 1, other: float | None = None) -> Measured:
    """Three rounds of these rates in images per second, the middle one twice as slow as the others."""
    found = Measured(decoded=10, masked=10 * masks)
    found.other_precision = "bf16" if other else None
    for slow in (1.0, 2.0, 1.0):
        for phase, rate in {"loader": loader, "model": model, "both": both, "other": other}.items():
            if rate:
                images = 10 if phase == "loader" else 10 * masks
                found.turns[phase].append(Turn(8, 8 * images / rate * slow, 0.2 * slow if phase == "both" else 0, 1.5))
    return found


def test_rates_are_medians_of_rounds_and_ratios_are_taken_within_them():
    found = measured(40, 100, 36, masks=2)
    assert found.rates("loader") == pytest.approx([40, 20, 40])
    assert (found.rate("loader"), found.rate("both")) == pytest.approx((40, 36))
    assert found.together() == pytest.approx(36 / 80)
    assert found.data_wait() == pytest.approx(0.2 / (8 * 20 / 36))


def test_a_loader_with_time_to_spare_leaves_the_model_as_the_bottleneck():
    found = measured(1000, 500, 495)
    sentence = "The model is the bottleneck: the loader is 2.0 times faster."
    assert diagnose(found, True, 8) == ("model", sentence, [])


def test_a_slow_loader_is_named_with_both_rates():
    limit, sentence, _ = diagnose(measured(1000, 2000, 990), True, 8)
    assert limit == "loader"
    assert "makes 1,000 images/s" in sentence
    assert "could train 2,000" in sentence


@pytest.mark.parametrize("masks", [1, 2])
def test_several_masks_per_image_count_in_the_loaders_favour(masks):
    found = measured(1000, 1900, 950 * masks, masks=masks)
    assert diagnose(found, True, 8)[0] == {1: "loader", 2: "balanced"}[masks]


def test_loader_and_model_may_hold_each_other_up():
    limit, sentence, _ = diagnose(measured(1000, 500, 350), False, 8)
    assert limit == "shared"
    assert "share 8 cores" in sentence
    assert "70% of what the slower one makes alone" in sentence
    assert "the host's processors" in diagnose(measured(1000, 500, 350), True, 8)[1]


def test_only_a_precision_that_was_measured_and_is_faster_is_recommended():
    assert diagnose(measured(1000, 500, 495), False, 8)[2] == []
    assert diagnose(measured(1000, 500, 495, other=520), False, 8)[2] == []
    (line,) = diagnose(measured(1000, 500, 495, other=900), False, 8)[2]
    assert line.startswith("--train.precision bf16: measured in this run, the model alone trains 1.8 times as many")


def test_what_would_help_a_slow_loader_follows_from_what_was_counted(tmp_path, images, monkeypatch):
    trainer = make_trainer(tmp_path / "run", images)
    monkeypatch.setattr(bench, "_mean_pixels", lambda dataset, short_side: (4e5, 1e5))
    options = SimpleNamespace(cores=8, num_threads=2)
    advice = bench._data_advice(trainer.config, trainer.dataset, options, measured(9, 99, 9), "torch", "cuda")
    trainer.run.close()
    threads, dali, shard = advice
    assert threads == "--data.num-threads 8: the loader alone keeps 1.5 of 8 cores busy with 2 threads."
    assert "--data.loader dali" in dali
    assert "4.0 times fewer to decode" in shard


def test_the_trainers_own_steps_are_measured_on_resident_and_on_loaded_batches(tmp_path, images):
    trainer = make_trainer(tmp_path / "run", images, log_every_steps=100)
    trainer.config = config_to_measure(replace(trainer.config, train=replace(trainer.config.train, steps=9)))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    seen = []
    forward = trainer.forward
    trainer.forward = lambda images, **options: seen.append(images) or forward(images, **options)
    found = measure(trainer, 0.2)
    trainer.run.close()
    assert len({len(found.turns[phase]) for phase in PHASES}) == 1
    assert len(found.turns["loader"]) >= 2
    assert all(turn.batches >= 1 and turn.seconds > 0 for turns in found.turns.values() for turn in turns)
    assert all(turn.waited == 0 for turn in found.turns["model"])
    assert any(turn.waited > 0 for turn in found.turns["both"])
    assert min(found.loader_cpu_seconds) > 0
    # Resident batches are one tensor again and again, loaded ones are not.
    assert 1 < len({id(images) for images in seen}) < len(seen)
    assert any(not torch.equal(p.detach(), before[name]) for name, p in trainer.model.named_parameters())
    assert found.stages.keys() == {"data", "masking", "forward", "backward", "optimizer"}


def test_one_optimiser_step_per_batch_is_measured(tmp_path, images):
    trainer = make_trainer(tmp_path / "run", images, batch_size=4, masks_per_image=2)
    trainer.run.close()
    train = config_to_measure(trainer.config).train
    assert (train.global_batch_size, train.batch_size) == (4, 4)
    assert trainer.config.train.global_batch_size == 8


def test_the_command_prints_a_sentence_and_writes_everything(tmp_path, images, capsys):
    out = tmp_path / "deep" / "found.json"
    flags = [*FLAGS.split(), "--data.path", str(images), "--data.loader", "torch", "--seconds", "0.3"]
    assert main(["bench", *flags, "--json", str(out), "--train.masks-per-image", "2"]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    for phase in PHASES:
        assert found[phase]["images_per_second"] > 0
        assert min(found[phase]["rounds"]) <= found[phase]["images_per_second"] <= max(found[phase]["rounds"])
    assert 0 <= found["both"]["data_wait_share"] <= 1
    assert 0 < found["model"]["mfu"] <= 1
    assert f"matrix product in {found['precision']}" in text
    assert found["loader"]["cpu_seconds_per_image"] > 0
    assert (found["loader"]["kind"], found["masks_per_image"]) == ("torch", 2)
    assert found["config"]["data"]["path"] == str(images)
    assert found["step"]["ms"] == pytest.approx(1e3 * 8 / found["both"]["images_per_second"])
    assert found["sentence"] in text
    assert all(line in text for line in found["advice"])
    assert "loader alone" in text


def test_steps_that_are_faster_than_a_product_raise_the_peak(tmp_path, images, capsys, monkeypatch):
    """As where bf16 is emulated: products are slow in it, fp32 is measured beside it, and no utilisation exceeds 1."""
    rates = {torch.bfloat16: 1e6, torch.float32: 1e15}
    monkeypatch.setattr(bench, "matmul_flops", lambda device, dtype, *args, **options: rates[dtype])
    out = tmp_path / "found.json"
    flags = [*FLAGS.split(), "--data.path", str(images), "--data.loader", "torch", "--seconds", "0.1"]
    seen, train_step = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda trainer: seen.append(trainer.dtype) or train_step(trainer))
    assert main(["bench", *flags, "--train.precision", "bf16", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["model"]["matmul_flops_per_second"] == 1e6
    assert max(found["model"]["mfu"], found["both"]["mfu"]) == 1
    assert "the most that these steps reached" in capsys.readouterr().out
    assert set(seen) == {torch.float32, torch.bfloat16}


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
        feed = trainer.loader = bench._Feed(loader)
        trainer.model.train()
        feed.resident = next(feed)
        trainer.train_step()
        trainer.train_step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
