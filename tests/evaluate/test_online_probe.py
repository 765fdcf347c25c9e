"""The probe of features during a run: when it is due, that it changes nothing, what it says, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training import make_trainer

from fastmae import data
from fastmae.cli import main
from fastmae.evaluate.callbacks import Pictures, Probe
from fastmae.train.callbacks import Callback
from fastmae.train.checkpoint import Ranks
from fastmae.train.config import ReportConfig
from fastmae.train.liveness import StopRequest

COLORS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def write_classes(folder: Path, per_class=10, colors=COLORS, shuffled=False) -> Path:
    """A folder a class, of noisy images of one colour each; or of any colour."""
    generator = np.random.default_rng(0)
    colors_of = list(colors.values()) * per_class
    if shuffled:
        generator.shuffle(colors_of)
    for i, color in enumerate(colors_of):
        name = list(colors)[i % len(colors)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = np.array(color) + generator.integers(-30, 30, (40, 50, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_classes(tmp_path_factory.mktemp("images") / "colors")


def probed(out: Path, images: Path, report: ReportConfig | None, **options):
    trainer = make_trainer(out, images, **options)
    if report:
        config = replace(trainer.config, report=report)
        trainer.callbacks = [Probe(config, trainer.dataset, Ranks())]
    return trainer


def said(trainer) -> str:
    """What a run printed, without the breaks of its lines."""
    return " ".join(trainer.console.file.getvalue().split())


def evaluations(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_the_training_is_the_same_bit_for_bit(tmp_path, images):
    weights = []
    for name, report in (("plain", None), ("probed", ReportConfig(probe_every_epochs=1))):
        trainer = probed(tmp_path / name, images, report, options={"progressive_sizes": (16, 32)})
        trainer.fit()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [row["step"] for row in evaluations(tmp_path / "probed")] == [4, 8, 12]  # the last one once


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, [4, 8, 12]), (1.25, [5, 10]), (0.5, [2, 4, 6, 8, 10, 12]), (0.01, range(1, 13)), (9, [])]
)
def test_it_is_due_in_the_step_that_ends_an_interval_of_epochs(tmp_path, images, epochs, steps):
    probe = Probe(
        replace(make_trainer(tmp_path / "run", images).config, report=ReportConfig(probe_every_epochs=epochs)),
        data.open_dataset(images),
        Ranks(),
    )
    assert [step for step in range(1, 13) if probe.is_due(step)] == list(steps)  # 30 images, 8 a step


def test_easy_classes_are_told_apart_and_shuffled_ones_are_not(tmp_path, images):
    report = ReportConfig(probe_every_epochs=1.25)
    trainer = probed(tmp_path / "run", images, report)
    trainer.fit()
    rows = evaluations(tmp_path / "run")
    assert [row["step"] for row in rows] == [5, 10, 12]  # the last one is that of the end
    assert all(row["knn_top1"] == row["linear_top1"] == row["linear_top1_class_token"] == 1.0 for row in rows)
    assert "Probe every 1.25 epochs: 27 images of 3 classes to learn from, 3 of colors to test on" in said(trainer)
    assert "step 5: knn_top1 1" in said(trainer)
    shuffled = write_classes(tmp_path / "shuffled", 20, shuffled=True)
    tests = write_classes(tmp_path / "tests", 10)
    probed(tmp_path / "other", shuffled, replace(report, probe_path=tests)).fit()
    row = evaluations(tmp_path / "other")[-1]
    assert max(row["knn_top1"], row["linear_top1"]) < 0.75


def test_weights_that_are_not_finite_are_said_and_do_not_end_the_run(tmp_path, images):
    trainer = probed(tmp_path / "run", images, ReportConfig(probe_every_epochs=1), steps=4)
    with torch.no_grad():
        trainer.model.norm.bias.fill_(torch.nan)
    trainer.fit()
    assert "step 4: no probe: features: expected finite numbers" in said(trainer)
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


def test_the_end_of_the_time_is_probed_too_but_not_a_signal(tmp_path, images):
    rows, stop = {}, StopRequest()
    for name, options in (("time", {"max_minutes": 0.3 / 60}), ("signal", {})):
        report = ReportConfig(probe_every_epochs=1e9)
        trainer = probed(tmp_path / name, images, report, steps=10**6, **options)
        if name == "signal":
            trainer.callbacks.insert(0, Signal(stop))
            trainer._stop = stop
        assert trainer.fit() == ("preempted" if name == "signal" else "finished")
        path = tmp_path / name / "evaluations.jsonl"
        rows[name] = evaluations(tmp_path / name) if path.exists() else []
    assert [row["step"] for row in rows["time"]] == [
        json.loads((tmp_path / "time" / "status.json").read_text())["step"]
    ]
    assert rows["signal"] == []


class Signal(Callback):
    """Asks the run to leave after its third step."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def after_step(self, trainer) -> None:
        if trainer.step == 3:
            self.stop.requested = "SIGTERM"


