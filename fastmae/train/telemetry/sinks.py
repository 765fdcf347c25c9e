"""Where rows of metrics and the results of evaluations go: files, TensorBoard, the terminal."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fastmae.train.telemetry.metrics import Row, without_nan

_log = logging.getLogger(__name__)

_BAR = 8
"""Columns of the progress bar."""


class Sink(Protocol):
    """Somewhere that rows of metrics go."""

    def write(self, row: Row) -> None: ...

    def evaluate(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """What an evaluation of the weights after a step found: numbers, and picture files."""

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, appended: rows to one file, evaluations to another."""

    def __init__(self, path: Path, evaluations: Path) -> None:
        self._path, self._evaluations = path, evaluations
        path.touch()

    def write(self, row: Row) -> None:
        _append(self._path, row)

    def evaluate(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        paths = {name: str(path) for name, path in pictures.items()}
        _append(self._evaluations, {"step": step, **without_nan(dict(values)), **paths})

    def close(self) -> None:
        pass


def _append(path: Path, row: Row) -> None:
    """A line, whole or not at all: a part of one, on a disk that is full for a while, would spoil the next."""
    line = (json.dumps(row) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def scalars(row: Row) -> dict[str, float]:
    """What of a row can be drawn over the steps, by the names of charts: ``train/<name>``, and ``ranks/<name>/<rank>``
    where the row has each rank's own."""
    found = {f"train/{name}": v for name, v in row.items() if name != "step" and isinstance(v, int | float)}
    for name, values in row.get("ranks", {}).items():
        found |= {f"ranks/{name}/{rank}": value for rank, value in enumerate(values) if value is not None}
    return found


class TensorBoard:
    """TensorBoard events; rows of a run's abandoned future are purged on resume.

    Args:
        folder: of the events.
        step: after which the run begins or goes on.
        config: shown as a text.
    """

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = partial(SummaryWriter, str(folder))
        self._writer = self._open(purge_step=step + 1 if step else None)
        if config:
            lines = json.dumps(config, indent=2).splitlines()
            self._writer.add_text("config", "\n".join("    " + line for line in lines), step)  # Markdown for code

    def write(self, row: Row) -> None:
        with self._reopened_after_an_error():
            for name, value in scalars(row).items():
                self._writer.add_scalar(name, value, row["step"])

    def evaluate(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        with self._reopened_after_an_error():
            for name, value in values.items():
                self._writer.add_scalar(f"eval/{name}", value, step)
            for name, path in pictures.items():
                with Image.open(path) as picture:
                    self._writer.add_image(f"eval/{name}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    @contextmanager
    def _reopened_after_an_error(self) -> Iterator[None]:
        """The thread that writes ends by its first error, and its file with half a record: the next is a new one."""
        if self._writer is None:
            self._writer = self._open()
        try:
            yield
        except OSError:
            with suppress(OSError):
                self._writer.close()
            self._writer = None
            raise


class Tolerant:
    """A sink that may fail to write, on a full disk: what it fails to write is left out, and the run goes on.

    It is said when that begins, and when it is over.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink, self._left_out = sink, 0

    def write(self, row: Row) -> None:
        self._try(lambda: self._sink.write(row))

    def evaluate(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        self._try(lambda: self._sink.evaluate(step, values, pictures))

    def close(self) -> None:
        self._try(self._sink.close)

    def _try(self, act: Callable[[], None]) -> None:
        name = type(self._sink).__name__
        try:
            act()
        except OSError as error:
            if not self._left_out:
                _log.warning("%s: METRICS NOT WRITTEN: %s. The training goes on", name, error)
            self._left_out += 1
        else:
            if self._left_out:
                _log.warning("%s: written again; %d times it was not", name, self._left_out)
            self._left_out = 0


class Terminal:
    """A progress bar on a terminal, plain lines elsewhere: epoch, loss, learning rate, images/s, MFU, share of the time
    spent waiting for images, time left. What does not fit a narrow terminal is left to metrics.jsonl."""

    def __init__(self, console: Console, step: int, total_steps: int, deadline: float = math.inf) -> None:
        self._console, self._total, self._deadline = console, total_steps, deadline
        self._begun, self._first = time.monotonic(), step
        self._shown: dict[str, float] = {}
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(_BAR), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._progress = Progress(*columns, console=console, auto_refresh=False)  # no thread beside the training
            self._task = self._progress.add_task("training", total=total_steps, completed=step, text="")
            self._progress.start()

    def set_total(self, total_steps: int) -> None:
        """The run has another number of steps than it began with."""
        self._total = total_steps
        if self._progress is not None:
            self._progress.update(self._task, total=total_steps)

    def write(self, row: Row) -> None:
        text = self._text(row)
        if self._progress is None:
            self._console.print(f"step {row['step']:>{len(str(self._total))}}/{self._total}  {text}", highlight=False)
        else:
            self._progress.update(self._task, completed=row["step"], text=text, refresh=True)

    def _text(self, row: Row) -> str:
        now = time.monotonic()
        left = (now - self._begun) / max(row["step"] - self._first, 1) * (self._total - row["step"])
        left = max(0.0, min(left, self._deadline - now))
        parts = {"loss": "loss nan" if row["loss"] is None else f"loss {_six_columns(row['loss'])}"}
        if "epoch" in row:
            total = row["epoch"] / row["step"] * self._total
            parts = {"epoch": f"epoch {row['epoch']:.1f}/{round(total, 1):g}", **parts}
        if row["skipped_steps"]:
            parts["skipped"] = f"{row['skipped_steps']} skipped"  # in place of the learning rate
        else:
            parts["lr"] = f"lr {row['lr']:.2e}"
        parts["rate"] = f"{_rate(row['images_per_second'])} images/s"
        if "mfu" in row:
            parts["mfu"] = f"MFU {row['mfu']:.0%}"
        parts |= {"data": f"data {row['data_share']:.0%}", "left": f"{_clock(left)} left"}
        # Beside the bar and the count of steps. A file has no width, and gets everything.
        room = self._console.width - _BAR - 2 * len(str(self._total)) - 3 if self._progress else math.inf
        for name in ("lr", "mfu", "data", "epoch"):
            if len("  ".join(parts.values())) > room:
                parts.pop(name, None)
        return "  ".join(parts.values())

    def evaluate(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        # What a picture is compared with stays the same: said once.
        shown = {name: v for name, v in values.items() if not pictures or self._shown.get(name) != v}
        self._shown |= values
        found = [f"{name} {value:.4g}" for name, value in shown.items()] + [str(path) for path in pictures.values()]
        self._console.print(f"step {step}: {', '.join(found)}", highlight=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _six_columns(loss: float) -> str:
    return f"{loss:.4f}" if loss < 10 else f"{loss:.5g}" if loss < 1e5 else f"{loss:.0e}"


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}:{rest:02}"
