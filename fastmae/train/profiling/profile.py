"""``--report.profile-at-step``: a trace of a few steps and a summary of it, of the first process of every node."""

from __future__ import annotations

from typing import Any

from torch.autograd import DeviceType
from torch.profiler import profile

from fastmae.train.observers import Observer
from fastmae.train.profiling.records import Recorder

WARMUP = 2
"""Steps before the wanted ones in which the profiler settles."""

_OPERATORS = 15


class Profile(Observer):
    """Records a few steps, and writes ``traces/rank-0-steps-100-102.json.gz`` and a ``.txt`` that sums it up.

    Steps count from 1, as rows of metrics do. What is recorded is the first process of each node: differences between
    nodes are seen, and there are no more files than nodes.

    Args:
        at_step: the first step to record.
        steps: to record.
    """

    def __init__(self, at_step: int, steps: int):
        self._first, self._steps = at_step, steps
        self._recorder: Recorder | None = None
        self._trainer: Any = None

    def begin(self, trainer: Any) -> None:
        if trainer.step >= self._first:
            self._say(trainer, f"the run is at step {trainer.step} already; nothing is profiled")
            return
        if (last := trainer.schedule.total_steps) < self._first:
            self._say(trainer, f"the run ends at step {last}; nothing will be profiled")
            return
        if trainer.parallelism.local_rank == 0:
            self._trainer = trainer
            self._start_if_due()

    def after_step(self, trainer: Any) -> None:
        if self._recorder is not None and self._recorder.running:
            if self._recorder.step():
                self._write()
        elif self._recorder is None and self._trainer is not None:
            self._start_if_due()

    def end(self) -> None:
        trainer, recorder = self._trainer, self._recorder
        if recorder is not None and recorder.running:
            recorder.stop()
            if recorder.steps:
                self._write()
        if trainer is not None and (recorder is None or not recorder.steps):
            self._say(trainer, f"the run ended at step {trainer.step}; nothing was profiled")

    def _say(self, trainer: Any, what: str) -> None:
        trainer.console.print(f"--report.profile-at-step {self._first}: {what}")

    def _start_if_due(self) -> None:
        before = self._first - 1 - self._trainer.step
        if before <= WARMUP:
            self._recorder = Recorder(self._trainer, self._steps, warmup=before)
            self._recorder.start()

    def _write(self) -> None:
        recorder, trainer = self._recorder, self._trainer
        last = self._first + recorder.steps - 1
        trace = trainer.run.path / "traces" / f"rank-{trainer.parallelism.rank}-steps-{self._first}-{last}.json.gz"
        summary = trace.with_name(trace.name.replace(".json.gz", ".txt"))
        lines = [f"steps {self._first} to {last} on {trainer.device}", "", *recorder.breakdown().lines(), ""]
        lines += top_operators(recorder.profiler, recorder.steps)
        try:
            trace.parent.mkdir(parents=True, exist_ok=True)
            recorder.profiler.export_chrome_trace(str(trace))
            summary.write_text("\n".join(lines) + "\n")
        except OSError as error:  # no reason to end a run
            self._say(trainer, f"the trace could not be written: {error}")
            return
        trainer.console.print(f"Trace of steps {self._first} to {last}: {trace}\nWhere their time went: {summary}")


def top_operators(profiler: profile, steps: int, count: int = _OPERATORS) -> list[str]:
    """A table of the operators that took the most of the GPU's time, or of the processor's where there is no GPU."""
    averages = [one for one in profiler.key_averages() if one.device_type == DeviceType.CPU]
    on_device = any(one.self_device_time_total for one in averages)
    times = {one.key: one.self_device_time_total if on_device else one.self_cpu_time_total for one in averages}
    calls, total = {one.key: one.count for one in averages}, sum(times.values()) or 1.0
    lines = [f"{'ms a step':>10}{'share':>8}{'calls':>8}  operator, by {'device' if on_device else 'processor'} time"]
    for name in sorted(times, key=times.get, reverse=True)[:count]:
        ms = times[name] / steps / 1e3
        lines.append(f"{ms:>10.3f}{times[name] / total:>8.1%}{calls[name] / steps:>8.0f}  {name[:100]}")
    return lines
