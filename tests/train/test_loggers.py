"""Rows and evaluations reach the files, TensorBoard, the terminal and W&B; what fails there costs rows and no run."""

from __future__ import annotations

import io
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from commands import mistake
from full_disk import files_limited_to
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import make_trainer, write_images

from fastmae.train import loggers
from fastmae.train.config import ReportConfig
from fastmae.train.loggers import JsonLines, Loggers, TensorBoard, Terminal, WeightsAndBiases, open_loggers
from fastmae.train.run_folder import RunFolder
from fastmae.train.trainer import Trainer

ROW = {
    "step": 781_250, "loss": 0.4123, "lr": 2.4e-3, "images_per_second": 123_456.0, "mfu": 0.512, "data_share": 0.034,
    "skipped_steps": 0, "epoch": 400.0,
}  # fmt: skip
OTHERS = {"slowest_host": "node7", "ranks": {"forward_time": [0.01, 0.02]}, "skipped_samples": [{"step": 7}]}


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)).save(path)
    return path


@pytest.fixture
def run(tmp_path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path / "run") as run:
        run.write_json("config.json", {"seed": 5})
        yield run


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def test_a_continued_run_replaces_the_rows_after_its_checkpoint(tmp_path):
    for start, loss in ((0, 1.0), (4, 2.0)):
        board = TensorBoard(tmp_path, start)
        for step in range(start + 2, start + 7, 2):
            board.write({"step": step, "loss": loss})
        board.close()
    values = [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")]
    assert values == [(2, 1.0), (4, 1.0), (6, 2.0), (8, 2.0), (10, 2.0)]


def test_a_line_that_does_not_fit_is_taken_back(run):
    lines = JsonLines(run)
    lines.write({"step": 1, "ranks": {"data_time": [0.5, math.inf]}})
    with files_limited_to(run.metrics.stat().st_size + 5), pytest.raises(OSError, match="No space left"):
        lines.write({"step": 2})
    lines.write({"step": 3})
    assert run.read_metrics() == [{"step": 1, "ranks": {"data_time": [0.5, None]}}, {"step": 3}]


def test_a_full_disk_costs_rows_and_tensorboard_continues_in_a_new_file(run, caplog):
    board = TensorBoard(run.path, 0)
    several = Loggers(board, JsonLines(run))

    def full(*args):
        raise OSError(28, "No space left on device")

    for step in range(1, 5):
        if step in (2, 3):
            board._writer = board._writer or board._open()
            board._writer.add_scalar = full
        several.each(lambda logger, step=step: logger.write({"step": step, "loss": 1.0}))
    several.each(lambda logger: logger.close())
    assert caplog.messages == [
        "TensorBoard: METRICS NOT WRITTEN: [Errno 28] No space left on device. Training continues"
    ]
    found = [events(path) for path in run.path.glob("events.*")]
    assert sorted(event.step for one in found if one.Tags()["scalars"] for event in one.Scalars("train/loss")) == [1, 4]
    assert [row["step"] for row in run.read_metrics()] == [1, 2, 3, 4]


def show(*rows: dict, terminal: bool, width: int = 130) -> str:
    """The last line that a terminal shows, or a file."""
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=terminal, color_system=None, soft_wrap=True, legacy_windows=False
    )
    logger = Terminal(console, 0, lambda: 1_562_500)
    logger._begun -= 123 * 3600 + 59 * 60 + 30  # left then, half way
    for row in rows:
        logger.write(row)
    logger.close()
    text = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", file.getvalue())
    return [line for line in text.replace("\r", "\n").splitlines() if line.strip()][-1].rstrip()


