"""Where the time of a step goes: stage times by events, and traces of a few steps by ``torch.profiler``.

A trainer enters ``trainer.stage(name)`` around "data", "masking", "forward", "backward" and "optimizer". That is a
no-op until :class:`StageTimes` or :class:`Profile` takes its place.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
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


class Spans:
    """Times of something that happens again and again.

    On a GPU it lies between two events on the current stream, which nobody waits for: what the device does counts, and
    not when the host queues it. Elsewhere the clock counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pairs: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        begun = self._now()
        yield
        self._pairs.append((begun, self._now()))

    def finished(self) -> list[float]:
        """Seconds of each since the last call, but for what the device has not finished, which the next call has."""
        seconds = []
        while self._pairs and (not self._cuda or self._pairs[0][1].query()):
            begin, end = self._pairs.popleft()
            seconds.append(begin.elapsed_time(end) / 1e3 if self._cuda else end - begin)
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StageTimes:
    """Seconds of each stage while it stands in a trainer's ``stage``."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._spans = device, defaultdict(lambda: Spans(device))

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return self._spans[name].measure()

    def read(self) -> dict[str, float]:
        """Seconds by stage since the last call; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return {name: sum(spans.finished()) for name, spans in self._spans.items()}


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
        self._last = 0

    def begin(self, trainer: Any) -> None:
        self._trainer, last = trainer, trainer.schedule.total_steps
        if not trainer.step < self._first <= last:
            self._say(f"the run trains steps {trainer.step + 1} to {last}; nothing will be profiled")
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
        if self._profiler is not None:
            self._last = trainer.step
            if trainer.device.type == "cuda" and trainer.step in (self._first - 1, self._first + self._steps - 1):
                torch.cuda.synchronize(trainer.device)  # so that the trace has whole steps, and only them
            self._profiler.step()

    def end(self) -> None:
        if self._profiler is not None:
            if self._last < self._first:
                self._say(f"the run ended at step {self._trainer.step}; nothing was profiled")
                self._profiler.on_trace_ready = None
            self._profiler.stop()
        self._trainer.stage = no_stage

    def _say(self, text: str) -> None:
        self._trainer.console.print(f"--report.profile-at-step {self._first}: {text}")

    def _write(self, profiler: profile) -> None:
        trainer, self._profiler = self._trainer, None
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
