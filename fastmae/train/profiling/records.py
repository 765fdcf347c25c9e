"""Steps of a trainer under ``torch.profiler``, and what it recorded as spans and kernels."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from fastmae.train.profiling.breakdown import (
    BACKWARD,
    LABELS,
    Breakdown,
    Kernel,
    break_down_device,
    break_down_host,
    stage_of,
)
from fastmae.train.profiling.kinds import is_trained_with
from fastmae.train.profiling.labels import labelled
from fastmae.train.profiling.spans import Span, Timeline

_STEP, _NODE = "ProfilerStep#", "autograd::engine::evaluate_function"
_RUNTIME = ("cuda", "cu", "hip")
"""How the driver's own calls on the host begin, which are no operators."""


class Recorder:
    """Records steps of a trainer, the stages named. Its owner trains, and calls :meth:`step` after each step.

    Nothing that is trained changes: the device is waited for at the beginning and at the end of what is recorded, and
    nowhere else.

    Args:
        trainer: whose next steps are recorded.
        steps: to record.
        warmup: steps before them, in which the profiler runs and what it sees is thrown away.

    Attributes:
        profiler: PyTorch's, once started.
        steps: that are recorded so far.
        running: whether steps are still wanted.
    """

    def __init__(self, trainer: Any, steps: int, warmup: int):
        self.profiler: profile | None = None
        self.steps = 0
        self._trainer, self._wanted, self._warmup = trainer, steps, warmup
        self._labels, self.running = ExitStack(), False

    def start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._trainer.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._left = self._warmup
        self._labels.enter_context(labelled(self._trainer))
        if not self._left:
            self._synchronize()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Profiler won't be using warmup")
            # PyTorch 2.11 says so of every profile; there is one cycle, so nothing is lost.
            warnings.filterwarnings("ignore", "Warning: Profiler clears events")
            plan = schedule(wait=0, warmup=self._warmup, active=self._wanted, repeat=1)
            self.profiler = profile(activities=activities, schedule=plan)
            self.profiler.start()
        self.running = True

    def step(self) -> bool:
        """A step is over. Returns whether all wanted ones are recorded now."""
        if self._left:
            self._left -= 1
            edge = not self._left
        else:
            self.steps += 1
            edge = self.steps == self._wanted
        if edge:
            self._synchronize()
        self.profiler.step()
        if self.steps == self._wanted:
            self.stop()
            return True
        return False

    def stop(self) -> None:
        """End, with fewer steps than wanted perhaps."""
        self._labels.close()
        if self.running:
            self.running = False
            self.profiler.stop()

    def breakdown(self) -> Breakdown:
        """Where the time of the recorded steps went."""
        events = self.profiler.profiler.kineto_results.events()
        return break_down(events, self._trainer.device.type == "cuda", self.steps)

    def _synchronize(self) -> None:
        if self._trainer.device.type == "cuda":
            torch.cuda.synchronize(self._trainer.device)


def break_down(events: Iterable[Any], on_gpu: bool, num_steps: int | None = None) -> Breakdown:
    """Where the time went in what a profiler recorded.

    Args:
        events: PyTorch's kineto events.
        on_gpu: whether the device's time is asked for, or that of the thread that trains.
        num_steps: whole steps among them, the first so many; None: all are whole.

    Raises:
        ValueError: if no whole step is among the events.
    """
    host, device, launches = defaultdict(list), [], {}
    for event in events:
        if event.device_type() != DeviceType.CPU:
            if not event.is_user_annotation():
                device.append(event)
        elif event.linked_correlation_id() or event.name().startswith(_RUNTIME):
            launches[event.correlation_id()] = event.start_ns() / 1e3
        elif not event.is_async() and not event.name().startswith("["):
            host[event.start_thread_id()].append(event)
    steps = [(thread, e) for thread, found in host.items() for e in found if e.name().startswith(_STEP)]
    if not steps:
        raise ValueError("events: expected at least one recorded step, got none")
    steps = sorted(steps, key=lambda step: step[1].start_ns())[:num_steps]
    trains = steps[0][0]
    window = min(e.start_ns() for _, e in steps) / 1e3, max(e.end_ns() for _, e in steps) / 1e3
    parts = _backward_parts(host, trains)
    spans = {thread: _spans(found, parts) for thread, found in host.items()}
    if not on_gpu:
        return break_down_host(spans[trains], window, len(steps))
    backward = {t for t, found in spans.items() if any(span.name.startswith(_NODE) for span in found)}
    timelines = {thread: Timeline(spans[thread]) for thread in {trains, *backward}}
    operators = {e.correlation_id(): (thread, e) for thread, found in host.items() for e in found}
    kernels = [_kernel(e, operators, launches, timelines) for e in device]
    return break_down_device(kernels, timelines[trains], window, len(steps))


def _backward_parts(host: dict[int, list[Any]], trains: int) -> dict[int, str]:
    """By the number that an operator of the forward shares with its backward: the stage of the latter."""
    labels = Timeline(_span(e) for e in host[trains] if e.name() in LABELS)
    found = {}
    for event in sorted(host[trains], key=lambda event: event.start_ns()):
        if event.sequence_nr() >= 0 and not event.fwd_thread_id():  # of several the last one made the node
            stage = stage_of((*labels.at(event.start_ns() / 1e3), event.name()))
            found[event.sequence_nr()] = BACKWARD.get(stage)
    return found


def _spans(events: Iterable[Any], parts: dict[int, str]) -> list[Span]:
    """A thread's spans, a node of the backward in one that names its stage."""
    found = []
    for event in events:
        part = parts.get(event.sequence_nr()) if event.name().startswith(_NODE) else None
        if part:
            found.append(_span(event)._replace(name=part))
        if not event.name().startswith(_STEP):
            found.append(_span(event))
    return found


def _span(event: Any) -> Span:
    return Span(event.name(), event.start_ns() / 1e3, event.end_ns() / 1e3)


def _kernel(event: Any, operators: dict, launches: dict[int, float], timelines: dict[int, Timeline]) -> Kernel:
    """A kernel with what launched it: an operator of a training thread or a CUDA graph, else it is the loader's."""
    span = _span(event)
    linked = event.linked_correlation_id()
    thread, operator = operators.get(linked, (None, None)) if linked else (None, None)
    if not linked and is_trained_with(span.name):
        return Kernel(*span, launches.get(event.correlation_id()))
    if thread not in timelines:
        return Kernel(*span)
    launched = launches.get(event.correlation_id(), operator.start_ns() / 1e3)
    return Kernel(*span, launched, timelines[thread].at(launched) or (operator.name(),))