def test_a_terminal_shows_a_bar_and_a_file_whole_lines():
    line = "781250/1562500  epoch 400.0/800  loss 0.4123  lr 2.40e-03  123,456 images/s  MFU 51%  data 3%  123h59m left"
    assert show(ROW, terminal=False) == f"step  {line}"
    assert show(ROW, ROW, terminal=True) == f"####....  {line}"
    assert show(ROW | {"step": 31, "epoch": 0.2}, terminal=False).startswith("step      31/1562500  epoch 0.2/10080.6")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"skipped_steps": 20, "loss": None}, "  loss nan  20 skipped  123,456 images/s  "),
        ({"loss": 8.2e17}, "  loss 8.2e+17  lr"),
        ({"loss": 1234.56}, "  loss 1234.6  lr"),
        ({"images_per_second": 0.034}, "  0.034 images/s  MFU"),
        ({"images_per_second": 9.95}, "  9.9 images/s  MFU"),
        ({"images_per_second": 12.3}, "  12 images/s  MFU"),
    ],
)
def test_values_of_any_size_are_legible(changes, expected):
    assert expected in show(ROW | changes, terminal=False)


def test_without_a_peak_there_is_no_mfu():
    row = {name: value for name, value in ROW.items() if name != "mfu"}
    assert "  123,456 images/s  data 3%  " in show(row, terminal=False)


@pytest.mark.parametrize("width", [70, 80, 100, 130])
def test_a_narrow_terminal_shows_what_matters_most(width):
    line = show(ROW, terminal=True, width=width)
    assert len(line) <= width
    for words in ("781250/1562500", "loss 0.4123", "123,456 images/s", "123h59m left"):
        assert words in line
    assert ("epoch 400.0/800" in line) == (width >= 100)
    assert ("lr 2.40e-03" in line) == (width >= 130)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1h00m")])
def test_times_are_legible(seconds, text):
    assert loggers._clock(seconds) == text


def test_a_pictures_baselines_are_on_the_terminal_once():
    file = io.StringIO()
    logger = Terminal(Console(file=file, width=100, soft_wrap=True), 0, lambda: 100)
    for step, error in ((10, 0.5), (20, 0.25)):
        values = {"crops_mse": error, "crops_mse_mean_color": 0.75}
        logger.evaluation(step, values, {"reconstructions": Path(f"{step}.png")})
        logger.evaluation(step, {"knn_top1": 0.5}, {})
    assert file.getvalue().splitlines() == [
        "step 10: crops_mse 0.5, crops_mse_mean_color 0.75, 10.png", "step 10: knn_top1 0.5",
        "step 20: crops_mse 0.25, 20.png", "step 20: knn_top1 0.5",
    ]  # fmt: skip


@pytest.fixture
def wandb(monkeypatch) -> MagicMock:
    """Stands in for the package."""
    wandb = MagicMock()
    wandb.Image.side_effect = "image {}".format
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def logged(wandb: MagicMock) -> list[dict]:
    return [call.args[0] for call in wandb.init.return_value.log.call_args_list]


def test_a_resumed_wandb_run_is_the_same_and_another_project_has_another(wandb, run):
    for project in ("maps", "maps", "streets"):
        WeightsAndBiases(project, run)
    one, same, other = (call.kwargs["id"] for call in wandb.init.call_args_list)
    assert one == same != other
    assert all(c.kwargs["resume"] == "allow" and c.kwargs["config"] == {"seed": 5} for c in wandb.init.call_args_list)


def test_without_a_connection_the_wandb_run_is_kept_on_disk(wandb, run, caplog):
    wandb.init.side_effect = [RuntimeError("no network.\nlong story"), wandb.init.return_value]
    WeightsAndBiases("maps", run).write({"step": 5, "loss": 0.5})
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert second == first | {"mode": "offline"}
    wandb.teardown.assert_called_once()
    assert len(logged(wandb)) == 1
    assert caplog.messages[0].startswith("Weights & Biases: no network; this run is kept for `wandb sync` in ")


@pytest.mark.parametrize(("fails", "line"), [("init", "Nothing is logged there"), ("log", "METRICS NOT WRITTEN")])
def test_wandb_may_fail(wandb, run, caplog, fails, line):
    failing = wandb.init if fails == "init" else wandb.init.return_value.log
    failing.side_effect = RuntimeError("broken pipe")
    several = open_loggers(run, lambda: Terminal(Console(file=io.StringIO()), 0, lambda: 10), 0, "maps")
    for step in (5, 10):
        several.each(lambda logger, step=step: logger.write(ROW | {"step": step}))
        several.each(lambda logger, step=step: logger.evaluation(step, {"knn": 1.0}, {}))
    several.each(lambda logger: logger.close())
    assert sum(line in message for message in caplog.messages) == 1
    assert [row["step"] for row in run.read_metrics()] == [5, 10]


