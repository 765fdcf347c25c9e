"""Where the time of a step goes: stage times by events, and traces of a few steps by ``torch.profiler``.

A trainer enters ``trainer.stage(name)`` around "data", "masking", "forward", "backward" and "optimizer". That is a
no-op until :class:`StageTimes` or :class:`Profile` takes its place.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from fastmae.train.callbacks import Callback

Stage = Callable[[str], AbstractContextManager[Any]]

_NOTHING = nullcontext()
_WARMUP = 2
"""Steps before the wanted ones in which the profiler settles."""
_OPERATORS = 25


def no_stage(name: str) -> AbstractContextManager[None]:
    """What ``Trainer.stage`` is while nobody measures."""
    return _NOTHING


class StageTimes:
    """Seconds of each stage while it stands in a trainer's ``stage``.

    On a GPU a stage lies between two events on the current stream, and nothing waits for them before :meth:`read`: what
    the device does for a stage counts, not when the host queues it. Elsewhere the clock counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = self._now()
        yield
        self._spans[name].append((begun, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by stage since the last call; waits for the device."""
        spans, self._spans = self._spans, defaultdict(list)
        if self._cuda:
            torch.cuda.synchronize()
            return {name: sum(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in spans.items()}
        return {name: sum(b - a for a, b in pairs) for name, pairs in spans.items()}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Profile(Callback):
    """``--report.profile-at-step``: ``traces/rank-0-steps-100-102.json.gz`` for a trace viewer, and a ``.txt`` with the
    operators that took most time. Written by the first process of each node, so that nodes can be compared.

    Args:
        at_step: the first step to record, counted from 1 as rows of metrics count.
        steps: to record.
    """

    def __init__(self, at_step: int, steps: int) -> None:
        self._first, self._steps = at_step, steps
        self._profiler: profile | None = None
        self._last, self._written = 0, False

    def begin(self, trainer: Any) -> None:
        self._trainer = trainer
        if trainer.step >= self._first:
            self._say(f"the run is at step {trainer.step} already; nothing is profiled")
        elif (last := trainer.schedule.total_steps) < self._first:
            self._say(f"the run ends at step {last}; nothing will be profiled")
        elif trainer.parallelism.local_rank == 0:
            before = self._first - 1 - trainer.step
            warmup = min(_WARMUP, before)
            activities = [ProfilerActivity.CPU]
            if trainer.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            plan = schedule(wait=before - warmup, warmup=warmup, active=self._steps, repeat=1)
            self._profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
            trainer.stage = record_function
            self._profiler.start()

    def after_step(self, trainer: Any) -> None:
        if self._profiler is not None and not self._written:
            self._last = trainer.step
            if trainer.device.type == "cuda" and trainer.step in (self._first - 1, self._first + self._steps - 1):
                torch.cuda.synchronize(trainer.device)  # so that the trace has whole steps, and only them
            self._profiler.step()

    def end(self) -> None:
        if self._profiler is not None and not self._written:
            if self._last < self._first:
                self._say(f"the run ended at step {self._trainer.step}; nothing was profiled")
                self._profiler.on_trace_ready = None
            self._profiler.stop()
        self._trainer.stage = no_stage

    def _say(self, text: str) -> None:
        self._trainer.console.print(f"--report.profile-at-step {self._first}: {text}")

    def _write(self, profiler: profile) -> None:
        self._written, trainer = True, self._trainer
        trainer.stage = no_stage
        name = f"rank-{trainer.parallelism.rank}-steps-{self._first}-{self._last}"
        trace = trainer.run.path / "traces" / f"{name}.json.gz"
        by = "self_device_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
        try:
            trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            trace.with_name(f"{name}.txt").write_text(
                profiler.key_averages().table(sort_by=by, row_limit=_OPERATORS, max_name_column_width=80) + "\n"
            )
        except OSError as error:  # no reason to end a run
            self._say(f"the trace could not be written: {error}")
            return
        trainer.console.print(f"Trace of steps {self._first} to {self._last}: {trace}")
