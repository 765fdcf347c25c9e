"""``--train.fit-steps``: the number of steps follows from the first ones' times, and a resumed run keeps it."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from training import FLAGS, make_trainer, write_images

from fastmae import pretraining
from fastmae.cli import main
from fastmae.train import fit_steps, precision
from fastmae.train import trainer as loop
from fastmae.train.checkpoint import load_checkpoint
from fastmae.train.config import to_json
from fastmae.train.fit_steps import LAST, StepFit, with_saved_length
from fastmae.train.precision import Speeds
from fastmae.train.recipes import RECIPES, apply_flags


class Run:
    """What a fit asks of a trainer."""

    def __init__(self, steps: int, answer: int | None = None) -> None:
        self.step, self.length, self.device = 0, None, torch.device("cpu")
        self.schedule = SimpleNamespace(total_steps=steps)
        self.ranks = SimpleNamespace(first=lambda what, function: function() if answer is None else answer)
        self.config = SimpleNamespace(train=SimpleNamespace(max_minutes=1.0))
        self.console = Console(file=io.StringIO())

    def set_length(self, steps: int) -> None:
        self.length = steps


@pytest.mark.parametrize(
    ("deadline", "steps", "answer", "expected"),
    [
        (1000.0, 5000, None, LAST + 460),  # 0.92 of 500 s, at a second a step
        (1000.0, 300, None, 300),  # never more than the most
        (520.0, 5000, None, LAST + 18),
        (400.0, 5000, None, LAST + 1),  # too late already: it ends
        (1000.0, 5000, 77, 77),  # what the first rank says
    ],
)
def test_the_median_of_steps_after_the_first_decides(monkeypatch, deadline, steps, answer, expected):
    # Ten slow first steps, then a second each; one is disturbed. They end 500 s after the fit began to look.
    pauses = [(500 - 29 - 101) / 10] * 10 + [1.0] * 29 + [101.0]
    ends = itertools.accumulate(pauses)
    monkeypatch.setattr(fit_steps, "time", SimpleNamespace(monotonic=lambda: next(ends)))
    run, fit = Run(steps, answer), StepFit(deadline)
    for run.step in range(1, LAST + 1):
        assert run.length is None
        fit.after_step(run)
    assert run.length == expected
    assert "1e+03 ms per step: " in run.console.file.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def test_the_cosine_ends_with_the_run_and_a_resumed_run_keeps_its_length_and_precision(
    tmp_path, images, monkeypatch, capsys
):
    begun, clock = time.monotonic(), itertools.count(1)
    monkeypatch.setattr(fit_steps, "time", SimpleNamespace(monotonic=lambda: begun + 500.0 * next(clock)))
    monkeypatch.setattr(fit_steps, "LAST", 16)
    monkeypatch.setattr(loop, "StepFit", lambda deadline: StepFit(begun + 500.0 * (16 + 15 / 0.92 + 0.1)))
    monkeypatch.setattr(pretraining, "_CROPS", 12)
    monkeypatch.setattr(precision, "measure_products", lambda width: Speeds(fp32=100.0, bf16=200.0))
    flags = [*FLAGS.split(), "--train.fit-steps", "--train.max-minutes", "100", "--train.keep-checkpoints", "100"]
    flags += ["--train.warmup-steps", "100", "--train.log-every-steps", "1", "--report.picture-every-steps", "None"]
    flags += ["--train.precision", "auto"]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    assert main(["pretrain", "--out", str(run), "--data.path", str(images), *flags]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 16 + 15
    peak = RECIPES["photographs"].train.base_lr * 8 / 256
    rates = [row["lr"] for row in rows]
    assert rates[:16] == pytest.approx([peak * step / 100 for step in range(16)])  # the warm-up that was given
    assert rates[-1] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * 24 / 25)))  # the end of a shorter one's
    saved = {
        step: json.loads((run / f"checkpoints/step-{step}/manifest.json").read_text())["config"]["train"]
        for step in (12, 20, 31)
    }
    lengths = {step: [saved[step][name] for name in ("steps", "warmup_steps", "fit_steps")] for step in saved}
    assert lengths == {12: [240, 100, True], 20: [31, 6, False], 31: [31, 6, False]}

    shutil.copytree(run, resumed)
    for step in (24, 28, 31):
        shutil.rmtree(resumed / f"checkpoints/step-{step}")
    monkeypatch.setattr(precision, "measure_products", lambda width: Speeds(fp32=56.0, bf16=1.1))  # another machine
    assert main(["pretrain", "--out", str(resumed), "--resume"]) == 0
    one, other = (load_checkpoint(folder / "checkpoints/step-31") for folder in (run, resumed))
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items() if not name.startswith("rng."))
    assert json.loads((resumed / "metrics.jsonl").read_text().splitlines()[-1])["lr"] == rates[-1]
    assert one[1]["config"]["train"]["precision"] == other[1]["config"]["train"]["precision"] == "bf16"
    assert json.loads((resumed / "config.json").read_text())["train"]["precision"] == "auto"
    printed = capsys.readouterr()
    assert "Precision auto: bf16; matrix" in printed.out
    assert "Precision auto: bf16, as the run began" in printed.out
    assert "run at 0.02 of fp32's rate" in printed.err
    assert "train.precision" not in printed.err.replace("--train.precision", "")


def test_a_run_that_had_not_decided_decides_again_and_others_keep_theirs(tmp_path, images):
    config = make_trainer(tmp_path / "run", images, fit_steps=True, max_minutes=1.0).config
    manifest = {"config": to_json(config)}
    assert with_saved_length(config, None) is config
    assert with_saved_length(config, manifest) is config
    manifest["config"]["train"] |= {"fit_steps": False, "steps": 7, "warmup_steps": 1}
    found = with_saved_length(config, manifest).train
    assert (found.steps, found.warmup_steps, found.fit_steps) == (7, 1, False)


def test_a_length_that_is_named_turns_it_off():
    recipe = RECIPES["photographs"]
    assert recipe.train.fit_steps
    assert not apply_flags(recipe, recipe, {"steps"}).train.fit_steps
    assert not apply_flags(recipe, recipe, {"epochs"}).train.fit_steps
    assert apply_flags(recipe, recipe, {"steps", "fit_steps"}).train.fit_steps
    assert apply_flags(recipe, recipe, {"max_minutes"}).train.fit_steps
