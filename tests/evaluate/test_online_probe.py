"""The probe of features during a run: when it is due, that it changes nothing, what it says, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_evaluate_features import write_classes
from training import FLAGS, TRAIN, make_trainer

from fastmae import data, pretraining
from fastmae.cli import main
from fastmae.evaluate.callbacks import Pictures, Probe
from fastmae.train.callbacks import Callback
from fastmae.train.checkpoint import Ranks
from fastmae.train.config import DataConfig, PretrainConfig, ReportConfig
from fastmae.train.liveness import StopRequest
from fastmae.train.run_folder import read_rows


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_classes(tmp_path_factory.mktemp("images") / "colors")


def probed(out: Path, images: Path, report: ReportConfig | None, **options):
    trainer = make_trainer(out, images, **{"precision": "fp32"} | options)
    if report:
        config = replace(trainer.config, report=report)
        trainer.callbacks = [Probe(config, trainer.dataset, Ranks())]
    return trainer


def said(trainer) -> str:
    """What a run printed, without the breaks of its lines."""
    return " ".join(trainer.console.file.getvalue().split())


def evaluations(run: Path) -> list[dict]:
    return read_rows(run / "evaluations.jsonl")


def test_easy_classes_are_told_apart_and_the_training_is_the_same_bit_for_bit(tmp_path, images):
    weights = []
    for name, report in (("plain", None), ("run", ReportConfig(probe_every_epochs=1.25))):
        trainer = probed(tmp_path / name, images, report, options={"progressive_sizes": (16, 32)})
        trainer.fit()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    rows = evaluations(tmp_path / "run")
    assert [row["step"] for row in rows] == [5, 10, 12]  # the last one is that of the end
    assert all(row["knn_top1"] == row["linear_top1"] == row["linear_top1_class_token"] == 1.0 for row in rows)
    assert "Probe every 1.25 epochs: 27 images of 3 classes to learn from, 3 of colors to test on" in said(trainer)
    assert "step 5: knn_top1 1" in said(trainer)


def test_it_is_due_in_the_step_that_ends_an_interval_of_epochs(images):
    dataset, train = data.open_dataset(images), replace(TRAIN, global_batch_size=8)
    for epochs, steps in {1: [4, 8, 12], 1.25: [5, 10], 0.5: [2, 4, 6, 8, 10, 12], 0.01: range(1, 13), 9: []}.items():
        report = ReportConfig(probe_every_epochs=epochs)
        probe = Probe(PretrainConfig(data=DataConfig(path=images), train=train, report=report), dataset, Ranks())
        assert [step for step in range(1, 13) if probe.is_due(step)] == list(steps), epochs  # 30 images, 8 a step


def test_features_that_are_not_finite_are_reported_and_do_not_end_the_run(tmp_path, images):
    trainer = probed(tmp_path / "run", images, ReportConfig(probe_every_epochs=1), steps=1, warmup_steps=0)
    with torch.no_grad():
        trainer.model.norm.bias.fill_(torch.nan)
    assert trainer.fit() == "finished"
    assert "step 1: no probe: features: expected finite numbers" in said(trainer)
    assert evaluations(tmp_path / "run") == []


def test_a_run_is_probed_at_its_time_limit_but_not_after_a_signal(tmp_path, images):
    report, stop = ReportConfig(probe_every_epochs=1e9), StopRequest()
    trainer = probed(tmp_path / "time", images, report, max_minutes=1e-9)
    assert trainer.fit() == "finished"
    assert [row["step"] for row in evaluations(tmp_path / "time")] == [trainer.step]
    assert trainer.step < 12
    trainer = probed(tmp_path / "signal", images, report)
    trainer.callbacks.insert(0, Signal(stop))
    trainer._stop = stop
    assert trainer.fit() == "preempted"
    assert evaluations(tmp_path / "signal") == []


class Signal(Callback):
    """Asks the run to leave after its third step."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def after_step(self, trainer) -> None:
        if trainer.step == 3:
            self.stop.requested = "SIGTERM"


def pretrain(*more: object) -> int:
    flags = [*FLAGS.split(), "--train.steps", "4", "--train.warmup-steps", "1", "--report.picture-every-steps", "4"]
    return main(["pretrain", *flags, "--report.probe-every-epochs", "1", *map(str, more)])


def test_the_command_draws_probes_and_says_so(tmp_path, images, capsys, monkeypatch):
    monkeypatch.setattr(pretraining, "_CROPS", 12)
    out, tests = tmp_path / "run", write_classes(tmp_path / "tests", 2)
    flags = ["--data.path", images, "--report.probe-path", tests, "--report.probe-images", 12]
    assert pretrain("--out", out, *flags) == 0
    assert {path.name for path in (out / "reconstructions").iterdir()} == {"step-000004.png", "final.png"}
    printed = capsys.readouterr().out
    assert "12 images of 3 classes to learn from, 6 of tests to test on" in printed
    assert "step 4: crops_mse " in printed
    assert "step 4: knn_top1 " in printed
    found = json.loads((out / "summary.json").read_text())["evaluations"]
    assert found["knn_top1"] == found["linear_top1"] == 1.0
    assert found["crops_mse"] == [row for row in evaluations(out) if "crops_mse" in row][-1]["crops_mse"]


def test_what_cannot_be_probed_is_an_error_before_the_training(tmp_path, images, capsys):
    assert pretrain("--out", tmp_path / "run") == 2  # the photographs
    error = "--report.probe-every-epochs: the images of photographs have no labels; expected a folder per class"
    assert error in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_images_that_cannot_be_probed_are_refused(tmp_path, images):
    one = write_classes(tmp_path / "one", colors={"red": (200, 40, 40)})
    strange = write_classes(tmp_path / "strange", 1, {"cat": (0, 0, 0)})
    many = write_classes(tmp_path / "many", 1, {f"{i:02}": (9, 8, i) for i in range(30)})
    for path, options, message in [
        (one, {}, "--report.probe-every-epochs: expected images of at least two classes in one, got one"),
        (images, {"probe_images": 9}, "--report.probe-every-epochs: expected at least 10 labelled images .*, got 9"),
        (images, {"probe_path": strange}, "--report.probe-path: expected classes of colors .* in strange, got cat"),
        (images, {"probe_path": images}, "--report.probe-path: expected other images than those to train on, got"),
        (images, {"probe_path": tmp_path / "nowhere"}, "--report.probe-path: "),
        (many, {}, "--report.probe-images: expected some images of each class to learn from, got 27 that have"),
    ]:
        report = ReportConfig(probe_every_epochs=1, **options)
        with pytest.raises(ValueError, match=message):
            Probe(PretrainConfig(data=DataConfig(path=path), report=report), data.open_dataset(path), Ranks())


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_training_is_the_same_when_it_is_looked_at(tmp_path, images, compiled):
    weights, report = [], ReportConfig(probe_every_epochs=1, picture_every_steps=3)
    for name in ("plain", "observed"):
        trainer = make_trainer(tmp_path / name, images, device="cuda", compile="model" if compiled else "none")
        if name == "observed":
            config = replace(trainer.config, report=report)
            trainer.callbacks = [Pictures(config, trainer.dataset), Probe(config, trainer.dataset, Ranks())]
        trainer.fit()
        weights.append(trainer.model.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)
    rows = evaluations(tmp_path / "observed")
    assert all(row["linear_top1"] == 1.0 for row in rows if "linear_top1" in row)
    assert len(rows) == 3 + 4
