"""``fastmae bench``: counts that are exact, a diagnosis that follows from the numbers, and a complete report."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from commands import mistake
from PIL import Image
from training import FLAGS, MODEL, TRAIN, make_trainer, write_images

from fastmae import data
from fastmae.cli import bench, main
from fastmae.cli.bench import PHASES, Measured, config_to_measure, diagnose, measure
from fastmae.train.autotune import Speeds
from fastmae.train.config import DataConfig, PretrainConfig


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def measured(loader: float, model: float, both: float, *, masks: int = 1) -> Measured:
    """Three rounds of these rates in images per second, the middle one half as fast as the others."""
    found = Measured(decoded=10, masked=10 * masks)
    for name, value in {"loader": loader, "model": model, "both": both, "cpu_seconds": 1.5 / loader}.items():
        found.rounds[name] = [value, value / 2, value]
    return found


def test_rates_are_medians_of_rounds_and_ratios_are_taken_within_them():
    found = measured(40, 100, 36, masks=2)
    found.rounds["both"][2] = 1.0
    assert found.median("loader") == 40
    assert found.together() == pytest.approx(36 / 80)


@pytest.mark.parametrize(
    ("rates", "masks", "limit", "words"),
    [
        ((1000, 500, 495), 1, "model", "The model is the bottleneck: the loader is 2.0 times faster."),
        ((1000, 2000, 990), 1, "loader", "it makes 1,000 images/s, the model could train 2,000."),
        ((1000, 1900, 950), 1, "loader", "it makes 1,000 images/s, the model could train 1,900."),
        ((1000, 1900, 1900), 2, "balanced", "equally fast: 2,000 and 1,900 images/s."),
        ((1000, 500, 350), 1, "shared", "share 8 cores and hold each other up"),
    ],
)
def test_the_bottleneck_follows_from_the_rates(rates, masks, limit, words):
    found, sentence = diagnose(measured(*rates, masks=masks), False, 8)
    assert found == limit
    assert words in sentence


def test_on_a_gpu_loader_and_model_share_the_hosts_processors():
    sentence = diagnose(measured(1000, 500, 350), True, 8)[1]
    assert "share the host's processors" in sentence
    assert "350 images/s, 70% of what the slower one makes alone" in sentence


def test_what_would_help_a_slow_loader_follows_from_what_was_counted(tmp_path):
    for name, size in {"large": (1600, 800), "small": (30, 40)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.jpg")
    config = PretrainConfig(data=DataConfig(path=tmp_path), model=replace(MODEL, img_size=350))
    dataset = data.open_dataset(tmp_path)
    loader = SimpleNamespace(kind="torch", options=SimpleNamespace(cores=8, num_threads=2))
    threads, dali, shard = bench.data_advice(config, dataset, loader, measured(9, 99, 9), on_gpu=True)
    assert threads == "--data.num-threads 8: the loader alone keeps 1.5 of 8 cores busy with 2 threads."
    assert "--data.loader dali" in dali
    assert shard == (
        f"fastmae data shard {tmp_path} OUT --short-side 400: images have 0.64 megapixels on average and would have "
        "0.16, 4.0 times fewer to decode."
    )


def test_the_trainers_own_steps_are_measured_on_resident_and_on_loaded_batches(tmp_path, images):
    trainer = make_trainer(tmp_path / "run", images, log_every_steps=100, precision="fp32")
    trainer.config = config_to_measure(replace(trainer.config, train=replace(trainer.config.train, steps=9)))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    seen = []
    forward = trainer.forward
    trainer.forward = lambda images, **options: seen.append(images) or forward(images, **options)
    found = measure(trainer, 0.2)
    trainer.run.close()
    assert len({len(found.rounds[name]) for name in (*PHASES, "wait", "cpu_seconds", "matmul_flops")}) == 1
    assert len(found.rounds["loader"]) >= 2
    assert all(rate > 0 for phase in PHASES for rate in found.rounds[phase])
    assert all(0 < share < 1 for share in found.rounds["wait"])
    assert min(found.rounds["cpu_seconds"]) > 0
    # Resident batches are one tensor again and again, loaded ones are not.
    assert 1 < len({id(images) for images in seen}) < len(seen)
    assert any(not torch.equal(p.detach(), before[name]) for name, p in trainer.model.named_parameters())
    assert found.stages.keys() == {"data", "masking", "forward", "backward", "optimizer"}


def test_one_optimiser_step_per_batch_is_measured():
    config = PretrainConfig(train=replace(TRAIN, batch_size=4, masks_per_image=2))
    train = config_to_measure(config).train
    assert (train.global_batch_size, train.batch_size) == (4, 4)
    assert config.train.global_batch_size == 8


def test_the_command_prints_a_sentence_and_writes_everything(tmp_path, images, capsys, monkeypatch):
    """Where bf16 is emulated: its products are slow, which is reported, and no utilisation exceeds 1."""
    monkeypatch.setattr(bench, "matmul_flops", lambda device, dtype, **options: 1e6)
    monkeypatch.setattr("fastmae.train.autotune.measure_products", lambda width: Speeds(fp32=100.0, bf16=1.0))
    out = tmp_path / "deep" / "found.json"
    flags = [*FLAGS.split(), "--data.path", str(images), "--data.loader", "torch", "--seconds", "0.3"]
    flags += ["--train.masks-per-image", "2", "--train.precision", "bf16", "--json", str(out)]
    assert main(["bench", *flags]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    for phase in PHASES:
        assert found[phase]["images_per_second"] > 0
        assert min(found[phase]["rounds"]) <= found[phase]["images_per_second"] <= max(found[phase]["rounds"])
    assert 0 <= found["both"]["data_wait_share"] <= 1
    assert found["model"]["matmul_flops_per_second"] == 1e6
    assert max(found["model"]["mfu"], found["both"]["mfu"]) == 1
    assert "the most that these steps reached, more than a large matrix product in bf16" in text
    assert "--train.precision bf16: matrix products run at 0.01 of fp32's rate on this CPU" in text
    assert found["loader"]["cpu_seconds_per_image"] > 0
    assert (found["loader"]["kind"], found["masks_per_image"]) == ("torch", 2)
    assert found["config"]["data"]["path"] == str(images)
    assert found["step"]["ms"] == pytest.approx(1e3 * 8 / found["both"]["images_per_second"])
    assert found["sentence"] in text
    assert all(line in text for line in found["advice"])
    assert "loader alone" in text


def test_mistakes(capsys):
    assert "--seconds: expected a positive number, got 0" in mistake(capsys, "bench", "--seconds", 0)
    assert "/no/such/folder" in mistake(capsys, "bench", "--data.path", "/no/such/folder")
    assert "--model.mask-ratio" in mistake(capsys, "bench", "--model.mask-ratio", 1.5)


def test_several_processes_are_refused(capsys, monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert "expected to be started alone, got 4 processes of torchrun" in mistake(capsys, "bench")