def test_what_wandb_cannot_send_does_not_hold_up_the_end(wandb, run, monkeypatch, caplog):
    hanging = threading.Event()
    wandb.init.return_value.finish.side_effect = lambda exit_code: hanging.wait()
    monkeypatch.setattr(loggers, "_WANDB_FINISH", 0.05)
    WeightsAndBiases("maps", run).close()
    assert caplog.messages == [
        "Weights & Biases: not everything was sent; `wandb sync` sends the rest from the run folder"
    ]
    hanging.set()


def test_a_missing_wandb_is_named_before_anything_else(capsys, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    assert "--report.wandb-project: expected the package wandb (pip install 'fastmae[wandb]')" in mistake(
        capsys, "pretrain", "--out", tmp_path / "run", "--report.wandb-project", "maps"
    )
    assert not (tmp_path / "run").exists()


def train(out: Path, evaluate: Callable[[Trainer, int], object]) -> Trainer:
    """A run that is logged to W&B too, with things in its rows that are no numbers."""
    trainer = make_trainer(out, write_images(out.parent / "images"), precision="fp32")
    config = replace(trainer.config, report=ReportConfig(wandb_project="maps"))
    trainer = Trainer(config, trainer.task, trainer.run, console=trainer.console)
    trainer.reporter._check = lambda row, values: row.update(OTHERS)
    with trainer.run:
        trainer.fit(on_log=lambda row: evaluate(trainer, row["step"]))
    return trainer


def test_numbers_and_evaluations_are_in_the_files_in_tensorboard_and_in_wandb(wandb, tmp_path, picture):
    values, pictures = {"knn_top1": 0.25}, {"reconstruction": picture}
    run = train(tmp_path / "run", evaluate=lambda t, step: t.reporter.evaluation(step, values, pictures)).run
    found, rows = events(run.path), run.read_metrics()
    names = {name for name in rows[0] if name != "step" and name not in OTHERS}
    assert {"loss", "lr", "grad_norm", "images_per_second", "mfu", "data_share", "host_memory_gib", "samples"} <= names
    charts = {f"train/{name}": [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows] for name in names}
    charts["eval/knn_top1"] = [(row["step"], 0.25) for row in rows]
    assert {n: [(e.step, e.value) for e in found.Scalars(n)] for n in found.Tags()["scalars"]} == charts
    images = found.Images("eval/reconstruction")
    assert [image.step for image in images] == [row["step"] for row in rows]
    with Image.open(picture) as expected, Image.open(io.BytesIO(images[0].encoded_image_string)) as shown:
        assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(expected))
    evaluation = {"step": rows[0]["step"], "knn_top1": 0.25, "reconstruction": str(picture)}
    assert run.read_evaluations()[0] == evaluation
    assert (wandb.init.call_args.kwargs["project"], wandb.init.call_args.kwargs["name"]) == ("maps", "run")
    wandb.init.return_value.define_metric.assert_called_with("*", step_metric="step")
    for row, logged_row, logged_evaluation in zip(rows, logged(wandb)[::2], logged(wandb)[1::2], strict=True):
        assert logged_row == {"step": row["step"], **{f"train/{name}": row[name] for name in names}}
        shown = {"eval/knn_top1": 0.25, "eval/reconstruction": f"image {picture}"}
        assert logged_evaluation == {"step": row["step"], **shown}
    wandb.init.return_value.finish.assert_called_once_with(exit_code=0)


def test_wandb_marks_a_run_that_an_error_ends(wandb, tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", evaluate=lambda trainer, step: 1 / 0)
    wandb.init.return_value.finish.assert_called_once_with(exit_code=1)
