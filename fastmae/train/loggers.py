"""Where metrics go: ``metrics.jsonl``, TensorBoard, Weights & Biases and the terminal. None of them can end a run."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fastmae.train.run_folder import RunFolder

Row = dict[str, Any]

_log = logging.getLogger(__name__)

_BAR = 8  # columns of the progress bar
_WANDB_FINISH = 30.0  # seconds that closing a W&B run may take


class Logger(Protocol):
    """A destination of metrics: a row per interval of steps, with at least ``step``; numbers and picture files of an
    evaluation of the weights after a step, by name."""

    def write(self, row: Row) -> None: ...
    def evaluation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None: ...
    def close(self) -> None: ...


class Loggers:
    """All loggers of a run. A failure, such as a full disk, costs rows and is reported when it begins."""

    def __init__(self, *loggers: Logger) -> None:
        self._failed = dict.fromkeys(loggers, False)

    def each(self, call: Callable[[Logger], None]) -> None:
        for logger, failed in self._failed.items():
            try:
                call(logger)
                self._failed[logger] = False
            except Exception as error:
                self._failed[logger] = True
                if not failed:
                    text = "%s: METRICS NOT WRITTEN: %s. Training continues"
                    _log.warning(text, type(logger).__name__, _first_line(error))


def open_loggers(run: RunFolder, terminal: Callable[[], Logger], step: int, wandb_project: str | None) -> Loggers:
    """The loggers of a run from ``step`` on."""
    loggers: list[Logger] = [JsonLines(run), TensorBoard(run.path, step)]
    if wandb_project:
        try:
            loggers.append(WeightsAndBiases(wandb_project, run))
        except Exception as error:
            _log.warning("Weights & Biases: %s. Nothing is logged there, training continues", _first_line(error))
    return Loggers(*loggers, terminal())  # last: what W&B prints precedes the bar


class JsonLines(Logger):
    """One JSON object per line, appended: rows to one file, evaluations to another."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        run.metrics.touch()

    def write(self, row: Row) -> None:
        self._append(self._run.metrics, row)

    def evaluation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        shown = {name: str(path) for name, path in pictures.items()}
        self._append(self._run.evaluations, {"step": step, **values, **shown})

    @staticmethod
    def _append(path: Path, row: Row) -> None:
        """Append a whole line or nothing: half a line, on a disk that is full for a while, would spoil the next one."""
        line = (json.dumps(without_nan(row)) + "\n").encode()
        with path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def without_nan(value: Any) -> Any:
    """The same dicts, lists and values, with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Charts(Logger):
    """Charts of every number over the steps: ``train/<name>`` and ``eval/<name>``."""

    def add(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """Points and pictures by chart."""
        raise NotImplementedError

    def write(self, row: Row) -> None:
        numbers = {f"train/{name}": v for name, v in row.items() if name != "step" and isinstance(v, int | float)}
        self.add(row["step"], numbers, {})

    def evaluation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        self.add(step, *({f"eval/{name}": v for name, v in found.items()} for found in (values, pictures)))


class TensorBoard(Charts):
    """TensorBoard events. A run that continues after a step purges later rows."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = partial(SummaryWriter, str(folder), flush_secs=10)  # a killed process loses what is not flushed
        self._writer = self._open(purge_step=step + 1 if step else None)

    def add(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        writer = self._writer = self._writer or self._open()
        try:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            for name, path in pictures.items():
                with Image.open(path) as picture:
                    writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        except OSError:  # the writer's thread ends at its first error, with half a record in its file
            self._writer = None
            with suppress(OSError):
                writer.close()
            raise

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Charts):
    """One W&B run per run folder, however often that is resumed: ``wandb.json`` holds its id.

    W&B never deletes rows. Its charts are drawn over ``step`` and not over its own count, so that steps that are
    trained again lie where they were before. Without a connection or a key the run is kept in the run folder's
    ``wandb/`` for ``wandb sync``.
    """

    def __init__(self, project: str, run: RunFolder) -> None:
        import wandb

        saved = run.read_json("wandb.json") or {}
        known = saved["id"] if saved.get("project") == project else secrets.token_hex(4)
        run.write_json("wandb.json", {"project": project, "id": known})
        options = {"project": project, "id": known, "name": run.path.resolve().name, "dir": str(run.path)}
        options |= {"config": run.read_json("config.json"), "resume": "allow"}
        options["settings"] = wandb.Settings(console="off")  # its copy would hold every state of the progress bar
        begin = partial(wandb.init, **options)
        self._image = wandb.Image
        try:
            self._run = begin()
        except Exception as error:
            text = "Weights & Biases: %s; this run is kept for `wandb sync` in %s"
            _log.warning(text, _first_line(error), run.path / "wandb")
            wandb.teardown()  # the failed attempt still holds the id
            self._run = begin(mode="offline")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        self._run.log({"step": step, **numbers, **{name: self._image(str(path)) for name, path in pictures.items()}})

    def close(self) -> None:
        """Wait up to half a minute for what has not been sent. W&B marks the run as failed if an error ends it."""
        code = int(sys.exc_info()[0] is not None)
        thread = threading.Thread(target=self._run.finish, kwargs={"exit_code": code}, name="wandb", daemon=True)
        thread.start()
        thread.join(_WANDB_FINISH)
        if thread.is_alive():
            _log.warning("Weights & Biases: not everything was sent; `wandb sync` sends the rest from the run folder")


