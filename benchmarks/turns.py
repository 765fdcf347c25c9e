"""Loaders taking turns: while one is timed, the others stand still with their queues full.

A loader works ahead, so that its first batches after a pause cost nothing and its last ones leave work behind. Hence a
turn begins with batches that are not timed, more than any loader has ready, and ends when nobody works any more. Time
is taken over the batches in between; processor time over the whole turn, which begins and ends with full queues, and in
which therefore exactly as many images were made as were taken. Processor time is that of this process, its threads and
all processes that it started, seen from the operating system.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_QUIET_SECONDS, _QUIET_SHARE, _PATIENCE_SECONDS = 0.03, 0.05, 20.0


def processor_seconds(children: list[int] | None = None) -> float:
    """Seconds of processor time of this process and of its children that are alive, to the nanosecond (Linux).

    Args:
        children: their process ids, if known; looking for them costs some processor time itself.
    """
    return time.process_time() + sum(map(_seconds_of, _children(os.getpid()) if children is None else children))


def _seconds_of(pid: int) -> float:
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the kernel's number for a process's clock, as clock_getcpuclockid
    except OSError:  # it has ended
        return 0.0


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == parent:
            pid = int(path.parent.name)
            found += [pid, *_children(pid)]
    return found


def settle() -> None:
    """Wait until this process and its children do nothing."""
    deadline, quiet, children = time.monotonic() + _PATIENCE_SECONDS, 0, _children(os.getpid())
    while quiet < 2 and time.monotonic() < deadline:
        before = processor_seconds(children)
        time.sleep(_QUIET_SECONDS)
        quiet = quiet + 1 if processor_seconds(children) - before < _QUIET_SHARE * _QUIET_SECONDS else 0


class Course:
    """Several loaders on one machine, of whom one runs at a time.

    Args:
        batch_size: images a batch.
        steps: batches that are timed in a turn.
        ahead: batches before them that are not.
        synchronize: called behind the last batch of a turn; waits for the device, if batches go to one.
    """

    def __init__(self, batch_size: int, steps: int, ahead: int, synchronize: Callable[[], None] = lambda: None):
        self.batch_size, self.steps, self.ahead, self.synchronize = batch_size, steps, ahead, synchronize
        self._running: tuple[str, float] | None = None
        self._seconds: dict[str, list[float]] = {}

    @property
    def images(self) -> int:
        """Images that are timed in a turn."""
        return self.batch_size * self.steps

    def prepare(self, name: str, batches: Iterator) -> Iterator:
        """Begin a turn: wait for the one before to end, then take the batches that are not timed."""
        self.end_turn()
        self._running = name, processor_seconds()
        for _ in range(self.ahead):
            next(batches)
        return batches

    def run(self, batches: Iterator) -> None:
        """Take the batches that are timed."""
        for _ in range(self.steps):
            next(batches)
        self.synchronize()

    def end_turn(self) -> None:
        """Wait until nobody works, and note what the turn cost."""
        settle()
        if self._running is not None:
            name, begun = self._running
            self._seconds.setdefault(name, []).append(processor_seconds() - begun)
            self._running = None

    def facts(self, name: str, rounds: int) -> dict:
        """Processor time of a loader in its last turns: a median, and ratios to the others turn by turn."""
        self.end_turn()
        turns = {who: seconds[-rounds:] for who, seconds in self._seconds.items() if len(seconds) >= rounds}
        mine, images = turns[name], self.batch_size * (self.steps + self.ahead)
        ratios = {
            who: round(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)), 4)
            for who, theirs in turns.items()
            if who != name
        }
        seconds = statistics.median(mine) / images
        return {"cpu_seconds_per_image": seconds, "images_per_cpu_second": 1 / seconds, "cpu_ratios": ratios}
