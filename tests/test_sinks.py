"""Rows and evaluations arrive in the files, in TensorBoard and on the terminal under their names."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import make_trainer, write_images

from fastmae.train.flops import count_flops
from fastmae.train.telemetry import peak
from fastmae.train.telemetry.peak import matmul_flops, peak_flops
from fastmae.train.telemetry.sinks import JsonLines, TensorBoard, Terminal, _clock, scalars

CPU = torch.device("cpu")
ROW = {
    "step": 781_250, "loss": 0.4123, "lr": 2.4e-3, "images_per_second": 123_456.0, "mfu": 0.512, "data_share": 0.034,
    "skipped_steps": 0,
}  # fmt: skip
SEVERAL = {"block_time_max_host": "node7", "ranks": {"block_time": [0.01, None, 0.02]}}


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)).save(path)
    return path


def events(folder) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def test_all_numbers_of_a_run_are_in_tensorboard(tmp_path):
    trainer = make_trainer(tmp_path / "run", write_images(tmp_path / "images"))
    with trainer.run as run:
        run.write_json("config.json", {"seed": 5})
        trainer.fit()
    found, rows = events(run.path), run.read_metrics()
    names = {"loss", "lr", "grad_norm", "images_per_second", "mfu", "tflops_per_second", "data_share", "data_time"}
    names |= {"step_time", "host_memory_gib", "samples", "epoch", "skipped_steps", "bad_files"}
    assert names <= rows[0].keys()
    assert {f"train/{name}" for row in rows for name in row if name != "step"} == set(found.Tags()["scalars"])
    for name in names:
        values = [(event.step, event.value) for event in found.Scalars(f"train/{name}")]
        assert values == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    (text,) = found.Tensors("config/text_summary")
    assert text.tensor_proto.string_val[0].decode() == '    {\n      "seed": 5\n    }'


def test_mfu_is_the_flops_of_the_steps_over_the_time_and_the_peak(tmp_path):
    trainer = make_trainer(tmp_path / "run", write_images(tmp_path / "images"), batch_size=2)
    with trainer.run as run:
        trainer.fit()
    flops = 4 * count_flops(trainer.model.architecture, 2, 0.75)
    for row in run.read_metrics():
        rate = flops / row["step_time"]
        assert row["tflops_per_second"] == pytest.approx(rate / 1e12)
        assert row["mfu"] == pytest.approx(rate / peak_flops(CPU, torch.bfloat16))
        assert row["images_per_second"] == pytest.approx(8 / row["step_time"])


def test_the_peak_is_measured_once(monkeypatch):
    measured = []
    monkeypatch.setattr(peak, "matmul_flops", lambda *args: measured.append(args) or 1e12)
    peak._peak_flops.cache_clear()
    assert [peak_flops(CPU, torch.float32) for _ in range(3)] == [1e12] * 3
    peak_flops(CPU, torch.bfloat16)
    assert [(device, dtype) for device, dtype, *_ in measured] == [(CPU, torch.float32), (CPU, torch.bfloat16)]
    peak._peak_flops.cache_clear()


def test_a_peak_that_cannot_be_measured_is_none_and_a_run_goes_on_without(tmp_path, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(peak, "matmul_flops", fail)
    peak._peak_flops.cache_clear()
    trainer = make_trainer(tmp_path / "run", write_images(tmp_path / "images"))
    with trainer.run as run:
        trainer.fit()
    peak._peak_flops.cache_clear()
    for row in run.read_metrics():
        assert "mfu" not in row
        assert row["tflops_per_second"] > 0


def test_the_matmul_rate_counts_its_products(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(peak.time, "perf_counter", lambda: float(next(ticks)))
    state = torch.get_rng_state()
    assert matmul_flops(CPU, torch.float32, rounds=3, size=64) == 2 * 64**3  # a second each
    torch.set_rng_state(state)
    peak._peak_flops.cache_clear()
    peak_flops(CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)  # a run draws what it would have drawn
    peak._peak_flops.cache_clear()


@pytest.mark.gpu
def test_the_peak_of_a_gpu_is_measured_in_little_time_and_memory():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    device = torch.device("cuda")
    assert peak_flops(device, torch.bfloat16) == pytest.approx(matmul_flops(device, torch.bfloat16), rel=0.2)
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before < 2**30


@pytest.mark.gpu
def test_rows_of_a_gpu_have_its_memory_and_a_share_of_its_peak(tmp_path):
    trainer = make_trainer(tmp_path / "run", write_images(tmp_path / "images"), device="cuda", steps=20)
    with trainer.run as run:
        trainer.fit()
    for row in run.read_metrics():
        assert 0 < row["peak_memory_gib"] < 0.5  # without the matrices of the measurement
        assert 0 < row["mfu"] < 1
        assert row["host_memory_gib"] > 0


def test_charts_are_named_by_part_and_rank():
    found = scalars(ROW | SEVERAL)
    assert found["train/mfu"] == 0.512
    assert {name: v for name, v in found.items() if name.startswith("ranks/")} == {
        "ranks/block_time/0": 0.01, "ranks/block_time/2": 0.02
    }  # fmt: skip
    assert not {"train/step", "train/block_time_max_host", "train/ranks"} & found.keys()


def test_evaluations_are_in_tensorboard_and_in_a_file(tmp_path, picture):
    for sink in (TensorBoard(tmp_path, 0), JsonLines(tmp_path / "metrics.jsonl", tmp_path / "evaluations.jsonl")):
        sink.evaluate(7, {"knn_top1": 0.25}, {"reconstruction": picture})
        sink.close()
    found = events(tmp_path)
    (value,) = found.Scalars("eval/knn_top1")
    assert (value.step, value.value) == (7, 0.25)
    (image,) = found.Images("eval/reconstruction")
    assert image.step == 7
    with Image.open(picture) as expected, Image.open(io.BytesIO(image.encoded_image_string)) as shown:
        assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(expected))
    assert json.loads((tmp_path / "evaluations.jsonl").read_text()) == {
        "step": 7, "knn_top1": 0.25, "reconstruction": str(picture)
    }  # fmt: skip


def test_a_continued_run_replaces_the_rows_after_its_checkpoint(tmp_path):
    for start, loss in ((0, 1.0), (4, 2.0)):
        board = TensorBoard(tmp_path, start)
        for step in range(start + 2, start + 7, 2):
            board.write({"step": step, "loss": loss})
        board.close()
    values = [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")]
    assert values == [(2, 1.0), (4, 1.0), (6, 2.0), (8, 2.0), (10, 2.0)]


def show(*rows: dict, terminal: bool, width: int = 100) -> list[str]:
    """What a terminal shows, or a file."""
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=terminal, color_system=None, soft_wrap=True, legacy_windows=False
    )
    sink = Terminal(console, 0, 1_562_500, deadline=float("inf"))
    sink._begun -= 123 * 3600 + 59 * 60 + 30  # left then, half way
    for row in rows:
        sink.write(row)
    sink.close()
    text = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", file.getvalue())
    return [line for line in text.replace("\r", "\n").splitlines() if line.strip()]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"skipped_steps": 20, "loss": None}, {"data_share": 0.99}, {"loss": 8.2e17}, {"loss": 1234.56}]
)
def test_the_terminals_line_fits_100_columns(terminal, changes):
    line = show(ROW | changes, terminal=terminal)[-1]
    assert len(line.rstrip()) <= 100
    for words in (
        "781250/1562500",
        "123,456 images/s",
        "MFU 51%",
        "data 99%" if "data_share" in changes else "data 3%",
    ):
        assert words in line
    assert "123h59m left" in line
    loss = {None: "loss nan  20 skipped", 8.2e17: "loss 8e+17  lr", 1234.56: "loss 1234.6  lr"}
    assert loss.get(changes.get("loss", 0), "loss 0.4123  lr 2.40e-03") in line


@pytest.mark.parametrize("width", [70, 80, 100, 130])
def test_epochs_are_in_the_bar_and_a_narrow_terminal_gets_what_matters_most(width):
    line = show(ROW | {"step": 3100, "epoch": 0.2}, terminal=True, width=width)[-1].rstrip()
    assert len(line) <= width
    for words in ("3100/1562500", "loss 0.4123", "123,456 images/s", "left"):
        assert words in line
    assert ("epoch 0.2/100.8" in line) == (width >= 100)
    assert ("lr 2.40e-03" in line) == (width >= 130)
    file = show(ROW | {"epoch": 400.0}, terminal=False, width=width)[-1]
    assert "epoch 400.0/800  loss 0.4123  lr 2.40e-03  123,456 images/s  MFU 51%  data 3%  " in file


@pytest.mark.parametrize(
    ("rate", "text"), [(0.3, "0.3"), (0.034, "0.034"), (9.95, "9.9"), (12.3, "12"), (1e5, "100,000")]
)
def test_slow_steps_are_not_no_images_per_second(rate, text):
    assert f"  {text} images/s" in show(ROW | {"images_per_second": rate}, terminal=False)[0]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1h00m")])
def test_time_left_is_short(seconds, text):
    assert _clock(seconds) == text


def test_a_row_without_a_peak_has_no_mfu_on_the_terminal():
    (line,) = show({name: value for name, value in ROW.items() if name != "mfu"}, terminal=False)
    assert "images/s  data 3%" in line


def test_what_a_picture_is_compared_with_is_said_once_on_the_terminal():
    file = io.StringIO()
    sink = Terminal(Console(file=file, width=100, soft_wrap=True), 0, 100)
    for step, error in ((10, 0.5), (20, 0.25)):
        values = {"crops_mse": error, "crops_mse_mean_color": 0.75}
        sink.evaluate(step, values, {"reconstructions": Path(f"{step}.png")})
        sink.evaluate(step, {"knn_top1": 0.5}, {})
    assert file.getvalue().splitlines() == [
        "step 10: crops_mse 0.5, crops_mse_mean_color 0.75, 10.png", "step 10: knn_top1 0.5",
        "step 20: crops_mse 0.25, 20.png", "step 20: knn_top1 0.5",
    ]  # fmt: skip