def require_wandb() -> None:
    """Raise ValueError unless wandb is installed, without importing it."""
    if "wandb" not in sys.modules and find_spec("wandb") is None:
        text = "expected the package wandb (pip install 'fastmae[wandb]'), but it is not installed"
        raise ValueError(f"--report.wandb-project: {text}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")[:200]


class Terminal(Logger):
    """A line with a bar, updated in place, on a terminal or in a notebook; a line per row elsewhere.

    Args:
        step: the run begins after it.
        total_steps: returns their number, which may change.
        deadline: of ``time.monotonic()``; the run ends before it, or then.
    """

    def __init__(self, console: Console, step: int, total_steps: Callable[[], int], deadline: float = math.inf) -> None:
        self._console, self._total, self._deadline = console, total_steps, deadline
        self._begun, self._first = time.monotonic(), step
        self._shown: dict[str, float] = {}
        self._cell: Any = None
        self._live: Live | None = None
        if in_notebook():
            from IPython.display import display

            self._cell = display({"text/plain": "starting"}, raw=True, display_id=True)
        elif console.is_terminal:
            self._live = Live(console=console, auto_refresh=False)  # no thread beside the training
            self._live.start()

    def write(self, row: Row) -> None:
        step, total = row["step"], self._total()
        bar, count = f"{'#' * (_BAR * step // total):.<{_BAR}}", f"{step:>{len(str(total))}}/{total}  "
        if self._live is not None:
            text = self._text(row, total, self._console.width - len(f"{bar} {count}"))
            self._live.update(Text(f"{bar} {count}{text}", no_wrap=True), refresh=True)
        elif self._cell is not None:
            self._cell.update({"text/plain": f"{bar} step {count}{self._text(row, total)}"}, raw=True)
        else:
            self._console.print(f"step {count}{self._text(row, total)}", highlight=False)

    def _text(self, row: Row, total: int, width: float = math.inf) -> str:
        """The row in at most so many columns: what matters least is left out."""
        now, skipped, rate = time.monotonic(), row["skipped_steps"], row["images_per_second"]
        left = (now - self._begun) / max(row["step"] - self._first, 1) * (total - row["step"])
        loss = math.nan if row["loss"] is None else row["loss"]
        parts = {
            "epoch": f"epoch {row['epoch']:.1f}/{round(row['epoch'] / row['step'] * total, 1):g}",
            "loss": f"loss {loss:.5g}" if loss >= 10 else f"loss {loss:.4f}",
            "skipped" if skipped else "lr": f"{skipped} skipped" if skipped else f"lr {row['lr']:.2e}",
            "rate": f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s",
            "mfu": f"MFU {row['mfu']:.0%}" if "mfu" in row else "",
            "data": f"data {row['data_share']:.0%}",
            "left": f"{_clock(max(0.0, min(left, self._deadline - now)))} left",
        }
        line = "  ".join(filter(None, parts.values()))
        for name in ("lr", "mfu", "data", "epoch"):
            if len(line) > width:
                parts.pop(name, None)
                line = "  ".join(filter(None, parts.values()))
        return line

    def evaluation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        # The errors of the baselines beside a picture are the same every time: print them once.
        shown = {name: v for name, v in values.items() if not pictures or self._shown.get(name) != v}
        self._shown |= values
        found = [f"{name} {value:.4g}" for name, value in shown.items()] + [str(path) for path in pictures.values()]
        self._console.print(f"step {step}: {', '.join(found)}", highlight=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def in_notebook() -> bool:
    """Whether this code runs in a Jupyter kernel. Its stdout claims to be a terminal, but cannot move the cursor."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}:{rest:02}"