FLAGS = {"model.img-size": 32, "model.patch-size": 8, "model.depth": 1, "train.steps": 4, "train.global-batch-size": 8}
FLAGS |= {"train.num-threads": 1, "train.precision": "fp32"}
FLAGS |= {"report.probe-every-epochs": 1, "report.picture-every-steps": 2}


def run(**flags) -> int:
    threads = torch.get_num_threads()
    try:
        given = FLAGS | {name.replace("_", "-").replace("--", "."): value for name, value in flags.items()}
        return main(["pretrain", *(text for key, value in given.items() for text in (f"--{key}", str(value)))])
    finally:
        torch.set_num_threads(threads)


def test_the_command_draws_probes_and_says_so(tmp_path, images, capsys):
    out = tmp_path / "run"
    tests = write_classes(tmp_path / "tests", 2)
    assert run(data__path=images, out=out, report__probe_path=tests, report__probe_images=12) == 0
    names = {path.name for path in (out / "reconstructions").iterdir()}
    assert names == {"step-000002.png", "step-000004.png", "final.png"}
    printed = capsys.readouterr().out
    assert "12 images of 3 classes to learn from, 6 of tests to test on" in printed
    assert "step 4: crops_mse " in printed
    assert "step 4: knn_top1 " in printed
    found = json.loads((out / "summary.json").read_text())["evaluations"]
    assert found["knn_top1"] == found["linear_top1"] == 1.0
    assert found["crops_mse"] == [row for row in evaluations(out) if "crops_mse" in row][-1]["crops_mse"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("photographs", "--report.probe-every-epochs: the images of photographs have no labels; expected a folder a"),
        ("one class", "--report.probe-every-epochs: expected images of at least two classes in one, got one"),
        ("few", "--report.probe-every-epochs: expected at least 10 labelled images to hold some out, got 9"),
        ("other classes", "--report.probe-path: expected classes of colors (blue, green, red) in strange, got cat"),
        ("no path", "--report.probe-path: "),
        ("same images", "--report.probe-path: expected other images than those to train on, got the same, "),
        ("many classes", "--report.probe-images: expected some images of each class to learn from, got 27 that have"),
    ],
)
def test_what_cannot_be_probed_is_an_error_before_the_training(tmp_path, images, capsys, case, message):
    flags = {"out": tmp_path / "run"}
    if case != "photographs":
        flags["data__path"] = images
    if case == "one class":
        flags["data__path"] = write_classes(tmp_path / "one", colors={"red": (200, 40, 40)})
    if case == "few":
        flags["report__probe_images"] = 9
    if case == "other classes":
        flags["report__probe_path"] = write_classes(tmp_path / "strange", 1, {"cat": (0, 0, 0)})
    if case == "same images":
        flags["report__probe_path"] = images
    if case == "no path":
        flags["report__probe_path"] = tmp_path / "nowhere"
    if case == "many classes":
        flags["data__path"] = write_classes(tmp_path / "many", 1, {f"{i:02}": (9, 8, i) for i in range(30)})
    assert run(**flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


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
