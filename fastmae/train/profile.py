"""Where the time of a step goes: stage times by events, and traces of a few steps by ``torch.profiler``.

A trainer enters ``trainer.stage(name)`` around "data", "masking", "forward", "backward" and "optimizer".
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import profile, record_function, schedule

from fastmae.train.callbacks import Callback

_WARMUP = 2  # steps before the wanted ones in which the profiler settles
_OPERATORS = 25


class StageTimes:
    """Times of each stage while it stands in a trainer's ``stage``.

    On a GPU a stage lies between two events on the current stream, which nobody waits for: what the device does for it
    counts, not when the host queues it. So waiting for images counts as far as the device has nothing left to do.
    Elsewhere the clock counts.

    Args:
        only: the stages to time; None for all. Events of those within a step cannot be captured in a CUDA graph.
    """

    def __init__(self, device: torch.device, only: Container[str] | None = None) -> None:
        self._cuda, self._only = device.type == "cuda", only
        self._spans: dict[str, deque[tuple[Any, Any]]] = defaultdict(deque)

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return self._timed(name) if self._only is None or name in self._only else nullcontext()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begun = self._now()
        yield
        self._spans[name].append((begun, self._now()))

    def take(self) -> dict[str, list[float]]:
        """Seconds by stage since the last call; what the device has not finished comes with the next one."""
        found: dict[str, list[float]] = {name: [] for name in self._spans}
        for name, spans in self._spans.items():
            while spans and (not self._cuda or spans[0][1].query()):
                begun, ended = spans.popleft()
                found[name].append(begun.elapsed_time(ended) / 1e3 if self._cuda else ended - begun)
        return found

    def _now(self) -> Any:
        if not self._cuda:
            return time.monotonic()
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

    def begin(self, trainer: Any) -> None:
        self._trainer, last = trainer, trainer.schedule.total_steps
        if not trainer.step < self._first <= last:
            self._print(f"the run trains steps {trainer.step + 1} to {last}; nothing will be profiled")
        elif trainer.parallelism.local_rank == 0:
            before = self._first - 1 - trainer.step
            warmup = min(_WARMUP, before)
            plan = schedule(wait=before - warmup, warmup=warmup, active=self._steps, repeat=1)
            self._profiler = profile(schedule=plan, on_trace_ready=self._write)
            trainer.stage = self._stage
            self._profiler.start()

    def after_step(self, trainer: Any) -> None:
        if self._profiler is not None:
            if trainer.device.type == "cuda" and trainer.step in (self._first - 1, self._first + self._steps - 1):
                torch.cuda.synchronize(trainer.device)  # so that the trace has whole steps, and only them
            self._profiler.step()

    def end(self) -> None:
        if self._profiler is not None:
            if (step := self._trainer.step) < self._first:
                self._print(f"the run ended at step {step}; nothing was profiled")
                self._profiler.on_trace_ready = None
            self._profiler.stop()
        self._trainer.stage = self._trainer.reporter.stages

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        with record_function(name), self._trainer.reporter.stages(name):
            yield

    def _print(self, text: str) -> None:
        self._trainer.console.print(f"--report.profile-at-step {self._first}: {text}")

    def _write(self, profiler: profile) -> None:
        trainer, self._profiler = self._trainer, None
        trainer.stage = trainer.reporter.stages
        name = f"rank-{trainer.parallelism.rank}-steps-{self._first}-{trainer.step}"
        trace = trainer.run.path / "traces" / f"{name}.json.gz"
        by = "self_device_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
        try:
            trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            trace.with_name(f"{name}.txt").write_text(
                profiler.key_averages().table(sort_by=by, row_limit=_OPERATORS, max_name_column_width=80) + "\n"
            )
        except OSError as error:  # no reason to end a run
            self._print(f"the trace could not be written: {error}")
            return
        trainer.console.print(f"Trace of steps {self._first} to {trainer.step}: {trace}")
