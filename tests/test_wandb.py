"""Weights & Biases gets rows and pictures of one run per run folder; what goes wrong there the training survives.

A small module of the same functions stands in for the package, which need not be installed.
"""

from __future__ import annotations

import json
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from training import make_trainer, write_images

from fastmae.cli import main
from fastmae.train.run_folder import RunFolder
from fastmae.train.telemetry import wandb_sink
from fastmae.train.telemetry.wandb_sink import WeightsAndBiases

SIZES = {"img-size": 32, "patch-size": 8, "embed-dim": 32, "depth": 1, "num-heads": 2}
SIZES |= {"decoder-embed-dim": 16, "decoder-depth": 1, "decoder-num-heads": 2}
TRAIN = {"global-batch-size": 4, "steps": 2, "warmup-steps": 1, "log-every-steps": 1, "device": "cpu"}
TRAIN |= {"num-threads": torch.get_num_threads()}
SECTIONS = {"model": SIZES, "train": TRAIN}
FLAGS = [text for s, v in SECTIONS.items() for k, x in v.items() for text in (f"--{s}.{k}", str(x))]


class Fake:
    """The package wandb, as far as it is used, and what came to it."""

    def __init__(self, fails: tuple[str, ...] = ()) -> None:
        self.fails, self.started, self.logged, self.defined, self.done = fails, [], [], [], []
        self.hanging = threading.Event()

    def Settings(self, **options) -> dict:
        return options

    def Image(self, path: str) -> str:
        return f"image {path}"

    def init(self, **options) -> SimpleNamespace:
        self.started.append(options)
        if ("init" in self.fails and "mode" not in options) or "offline" in self.fails:
            raise RuntimeError("no network.\nlong story")
        return SimpleNamespace(define_metric=self.define, log=self.log, finish=self.finish)

    def define(self, name: str, **options) -> None:
        self.defined.append((name, options))

    def log(self, values: dict) -> None:
        if "log" in self.fails:
            raise OSError("broken pipe")
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        if "hang" in self.fails:
            self.hanging.wait()
        self.done.append(exit_code)

    def teardown(self) -> None:
        self.done.append("teardown")


@pytest.fixture
def install(monkeypatch):
    def install(*fails: str) -> Fake:
        fake = Fake(fails)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


@pytest.fixture
def run(tmp_path):
    with RunFolder(tmp_path / "run") as run:
        yield run


def test_rows_and_evaluations_arrive(install, run):
    fake, said = install(), []
    sink = WeightsAndBiases("maps", run, {"seed": 3}, said.append)
    sink.write({"step": 5, "loss": 0.5, "block_time_max_host": "node", "ranks": {"data_time": [0.1, None]}})
    sink.evaluate(6, {"knn_top1": 0.25}, {"reconstruction": run.path / "a.png"})
    sink.close()
    (options,) = fake.started
    assert (options["project"], options["name"], options["config"]) == ("maps", "run", {"seed": 3})
    assert ("*", {"step_metric": "step"}) in fake.defined
    assert fake.logged == [
        {"step": 5, "train/loss": 0.5, "ranks/data_time/0": 0.1},
        {"step": 6, "eval/knn_top1": 0.25, "eval/reconstruction": f"image {run.path / 'a.png'}"},
    ]
    assert fake.done == [0]
    assert said == []


def test_a_resumed_run_is_the_same_and_another_project_has_another(install, run):
    fake = install()
    for project in ("maps", "maps", "streets"):
        WeightsAndBiases(project, run, {}, print).close()
    one, same, other = (options["id"] for options in fake.started)
    assert one == same != other
    assert {options["resume"] for options in fake.started} == {"allow"}


def test_without_a_connection_the_run_is_kept_on_disk(install, run):
    fake, said = install("init"), []
    sink = WeightsAndBiases("maps", run, {}, said.append)
    sink.write({"step": 5, "loss": 0.5})
    assert fake.started[1] == fake.started[0] | {"mode": "offline"}
    assert fake.done == ["teardown"]
    assert len(fake.logged) == 1
    (line,) = said
    assert line.startswith("Weights & Biases: no network; this run is kept for `wandb sync` in ")


@pytest.mark.parametrize(("fails", "lines"), [(("init", "offline"), 2), (("log",), 1)])
def test_what_fails_is_said_once_and_then_left_alone(install, run, fails, lines):
    fake, said = install(*fails), []
    sink = WeightsAndBiases("maps", run, {}, said.append)
    for step in (5, 10):
        sink.write({"step": step, "loss": 0.5})
        sink.evaluate(step, {"knn": 1.0}, {})
    sink.close()
    assert len(said) == lines
    assert said[-1].endswith("nothing more is logged there, the training goes on")
    assert fake.logged == []
    assert not {0, 1} & set(fake.done)


def test_what_cannot_be_sent_does_not_hold_up_the_end(install, run, monkeypatch):
    fake, said = install("hang"), []
    monkeypatch.setattr(wandb_sink, "_FINISH_SECONDS", 0.05)
    WeightsAndBiases("maps", run, {}, said.append).close()
    assert said == ["Weights & Biases: not all has been sent; `wandb sync` sends the rest from the run folder"]
    fake.hanging.set()


def test_a_run_that_an_error_ends_has_failed(install, tmp_path):
    fake = install()
    trainer = make_trainer(tmp_path / "run", write_images(tmp_path / "images"))
    trainer.reporter._wandb_project = "maps"

    def fail() -> None:
        raise ZeroDivisionError

    trainer.train_step = fail
    with pytest.raises(ZeroDivisionError), trainer.run:
        trainer.fit()
    assert fake.done == [1]


def test_a_missing_package_is_named_before_anything_else(capsys, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(wandb_sink, "find_spec", lambda name: None)
    assert main(["pretrain", "--out", str(tmp_path / "run"), *FLAGS, "--report.wandb-project", "maps"]) == 2
    error = capsys.readouterr().err
    assert "--report.wandb-project: expected the package wandb (pip install 'fastmae[wandb]')" in error
    assert not (tmp_path / "run").exists()


def test_a_run_sends_its_rows_and_only_if_asked_to(install, tmp_path):
    fake, images = install(), write_images(tmp_path / "images")
    for name, more in (("quiet", []), ("told", ["--report.wandb-project", "maps"])):
        assert main(["pretrain", "--out", str(tmp_path / name), "--data.path", str(images), *FLAGS, *more]) == 0
        assert (tmp_path / name / "wandb.json").exists() == (name == "told")
    (options,) = fake.started
    assert options["config"]["report"]["wandb_project"] == "maps"
    rows = [json.loads(line) for line in (tmp_path / "told/metrics.jsonl").read_text().splitlines()]
    sent = [values for values in fake.logged if "train/loss" in values]
    assert [(values["step"], values["train/loss"]) for values in sent] == [(row["step"], row["loss"]) for row in rows]
