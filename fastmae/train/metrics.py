"""What a run measures while it trains, and the rows that it makes of it; docs/training.md lists a row's fields.

No step waits for a measurement: losses stay on the device for an interval of steps, and the times of other ranks are on
their way for as long.
"""

from __future__ import annotations

import math
import resource
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from fastmae.train.config import PretrainConfig
from fastmae.train.flops import peak_flops
from fastmae.train.loggers import Loggers, Row, Terminal, open_loggers
from fastmae.train.parallel import DTYPES, Parallelism
from fastmae.train.profile import StageTimes
from fastmae.train.ranks import Ranks
from fastmae.train.run_folder import RunFolder

WAITING = 0.2  # share of an interval spent waiting for images, above which the terminal reports it
STRAGGLES = 0.1  # share of a step by which a straggler's own work takes longer than the median rank's
IN_A_ROW, AGAIN = 3, 100  # rows in a row with a straggler until it is named, and until it is named again
SHOWN_RANKS = 16  # ranks up to which a row has the times of each

Values = dict[str, list[float]]
"""Values of an interval's steps by name."""


class StepValues:
    """Loss, gradient norm and whether it was skipped of each step of an interval, on the device; averaged over all
    ranks once per interval and not per step."""

    NAMES = ("loss", "grad_norm", "skipped")

    def __init__(self, interval: int, parallelism: Parallelism) -> None:
        self._interval, self._average, self._device = interval, parallelism.mean, parallelism.device
        self.steps: list[Tensor] = []

    def add(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """A step's values: scalars on the device."""
        self.steps.append(torch.stack((loss, grad_norm, skipped)))

    def take(self) -> Callable[[], Values]:
        """Start copying the interval to the host, and begin the next one."""
        interval = self.state_dict()["interval"]
        self.steps = []
        return self.copy_of(interval)

    def copy_of(self, interval: Tensor) -> Callable[[], Values]:
        """Start copying the ``interval`` of :meth:`state_dict` to the host; calling the result waits for it."""
        host, copied = interval.to("cpu", non_blocking=True), None  # to page-locked memory
        if interval.is_cuda:
            copied = torch.cuda.Event()
            copied.record()

        def wait() -> Values:
            if copied is not None:
                copied.synchronize()
            return dict(zip(self.NAMES, host.T.tolist(), strict=True))

        return wait

    def state_dict(self) -> dict[str, Tensor]:
        """``interval``: the steps of the unfinished interval, (count, 3), the same on all ranks; all call it."""
        none = torch.empty(0, len(self.NAMES), device=self._device)
        return {"interval": self._average(torch.stack(self.steps) if self.steps else none)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue an unfinished interval, so that its mean is that of an undisturbed run."""
        self.steps = list(state["interval"].to(self._device))

    def begin(self, step: int) -> None:
        """Keep the values since the last multiple of the interval: the saved run may have had another interval."""
        self.steps = self.steps[max(0, len(self.steps) - step % self._interval) :]


class Reporter:
    """Collects each step's values, writes a row per interval, and names ranks that hold up the others.

    Rows are written one interval late on a GPU or with several ranks, so that no step waits.

    Args:
        step_flops: FLOPs of a step over all ranks, at present.
        passes: forward passes of this rank in a step.
        check: called with each row and its steps' values by name before the row is written; may add to the row.
    """

    def __init__(
        self,
        config: PretrainConfig,
        run: RunFolder,
        console: Console,
        parallelism: Parallelism,
        ranks: Ranks,
        step_flops: Callable[[], int],
        passes: int = 1,
        check: Callable[[Row, Values], None] = lambda row, values: None,
    ) -> None:
        self._run, self._console, self._ranks, self._is_main = run, console, ranks, parallelism.is_main
        self._device, self._dtype = parallelism.device, DTYPES[config.train.precision]
        self._wandb_project = config.report.wandb_project
        self._step_flops, self._passes, self._check = step_flops, passes, check
        self.values = StepValues(config.train.log_every_steps, parallelism)
        self.add = self.values.add
        # With DDP a forward pass is a rank's own work, in which it waits for nobody. That of a sharded model gathers
        # weights, which waits for the slowest rank.
        timed = {"data", "forward"} if ranks.size > 1 and not parallelism.sharded else {"data"}
        self.stages = StageTimes(self._device, timed)
        self._late = int(self._device.type == "cuda" or ranks.size > 1)
        self._rows: list[tuple[Row, Callable[[], Values], Callable[[], list[list[float]]]]] = []
        self._loggers = Loggers()
        self._rows_written, self._waiting_told, self._straggling = 0, False, 0

    def open(
        self, step: int, total_steps: int, deadline: float = math.inf, on_row: Callable[[Row], None] | None = None
    ) -> None:
        """Begin after ``step`` of ``total_steps``; all ranks together, since each measures its matrix products.

        The run ends at a ``deadline`` of ``time.monotonic()`` at the latest. ``on_row`` is called with each row.
        """
        self.total_steps, self._deadline, self._on_row = total_steps, deadline, on_row
        own = socket.gethostname(), peak_flops(self._device, self._dtype)
        self._hosts, peaks = zip(*self._ranks.gather("measuring the devices", lambda: own), strict=True)
        self._peak = None if None in peaks else math.fsum(peaks)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._open_loggers(step)

    def _open_loggers(self, step: int) -> None:
        if self._is_main:
            terminal = partial(Terminal, self._console, step, lambda: self.total_steps, self._deadline)
            self._loggers = open_loggers(self._run, terminal, step, self._wandb_project)

    def start(self, step: int) -> None:
        """Begin the first interval, after ``step`` steps."""
        self.values.begin(step)
        self.stages.take()
        self._last_step, self._begun = step, time.monotonic()

    def log(self, row: Row, images: int) -> None:
        """Close an interval: its values begin their way to the host, and the row of the interval before is written.

        ``row`` has what the trainer knows, at least ``step``; ``images`` are those of a step.
        """
        now, steps, seconds = time.monotonic(), row["step"] - self._last_step, self.stages.take()
        row["step_time"] = step_time = max(now - self._begun, 1e-9) / steps
        row["images_per_second"] = images / step_time
        if self._is_main:  # counting the FLOPs takes a second
            rate = self._step_flops() / step_time
            row["tflops_per_second"] = rate / 1e12
            if self._peak:
                row["mfu"] = min(1.0, rate / self._peak)  # above 1 if the device was busy, or emulates the precision
        # The median, since any pass may be interrupted. What the device has not finished comes with the next interval.
        forward_time = statistics.median(seconds.get("forward") or [math.nan]) * self._passes
        memory = torch.cuda.max_memory_allocated(self._device) / 2**30 if self._device.type == "cuda" else math.nan
        own = [sum(seconds.get("data", ())) / steps, forward_time, memory, _host_memory_gib()]
        self._rows.append((row, self.values.take(), self._ranks.collect("collecting times", own)))
        self._last_step, self._begun = row["step"], now
        self.flush(pending=self._late)

    def flush(self, pending: int = 0) -> None:
        """Write all rows but the newest ``pending``; waits for their values."""
        while len(self._rows) > pending:
            row, copy, collected = self._rows.pop(0)
            values = copy()
            row["skipped_steps"] = int(sum(values["skipped"]))
            for name in ("loss", "grad_norm"):
                finite = [value for value in values[name] if math.isfinite(value)]
                row[name] = math.fsum(finite) / len(finite) if finite else None
                row[f"{name}_max"] = max(finite, default=None)
            of_ranks, straggler = combine_ranks(collected(), row["step_time"], self._hosts)
            row |= of_ranks
            self._check(row, values)
            self._loggers.each(lambda logger, row=row: logger.write(row))
            if self._on_row:
                self._on_row(row)
            self._print_if_slow(row, straggler)

    def evaluation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path] | None = None) -> None:
        """Log an evaluation of the weights after a step: numbers by name, and picture files by name."""
        self._loggers.each(lambda logger: logger.evaluation(step, values, pictures or {}))

    def go_back(self, step: int) -> None:
        """Begin again after an earlier step, to whose rows the files have been cut."""
        self.close()
        self._rows.clear()
        self._open_loggers(step)
        self.start(step)

    def close(self) -> None:
        self._loggers.each(lambda logger: logger.close())

    def _print_if_slow(self, row: Row, straggler: str) -> None:
        self._rows_written += 1  # in the first interval the loader starts
        if row["data_share"] > WAITING and self._rows_written > 1 and not self._waiting_told:
            self._waiting_told = True
            share = f"waiting for images: {row['data_share']:.0%} of the time"
            self._console.print(f"{share}; `fastmae bench` with the same flags shows what would help")
        self._straggling = self._straggling + 1 if straggler else 0
        if self._straggling % AGAIN == IN_A_ROW:
            self._console.print(straggler)


def combine_ranks(values: Sequence[Sequence[float]], step_time: float, hosts: Sequence[str]) -> tuple[Row, str]:
    """What a row says of all ranks, and a line that names a straggler, empty if there is none.

    The steps of ranks that train together are all as long as the slowest one's. What differs is each rank's own work,
    in which it waits for no other: getting images, and computing, of which the forward pass is about a third.

    Args:
        values: of each rank: seconds per step waiting for images; seconds per step in forward passes, NaN if unknown;
            the most memory of the GPU, NaN without one, and of the host, GiB.
        step_time: seconds per step.
        hosts: of each rank.
    """
    names = ("data_time", "forward_time", "peak_memory_gib", "host_memory_gib")
    columns = dict(zip(names, zip(*values, strict=True), strict=True))
    known = {name: list(column) for name, column in columns.items() if all(map(math.isfinite, column))}
    row: Row = {name: max(column) for name, column in known.items() if name != "forward_time"}
    row["data_share"] = min(1.0, row["data_time"] / step_time)
    if len(hosts) == 1:
        return row, ""
    times = {name: known[name] for name in names[:2] if name in known}
    own = [waited + 3 * sum(passed) for waited, *passed in zip(*times.values(), strict=True)]
    slowest, excess = own.index(max(own)), max(own) - statistics.median_low(own)
    row |= {"slowest_rank": slowest, "slowest_host": hosts[slowest]}
    if len(hosts) <= SHOWN_RANKS:
        row["ranks"] = times
    parts = [
        f"{1e3 * seconds[slowest]:.1f} ms {what} (median {1e3 * statistics.median_low(seconds):.1f})"
        for seconds, what in zip(times.values(), ("waiting for images", "in forward passes"), strict=False)
    ]
    line = f"rank {slowest} ({hosts[slowest]}) holds up the others. Per step: {', '.join(parts)}"
    return row, line if excess > STRAGGLES * step_time else ""


def _host_memory_gib() -> float:
    """The most memory that this process has held (resident set size)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
