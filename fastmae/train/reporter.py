"""What a run says of itself while it runs: rows of metrics, in files and on the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from fastmae.train.clock import Clock
from fastmae.train.metrics import HostCopy, JsonLines, Row, Sink, StepValues, TensorBoard, Terminal, mean_of_finite
from fastmae.train.parallel import Parallelism
from fastmae.train.run_folder import RunFolder

MAX_SKIPPED = 20
"""Steps in a row without a finite gradient after which a run ends: skipping more will not mend it."""

WAITING = 0.2
"""Share of a log interval that may be waiting for images before the terminal says so."""


class Reporter:
    """Collects each step's values, and writes a row an interval to ``metrics.jsonl``, TensorBoard and the terminal.

    Values stay on the device for an interval and are read an interval late, so that no step waits for the device.

    Args:
        run: the run folder.
        console: where progress is shown.
        device: of the steps' values.
        interval: steps in a row.
        advice: where to look if the images are slow, for the terminal.
        parallelism: the ranks whose values are averaged; the first of them writes.
    """

    def __init__(
        self,
        run: RunFolder,
        console: Console,
        device: torch.device,
        interval: int,
        advice: str = "",
        parallelism: Parallelism | None = None,
    ) -> None:
        self._parallelism = parallelism or Parallelism(device=device)
        self.values = StepValues(("loss", "grad_norm", "skipped"), interval, device, self._parallelism.mean)
        self.clock = Clock(device)
        self._run, self._console, self._device, self._advice = run, console, device, advice
        self._rows: list[tuple[Row, HostCopy]] = []
        self._sinks: list[Sink] = []
        self._on_row: Callable[[Row], None] | None = None
        self._skipped_in_a_row = 0
        self._last_step = 0
        self._waiting_said: bool | None = None

    def open(self, step: int, total_steps: int, deadline: float, on_row: Callable[[Row], None] | None = None) -> None:
        """Begin to write, after ``step`` of the run's ``total_steps``; ``deadline`` is of ``time.monotonic()``."""
        self._on_row = on_row
        if not self._parallelism.is_main:
            return
        self._sinks = [
            JsonLines(self._run.metrics, self._run.evaluations),
            TensorBoard(self._run.path, step),
            Terminal(self._console, step, total_steps, deadline),
        ]

    def start(self, step: int) -> None:
        """Begin the first interval, after ``step`` steps."""
        self._last_step = step
        self.clock.restart()

    def add(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """A step's values: scalars on the device."""
        self.values.add(loss, grad_norm, skipped)

    def log(self, row: Row, images: int) -> None:
        """Close an interval: its values begin their way to the host, and the row of the interval before is written.

        Args:
            row: what the trainer knows; at least ``step``.
            images: images a step, for the rate.
        """
        steps = row["step"] - self._last_step
        row |= self.clock.read(steps, steps * images)
        if self._device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._rows.append((row, self.values.take()))
        self.start(row["step"])
        self.flush(pending=1 if self._device.type == "cuda" else 0)

    def flush(self, pending: int = 0) -> None:
        """Write the rows whose values have been given time to arrive; all but the newest ``pending``.

        Raises:
            FloatingPointError: after ``MAX_SKIPPED`` steps in a row without a finite gradient.
        """
        while len(self._rows) > pending:
            row, copy = self._rows.pop(0)
            values = copy.wait()
            row["loss"], row["grad_norm"] = mean_of_finite(values["loss"]), mean_of_finite(values["grad_norm"])
            row["skipped_steps"] = int(sum(values["skipped"]))
            for sink in self._sinks:
                sink.write(row)
            if self._on_row:
                self._on_row(row)
            self._say_if_waiting(row)
            self._end_if_hopeless(values["skipped"], row["step"])

    def evaluation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path] | None = None) -> None:
        """Show what an evaluation of the weights after a step found: numbers by name, and picture files by name."""
        for sink in self._sinks:
            sink.evaluate(step, values, pictures or {})

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def _say_if_waiting(self, row: Row) -> None:
        """Once, and not of the first interval, in which the loader starts."""
        if self._waiting_said is False and row["data_share"] > WAITING:
            self._waiting_said = True
            self._console.print(f"waiting for images: {row['data_share']:.0%} of the time; {self._advice}")
        self._waiting_said = bool(self._waiting_said)

    def _end_if_hopeless(self, skipped: list[float], step: int) -> None:
        for one in skipped:
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if one else 0
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(
                f"no finite gradient in the last {self._skipped_in_a_row} steps up to step {step}; "
                "the weights are as they were before them"
            )


def deadline_after(minutes: float | None) -> float:
    """The moment of ``time.monotonic()`` in so many minutes; infinity without a limit."""
    return time.monotonic() + 60 * minutes if minutes else math.inf
