"""Metrics without synchronisation: values stay on the device for an interval and reach the host one interval late."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

Row = dict[str, Any]


class StepValues:
    """Values of each step of an interval, (interval, names) float32 on the device.

    They are part of a checkpoint, so that the interval in which a run was interrupted has the same mean as it would
    have had without the interruption.

    Args:
        names: of the values.
        interval: steps in a row of metrics.
        device: where the values are.
        average: a mean over all ranks, which is taken of an interval's values together and not of each step's.
    """

    def __init__(
        self,
        names: Sequence[str],
        interval: int,
        device: torch.device,
        average: Callable[[Tensor], Tensor] = torch.clone,
    ) -> None:
        self.names, self.count, self._average = tuple(names), 0, average
        self.values = torch.zeros(interval, len(self.names), device=device)

    def add(self, *values: Tensor) -> None:
        """One step's values: scalars on the device, in the order of the names."""
        torch.stack(values, out=self.values[self.count])
        self.count += 1

    def take(self) -> HostCopy:
        """Start copying the interval to the host, and begin the next one."""
        copy = HostCopy(self.names, self._average(self.values[: self.count]))
        self.count = 0
        return copy

    def state(self) -> Tensor:
        """The steps of the unfinished interval, (count, names), the same on all ranks."""
        return self._average(self.values[: self.count])

    def restore(self, state: Tensor, step: int) -> None:
        """Continue the unfinished interval of a run that was saved at ``step``, perhaps with another interval."""
        self.count = min(len(state), step % len(self.values))
        self.values[: self.count] = state[len(state) - self.count :].to(self.values.device)


class HostCopy:
    """An interval's values on their way to the host."""

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        self._names, self._event = names, None
        self._host = torch.empty(values.shape, pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> dict[str, list[float]]:
        """The values by name, one a step."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._host.T.tolist(), strict=True))


def mean_of_finite(values: Sequence[float]) -> float | None:
    """Mean of the finite values; None without any, since JSON has no NaN."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


class Sink(Protocol):
    """Somewhere that rows of metrics go."""

    def write(self, row: Row) -> None: ...

    def evaluate(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """What an evaluation of the weights after a step found: numbers, and picture files."""

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, appended: rows to one file, evaluations to another."""

    def __init__(self, path: Path, evaluations: Path) -> None:
        self._file, self._evaluations = path.open("a"), evaluations

    def write(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def evaluate(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        row = {"step": step, **values, **{name: str(path) for name, path in pictures.items()}}
        with self._evaluations.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard events; rows of a run's abandoned future are purged on resume."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"train/{name}", value, row["step"])

    def evaluate(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"eval/{name}", value, step)
        for name, path in pictures.items():
            with Image.open(path) as picture:
                self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Terminal:
    """A progress bar on a terminal, plain lines elsewhere: loss, learning rate, images/s, waiting for images, time
    left."""

    def __init__(self, console: Console, step: int, total_steps: int, deadline: float = math.inf) -> None:
        self._console, self._total, self._deadline = console, total_steps, deadline
        self._begun, self._first = time.monotonic(), step
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._progress = Progress(*columns, console=console, auto_refresh=False)  # no thread beside the training
            self._task = self._progress.add_task("training", total=total_steps, completed=step, text="")
            self._progress.start()

    def write(self, row: Row) -> None:
        done = row["step"] - self._first
        now = time.monotonic()
        left = (now - self._begun) / max(done, 1) * (self._total - row["step"])
        left = max(0.0, min(left, self._deadline - now))
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        rate = row["images_per_second"]
        text = f"loss {loss}  lr {row['lr']:.2e}  {rate:,.0f} images/s  "
        text += f"data {1000 * row['data_time']:.1f} ms ({row['data_share']:.0%})  {_clock(left)} left"
        if row["skipped_steps"]:
            text += f"  {row['skipped_steps']} steps skipped"
        if self._progress is None:
            self._console.print(f"step {row['step']:>{len(str(self._total))}}/{self._total}  {text}", highlight=False)
        else:
            self._progress.update(self._task, completed=row["step"], text=text, refresh=True)

    def evaluate(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        found = [f"{name} {value:.4g}" for name, value in values.items()] + [str(path) for path in pictures.values()]
        self._console.print(f"step {step}: {', '.join(found)}", highlight=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
