"""A run that stands still says which rank it waits for, at which step and in what.

Each rank publishes in the process group's store what it is doing. Nobody reads it as long as the steps go on.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from fastmae.train.liveness.collectives import CollectiveError, is_broken, reason_of
from fastmae.train.liveness.rank_states import (
    COMPUTING,
    COMPUTING_FIRST,
    SAVING,
    WAITING,
    RankState,
    StateBoard,
    StoreError,
    lagging_ranks,
    lost_ranks,
    may_be_long,
    tell,
)

_log = logging.getLogger(__name__)
_SILENT_BEATS = 10
"""Beats that a rank has to miss to count as lost."""

_Point = tuple[int, str, object]
"""Step, phase, and something new each time, so that a phase that begins again is seen to."""


class Heartbeat:
    """What this process is doing, published and watched by a thread of its own while the context lasts.

    After ``stall_seconds`` without progress it reads what the others published, says who lags, on the standard error of
    the lowest rank that answers and in the log of all (logger "fastmae"), and shows its own stacks if it is the one, or
    if all are at the same point. Then again after twice the time, and so on; and once, when it goes on.

    Args:
        rank: of this process.
        board: where states are published; None for one process alone.
        stall_seconds: time without progress until it is said. Less than the time limit of the collectives, since NCCL
            ends the process then.
        interval: seconds between two beats; None: a second, less for a small ``stall_seconds``.
    """

    def __init__(
        self,
        rank: int = 0,
        board: StateBoard | None = None,
        stall_seconds: float = 300.0,
        interval: float | None = None,
    ) -> None:
        self._board, self._stall = board, stall_seconds
        self._interval = interval or min(1.0, stall_seconds / _SILENT_BEATS)
        self._own = RankState(rank, socket.gethostname(), since=time.time())
        self._point: _Point = (0, "starting", object())
        self._published = self._point
        self._unreachable = False
        self._first: int | None = None
        self._aside: str | None = None
        self._stop = threading.Event()
        self._publishing = threading.Lock()
        self._trains = threading.current_thread()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @property
    def step(self) -> int:
        """The step that was reported last."""
        return self._point[0]

    def at(self, step: int, phase: str) -> None:
        """Say what begins now. It costs an assignment; being said again counts as progress, too."""
        self._point = (step, phase, object())

    def compute(self, step: int) -> None:
        """Say that a step computes; the first one compiles what is to be compiled, and may take long."""
        self._first = step if self._first is None else self._first
        self.at(step, COMPUTING if step != self._first else COMPUTING_FIRST)

    def begin(self, phase: str) -> None:
        """Say what begins now, at the step that was reported last."""
        self.at(self.step, phase)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around what waits for other ranks; in a thread beside the one that trains, it counts while that one saves."""
        if threading.current_thread() is not self._trains:
            self._aside = f"{WAITING} ({what})"
            yield
            self._aside = None
            return
        step, phase, _ = self._point
        self.at(step, f"{WAITING} ({what})")
        yield
        self.at(step, phase)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn the error of a broken collective into one that names the rank; tell the others of any error of this one.

        Raises:
            CollectiveError: instead of what :func:`~fastmae.train.liveness.collectives.is_broken` is true of.
        """
        try:
            yield
        except CollectiveError:
            raise
        except BaseException as error:
            broken = self._board is not None and is_broken(error)
            words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._publish(ended=words, broken=broken)
            if not broken:
                raise
            _log.info("a collective failed", exc_info=error)
            raise CollectiveError(self._explain(error)) from error

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(_SILENT_BEATS * self._interval)

    def _run(self) -> None:
        self._publish()
        seen, begun, looked, said = self._point, time.monotonic(), time.monotonic(), 0
        while not self._stop.wait(self._interval):
            self._publish()
            now, point = time.monotonic(), self._point
            if now - looked > self._stall:  # the whole process stood still, and not what it does
                self._say(f"this process ({self._own.place}) did not run for {now - looked:.0f} s", always=True)
                begun = now
            if point is not seen:
                if said:
                    self._say(f"goes on after {now - begun:.0f} s: at step {point[0]}, {point[1]}")
                seen, begun, said = point, now, 0
            elif now - begun >= self._stall * 2**said and self._report(point, begun, said):
                said += 1
            looked = time.monotonic()

    def _report(self, point: _Point, begun: float, said: int) -> bool:
        """Say who lags; False if it went on meanwhile."""
        try:
            before = self._read()
            patience = time.monotonic() + _SILENT_BEATS * self._interval
            while time.monotonic() < patience and self._board:
                if self._point is not point or self._stop.wait(self._interval):
                    return False
                self._publish()
            after = self._read()
        except StoreError as error:
            states, lost, lagging = [self._own], {}, [self._own.rank]
            what = f"{self._own.place} is {self._own}; where the others are is not known, since {error}"
        else:
            lost, states = lost_ranks(before, after, time.time()) if self._board else {}, after
            lagging = lagging_ranks(states, lost)
            what = tell(states, lost, lagging)
        own, long = self._own.rank, said == 0 and may_be_long(states, lost, lagging)
        line = f"no step for {time.monotonic() - begun:.0f} s: {what}" + (", which may take long" if long else "")
        answering = [state.rank for state in states if state and state.ended is None and state.rank not in lost]
        speaks = own == min(answering, default=own)
        self._say(line, always=speaks)
        if not long and (own in lagging or not lagging):
            self._say(f"stacks of {self._own.place}:\n{_stacks()}", always=speaks or own in lagging)
        return True

    def _explain(self, error: BaseException) -> str:
        """Who made a collective fail: the words of the rank that finds out first."""
        try:
            if text := self._board.agreed():
                return text
            before = after = self._board.read()
            patience = time.monotonic() + _SILENT_BEATS * self._interval
            lost, lagging = {}, []
            while time.monotonic() < patience:
                failed = [state for state in after if state and state.ended is not None and not state.broken]
                if failed or (text := self._board.agreed()):
                    break
                time.sleep(self._interval)
                after = self._board.read()
            else:
                lost = lost_ranks(before, after, time.time())
            if text:
                return text
            lagging = lagging_ranks(after, lost)
            network = f"all ranks answer, so it may be the network ({reason_of(error)})"
            return self._board.agree(f"a collective failed: {tell(after, lost, lagging) if lagging else network}")
        except StoreError as unreachable:
            return f"a collective failed ({reason_of(error)}), and {unreachable}: it has ended, or cannot be reached"

    def _read(self) -> list[RankState | None]:
        return self._board.read() if self._board else [self._own]

    def _publish(self, **changes: object) -> None:
        """This rank's state, from the thread, and at the end from the one that trains."""
        with self._publishing:
            point, own, now = self._point, self._own, time.time()
            since = own.since if point is self._published else now
            phase = self._aside or SAVING if point[1] == SAVING else point[1]
            self._own = replace(own, step=point[0], phase=phase, since=since, beat=own.beat + 1, alive=now, **changes)
            self._published = point
            if self._board:
                try:
                    self._board.publish(self._own)
                except StoreError as error:
                    if not self._unreachable:
                        self._say(f"{error}: a rank that hangs will not be named")
                    self._unreachable = True

    def _say(self, text: str, always: bool = False) -> None:
        """Log, and on the first rank (or ``always``) print."""
        _log.info(text)
        if always or self._own.rank == 0:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _stacks() -> str:
    """Where the threads of this process are, the main one first."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not threading.main_thread())
    own = threading.get_ident()
    parts = [
        f"thread {thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident])).rstrip()
        for thread in threads
        if thread.ident in frames and thread.ident != own
    ]
    return "\n".join(parts)
