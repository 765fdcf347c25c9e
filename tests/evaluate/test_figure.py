"""The figure: right pixels in the right places, any channel count, and never half a file."""

from __future__ import annotations

import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.evaluate import Block, Row, draw, figure

COLORS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def plain(color, size=(64, 64)):
    return torch.tensor(color).view(-1, 1, 1).expand(-1, *size)


def row(size=(64, 64), colors=COLORS, **kwargs):
    return Row([plain(color, size) for color in colors], caption="mask 75 %, error 0.300, 21.0 dB", **kwargs)


def drawn(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def area(image, color) -> tuple[slice, slice]:
    """The box of the pixels of exactly this colour; all of the box has it."""
    rows, columns = np.nonzero((image == np.array(color)).all(-1))
    box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert (image[box] == np.array(color)).all()
    return box


def test_a_triplet_stands_side_by_side_enlarged_by_a_whole_factor(tmp_path):
    draw([Block("crops", "text", [row()])], tmp_path / "a.png", title="title", note="note")
    image = drawn(tmp_path / "a.png")
    boxes = [area(image, [round(255 * c) for c in color]) for color in COLORS]
    assert [(b[0].stop - b[0].start, b[1].stop - b[1].start) for b in boxes] == [(192, 192)] * 3
    assert boxes[0][1].stop < boxes[1][1].start < boxes[1][1].stop < boxes[2][1].start
    assert len({b[0].start for b in boxes}) == 1


def test_small_pictures_are_upright_and_not_smoothed(tmp_path):
    checks = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)
    flag = plain(COLORS[0]).clone()
    flag[:, 32:] = plain(COLORS[2], (32, 64))
    draw([Block("", "", [Row((plain(COLORS[1]), checks, flag), "caption")])], tmp_path / "a.png")
    image = drawn(tmp_path / "a.png")
    assert (image == [255, 0, 255]).all(-1).sum() == 64 * 32 * 9
    assert area(image, [255, 0, 0])[0].stop == area(image, [0, 0, 255])[0].start


@pytest.mark.parametrize(("size", "shown"), [((224, 320), (224, 320)), ((1024, 512), (448, 224)), ((8, 16), (88, 176))])
def test_sizes(size, shown, tmp_path):
    draw([Block("", "", [row(size)])], tmp_path / "a.png")
    box = area(drawn(tmp_path / "a.png"), [255, 0, 0])
    assert (box[0].stop - box[0].start, box[1].stop - box[1].start) == shown


@pytest.mark.parametrize(
    ("pixel", "shown"),
    [([0.4, 0.9], [102] * 3), ([0.0, 0.4, 1.0, 0.5], [0, 102, 255]), ([-1.0, 0.4, 3.0], [0, 102, 255])],
)
def test_channels_and_values_out_of_range(pixel, shown, tmp_path):
    draw([Block("", "", [row(colors=[pixel] * 3)])], tmp_path / "a.png")
    assert (drawn(tmp_path / "a.png") == shown).all(-1).sum() == 3 * 192 * 192


def test_no_half_file_and_nothing_to_draw(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="at least one row"):
        draw([Block("empty", "", [])], path)
    draw([Block("", "", [row()])], path)
    before = path.read_bytes()

    def fail(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="No space"):
        draw([Block("", "", [row(), row()])], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_pyplot_and_its_global_state_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    runpy.run_path(figure.__file__)["draw"]([Block("", "", [row()])], tmp_path / "a.png")
