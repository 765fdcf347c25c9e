"""Figures of masked, reconstructed and original images side by side, as Figures 2 to 4 of the paper have them."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate

_DPI = 200
_WIDTH, _NARROWEST = 1900, 912  # pixels that the triplets of a row share; that a title needs at least
_TILE = (176, 448)  # a picture is enlarged by whole factors to about the first, and reduced to at most the second
_GAP, _COLUMN_GAP, _MARGIN = 6, 40, 48
_INK, _GREY = "#1a1a1a", "#6b6b6b"
_TITLE, _HEADING, _TEXT, _SMALL = 34, 27, 21, 19  # letter sizes in pixels
_COLUMNS = ("masked", "reconstruction", "original")


class Row(NamedTuple):
    """Pictures from left to right, floating (C, H, W) in [0, 1] units, on the CPU; what lies outside is clamped."""

    pictures: Sequence[Tensor]
    caption: str
    name: str = ""


class Block(NamedTuple):
    """Rows under a heading."""

    heading: str
    text: str
    rows: Sequence[Row]


class _Line(NamedTuple):
    x: float
    y: float
    text: str
    size: int
    style: dict


def draw(
    blocks: Sequence[Block], path: Path | str, *, title: str = "", note: str = "", columns: Sequence[str] = _COLUMNS
) -> None:
    """Draw blocks of rows as one PNG, written whole or not at all.

    Small pictures are enlarged by a whole factor without smoothing, so that every pixel is seen as it is. One channel
    is shown grey; of two the first, of more than three the first three are shown.

    Args:
        blocks: at least one row in all; pictures may differ in size between rows.
        path: of the PNG; its folder must exist.
        title: above everything.
        note: below everything, small.
        columns: what the pictures of a row are.

    Raises:
        ValueError: nothing to draw.
        OSError: the file cannot be written.
    """
    rows = [row for block in blocks for row in block.rows]
    if not rows:
        raise ValueError("blocks: expected at least one row to draw, got none")
    tile = max(_tile_size(row.pictures[0])[1] for row in rows)
    strip = len(columns) * (tile + _GAP) - _GAP
    longest = max(len(block.rows) for block in blocks)
    across = max(1, min(3, _WIDTH // (len(columns) * tile), longest))
    width = 2 * _MARGIN + max(across * strip + (across - 1) * _COLUMN_GAP, _NARROWEST)

    images, lines = [], []
    y = _write(lines, title, _MARGIN, _TITLE, width, weight="bold") if title else _MARGIN
    for block in blocks:
        y = _write(lines, block.heading, y + 26, _HEADING, width, weight="bold")
        y = _write(lines, block.text, y + 2, _TEXT, width, color=_GREY) + 14
        for start in range(0, len(block.rows), across):
            placed = [
                (_MARGIN + i * (strip + _COLUMN_GAP), row) for i, row in enumerate(block.rows[start : start + across])
            ]
            if start == 0:
                for left, _ in placed:
                    for k, label in enumerate(columns):
                        x = left + k * (tile + _GAP) + tile / 2
                        lines.append(_Line(x, y, label, _SMALL, {"color": _GREY, "ha": "center"}))
                y += _SMALL + 10
            height = 0
            for x, row in placed:
                for k, picture in enumerate(row.pictures):
                    pixels = _pixels(picture)
                    images.append((x + k * (tile + _GAP), y, pixels))
                    height = max(height, len(pixels))
            for x, row in placed:
                room = int((strip - len(row.caption) * _SMALL * 0.56) / (_SMALL * 0.6)) - 2
                name = row.name if len(row.name) <= max(room, 8) else f"…{row.name[-max(room, 8) + 1 :]}"
                lines.append(_Line(x, y + height + 8, name, _SMALL, {"color": _INK}))
                end = {"color": _GREY, "ha": "right"} if name else {"color": _GREY}
                lines.append(_Line(x + strip if name else x, y + height + 8, row.caption, _SMALL, end))
            y += height + 8 + _SMALL + 20
    if note:
        y = _write(lines, note, y + 8, _SMALL, width, color=_GREY)
    _save(Path(path), width, round(y + _MARGIN * 0.7), images, lines)


def _write(lines: list[_Line], text: str, y: float, size: int, width: int, **style: str) -> float:
    """Add a wrapped paragraph at y and return where it ends."""
    letters = int((width - 2 * _MARGIN) / (size * (0.62 if "weight" in style else 0.53)))
    for line in textwrap.wrap(text, letters):
        lines.append(_Line(_MARGIN, y, line, size, {"color": _INK} | style))
        y += size * 1.4
    return y


def _save(path: Path, width: int, height: int, images: list, lines: list[_Line]) -> None:
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    for x, y, pixels in images:
        figure.figimage(pixels, xo=x, yo=height - y - len(pixels), origin="upper")
    for line in lines:
        points = line.size * 72 / _DPI
        figure.text(
            line.x / width, 1 - line.y / height, line.text, fontsize=points, va="top", parse_math=False, **line.style
        )
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(part, dpi=_DPI, format="png")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _tile_size(picture: Tensor) -> tuple[int, int]:
    height, width = picture.shape[-2:]
    if width < _TILE[0]:
        factor = -(-_TILE[0] // width)
        return height * factor, width * factor
    shrink = min(1.0, _TILE[1] / max(height, width))
    return round(height * shrink), round(width * shrink)


def _pixels(picture: Tensor) -> np.ndarray:
    """uint8 (h, w, 3) at the size that is drawn."""
    picture = picture.detach().float()
    channels = len(picture)
    if channels != 3:
        picture = picture[:3] if channels > 3 else picture[:1].expand(3, -1, -1)
    size = _tile_size(picture)
    if size[0] < picture.shape[-2]:
        picture = interpolate(picture[None], size, mode="bicubic", antialias=True)[0]
    elif size[0] > picture.shape[-2]:
        picture = interpolate(picture[None], size, mode="nearest-exact")[0]
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
