"""``fastmae plot``: the points of runs and tables, a panel per accuracy, and mistakes that are named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from commands import mistake
from PIL import Image

from fastmae.cli import main
from fastmae.evaluate import curves
from fastmae.evaluate.curves import Curves

ROWS = [{"step": step, "epoch": step / 4, "samples": 16 * step, "loss": 1 / step} for step in (10, 20, 40)]


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 50, "lo')
    return run


def width(path) -> int:
    return Image.open(path).width


def test_accuracies_are_drawn_where_their_step_lies_and_only_if_measured():
    evaluations = [{"step": 5, "knn_top1": 0.2}, {"step": 30, "crops_mse": 1.0}, {"step": 30, "knn_top1": 0.5}]
    curves = Curves("a", ROWS, evaluations)
    for x, scale in (("step", 1), ("epoch", 0.25), ("samples", 16)):
        at, values = curves.points("loss", x)
        np.testing.assert_allclose(at, scale * np.array([10, 20, 40]))
        np.testing.assert_allclose(values, [0.1, 0.05, 0.025])
        at, values = curves.points("knn_top1", x)
        np.testing.assert_allclose(at, scale * np.array([5, 30]))
        np.testing.assert_allclose(values, [20, 50])
    assert not len(curves.points("linear_top1", "step")[0])


def test_a_panel_for_the_loss_and_each_accuracy_that_a_run_has(run, tmp_path, capsys):
    out = tmp_path / "figures" / "curves.png"
    assert main(["plot", str(run), "--out", str(out)]) == 0
    alone = width(out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    (other / "evaluations.jsonl").write_text('{"step": 20, "knn_top1": 0.5, "linear_top1": 0.6, "crops_mse": 1.0}\n')
    assert main(["plot", str(run), str(other), "--x", "samples", "--out", str(out)]) == 0
    assert width(out) == 3 * alone
    assert "curves.png: 2 runs" in capsys.readouterr().out


TABLE = """variant,seed,protocol,top1,--model.mask-ratio
MAE,0,linear,0.4,{base}
MAE,1,linear,0.5,{base}
mask 50 %,0,linear,0.3,0.5
mask 50 %,0,finetune,0.6,0.5
"""


@pytest.fixture
def drawn(monkeypatch):
    """Figures that are saved."""
    saved, save = [], curves._save
    monkeypatch.setattr(curves, "_save", lambda figure, *args: (saved.append(figure), save(figure, *args)))
    return saved


@pytest.mark.parametrize(("base", "numeric"), [("0.75", True), ("random", False)])
def test_a_table_is_drawn_over_a_flag_of_numbers_or_by_variant(tmp_path, drawn, capsys, base, numeric):
    (tmp_path / "results.csv").write_text(TABLE.format(base=base))
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "table.png")]) == 0
    assert main(["plot", str(tmp_path / "results.csv"), "--out", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "table.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert "table.png: 2 variants" in capsys.readouterr().out
    linear, finetune = drawn[0].axes
    line, _, (bars,) = linear.containers[0]
    spread = np.std([40, 50], ddof=1)
    if numeric:
        assert linear.get_xlabel() == "--model.mask-ratio"
        np.testing.assert_allclose(line.get_xydata(), [(0.5, 30), (0.75, 45)])
        np.testing.assert_allclose(bars.get_segments()[1], [(0.75, 45 - spread), (0.75, 45 + spread)])
        assert (linear.get_ylabel(), finetune.get_ylabel()) == ("linear probe, top-1 %", "finetune, top-1 %")
    else:
        assert [text.get_text() for text in linear.get_yticklabels()] == ["MAE", "mask 50 %"]
        np.testing.assert_allclose(line.get_xydata(), [(45, 0), (30, 1)])
        np.testing.assert_allclose(bars.get_segments()[0], [(45 - spread, 0), (45 + spread, 0)])


def test_mistakes_are_named_and_leave_no_file(run, tmp_path, capsys):
    assert "RUN: expected the folder of a run with rows" in mistake(capsys, "plot", run, tmp_path / "none")
    assert "expected a .png, .pdf or .svg file, got" in mistake(capsys, "plot", run, "--out", tmp_path / "a.jpg")
    assert "RUN" in mistake(capsys, "plot", "--out", tmp_path / "a.png")
    table = tmp_path / "results.csv"
    for text, message in (
        ("variant,seed,top1\nMAE,0,\n", "RUN: expected accuracies in"),
        ("step,loss\n1,2\n", "RUN: expected a results.csv of fastmae ablate, got"),
        ("variant,protocol,top1\nMAE,knn,0.5\n", "RUN: expected run folders, or one table of fastmae ablate, got"),
    ):
        table.write_text(text)
        both = [run] if "one table" in message else []
        assert message in mistake(capsys, "plot", table, *both, "--out", tmp_path / "a.png")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "results.csv"}
