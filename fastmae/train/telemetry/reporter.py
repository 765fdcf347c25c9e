"""What a run says of itself while it runs: rows of metrics, in files and on the terminal.

A row is of the steps of an interval. Besides what the trainer knows it has

- ``loss``, ``grad_norm``: means of the steps whose values are finite; ``skipped_steps``: the number of the others;
  ``rollbacks``: how often the run has gone back because of too many of these in a row; where there are any,
  ``skipped_samples`` and ``rolled_back`` name their samples (:meth:`fastmae.train.guard.Guard.observe`);
- ``images_per_second`` (masked ones), ``step_time`` (seconds), ``tflops_per_second``: of all ranks together, with
  everything that was between the steps, checkpoints and pictures as well;
- ``mfu``: these FLOPs over what large matrix products would reach on all ranks in the time, as measured at the start;
  at most 1, also where the device was busy then, or emulates the precision, so that steps are faster than that;
- ``data_time`` (seconds a step), ``data_share``: waiting for images, of the rank that waits longest;
- ``peak_memory_gib`` (of a GPU, since the start), ``host_memory_gib``: of the rank that holds most;
- with several ranks ``data_time_*`` and ``block_time_*``, seconds, for min, median, max, max_rank and max_host: each
  rank's own waiting for images, and its own forward of one block, in which it waits for nobody; and ``ranks``, the
  values of each, if they are few.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from fastmae.train.parallel import Parallelism
from fastmae.train.ranks import Ranks
from fastmae.train.run_folder import RunFolder
from fastmae.train.telemetry.clock import Clock
from fastmae.train.telemetry.metrics import HostCopy, Row, StepValues, mean_of_finite
from fastmae.train.telemetry.rank_values import RankValues, Shared
from fastmae.train.telemetry.sinks import JsonLines, Sink, TensorBoard, Terminal, Tolerant
from fastmae.train.telemetry.wandb_sink import WeightsAndBiases

WAITING = 0.2
"""Share of a log interval that may be waiting for images before the terminal says so."""


class Reporter:
    """Collects each step's values, and writes a row an interval to ``metrics.jsonl``, TensorBoard and the terminal.

    Values stay on the device for an interval and are read an interval late, so that no step waits for the device. So
    are those of other ranks.

    Args:
        run: the run folder.
        console: where progress is shown.
        device: of the steps' values.
        interval: steps in a row.
        advice: where to look if the images are slow, for the terminal.
        parallelism: the ranks whose values are averaged; the first of them writes.
        rank_values: what each of the ranks measures of itself; None for this one alone.
        flops: FLOPs of a step over all ranks, at present; None for no such figure.
        dtype: of the matrix products that they are compared with.
        wandb_project: project of Weights & Biases; None for none.
    """

    def __init__(
        self,
        run: RunFolder,
        console: Console,
        device: torch.device,
        interval: int,
        advice: str = "",
        parallelism: Parallelism | None = None,
        *,
        rank_values: RankValues | None = None,
        flops: Callable[[], int] | None = None,
        dtype: torch.dtype = torch.float32,
        wandb_project: str | None = None,
    ) -> None:
        self._parallelism = parallelism or Parallelism(device=device)
        self.values = StepValues(("loss", "grad_norm", "skipped"), interval, device, self._parallelism.mean)
        self.clock = Clock(device)
        self._run, self._console, self._device, self._advice = run, console, device, advice
        self._rank_values = rank_values or RankValues(Ranks(), device, interval)
        self._late = int(device.type == "cuda" or self._rank_values.are_several)
        self._flops_of_step, self._dtype, self._wandb_project = flops, dtype, wandb_project
        self._flops, self._peak = 0, None
        self._rows: list[tuple[Row, HostCopy, Shared]] = []
        self._sinks: list[Sink] = []
        self._terminal: Terminal | None = None
        self._on_row: Callable[[Row], None] | None = None
        self.checks: Sequence[Callable[[Row, Mapping[str, Sequence[float]]], None]] = ()
        self._last_step = 0
        self._waiting_said: bool | None = None

    def open(self, step: int, total_steps: int, deadline: float, on_row: Callable[[Row], None] | None = None) -> None:
        """Begin to write, after ``step`` of the run's ``total_steps``; ``deadline`` is of ``time.monotonic()``.

        All ranks begin together. Each measures once what its device can do at best.

        Raises:
            ValueError: if Weights & Biases is asked for and not installed.
        """
        self._on_row, self._opened = on_row, (total_steps, deadline, on_row)
        self._peak = self._rank_values.open(self._dtype)
        if not self._parallelism.is_main:
            return
        config = self._run.read_json("config.json")
        self._sinks = [JsonLines(self._run.metrics, self._run.evaluations), TensorBoard(self._run.path, step, config)]
        if self._wandb_project:
            self._sinks.append(WeightsAndBiases(self._wandb_project, self._run, config, self._console.print))
        self._terminal = Terminal(self._console, step, total_steps, deadline)
        self._sinks.append(self._terminal)
        self._sinks = [Tolerant(sink) for sink in self._sinks]

    def set_total(self, total_steps: int) -> None:
        """The run has another number of steps than it was opened with."""
        self._opened = (total_steps, *self._opened[1:])
        if self._terminal:
            self._terminal.set_total(total_steps)

    def start(self, step: int) -> None:
        """Begin the first interval, after ``step`` steps."""
        self._last_step, self._flops = step, 0
        self.clock.restart()

    def add(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """A step's values: scalars on the device."""
        self.values.add(loss, grad_norm, skipped)
        self._rank_values.next_step()
        if self._flops_of_step is not None:
            self._flops += self._flops_of_step()

    def log(self, row: Row, images: int) -> None:
        """Close an interval: its values begin their way to the host, and the row of the interval before is written.

        Args:
            row: what the trainer knows; at least ``step``.
            images: images a step, for the rate.
        """
        steps = row["step"] - self._last_step
        row |= self.clock.read(steps, steps * images)
        if self._flops and steps:
            rate = self._flops / (steps * row["step_time"])
            row["tflops_per_second"] = rate / 1e12
            if self._peak:
                row["mfu"] = min(1.0, rate / self._peak)
        self._rows.append((row, self.values.take(), self._rank_values.share(row)))
        self.start(row["step"])
        self.flush(pending=self._late)

    def flush(self, pending: int = 0) -> None:
        """Write the rows whose values have been given time to arrive; all but the newest ``pending``."""
        while len(self._rows) > pending:
            row, copy, shared = self._rows.pop(0)
            values = copy.wait()
            of_ranks, stragglers = shared()
            row |= of_ranks
            row["loss"], row["grad_norm"] = mean_of_finite(values["loss"]), mean_of_finite(values["grad_norm"])
            row["skipped_steps"] = int(sum(values["skipped"]))
            for check in self.checks:
                check(row, values)
            for sink in self._sinks:
                sink.write(row)
            if self._on_row:
                self._on_row(row)
            for line in stragglers:
                self._console.print(line)
            self._say_if_waiting(row)

    def evaluation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path] | None = None) -> None:
        """Show what an evaluation of the weights after a step found: numbers by name, and picture files by name."""
        for sink in self._sinks:
            sink.evaluate(step, values, pictures or {})

    def go_back(self, step: int) -> None:
        """Begin anew after an earlier step, to whose rows the files have been cut."""
        self.close()
        self._rows.clear()
        self.open(step, *self._opened)
        self.start(step)

    def close(self) -> None:
        self._rank_values.close()
        for sink in self._sinks:
            sink.close()

    def _say_if_waiting(self, row: Row) -> None:
        """Once, and not of the first interval, in which the loader starts."""
        if self._waiting_said is False and row["data_share"] > WAITING:
            self._waiting_said = True
            self._console.print(f"waiting for images: {row['data_share']:.0%} of the time; {self._advice}")
        self._waiting_said = bool(self._waiting_said)


def deadline_after(minutes: float | None) -> float:
    """The moment of ``time.monotonic()`` in so many minutes; infinity without a limit."""
    return time.monotonic() + 60 * minutes if minutes else math.inf
