"""Leaving on request: SIGINT, SIGTERM and SIGUSR1 ask the training to save and stop, or not to begin.

A second SIGINT or SIGTERM ends it at once, but not the same one soon after: a batch system may signal every process of
a job, launchers included, and those pass on what they get. SIGUSR1 is notice only, however often it comes: a SIGTERM
after it is the first, since a batch system sends one when its time is over, and allows for some more.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

PREEMPTED = 75
"""Exit code of a run that saved and left on a signal: ``EX_TEMPFAIL`` of sysexits.h, "try again later"."""
_TWICE = {signal.SIGINT: 1.0, signal.SIGTERM: 15.0}
"""Seconds within which the same signal again is the same request, delivered in two ways: a launcher on a busy machine
takes its time, and a person has SIGKILL as well."""


class StoppedEarly(Exception):
    """A signal came before the first step, or during the final evaluation; the message is its name."""


class StopRequest:
    """A context within which the first of the signals only sets ``requested``.

    The handler does nothing else: the loop looks at the flag between steps, so that a save never starts inside one.
    Before the first step it is looked at where nothing is half done. The evaluation after the last step, which can be
    repeated, is ended at once: see :meth:`raising`.
    Outside the main thread, where Python does not allow handlers, the flag stays unset.

    Args:
        quiet: do not say that it was heard, as another process does.

    Attributes:
        requested: the first signal's name; None until one comes.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self.requested: str | None = None
        self._demand: tuple[int, float] | None = None  # the first SIGINT or SIGTERM, and when
        self._raises = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Within, a signal raises :class:`StoppedEarly` at once, and so does one that came before."""
        if self.requested:
            raise StoppedEarly(self.requested)
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if number not in _TWICE and self.requested:
            return
        if number in _TWICE:
            if self._demand:
                first, at = self._demand
                if number == first and now - at < _TWICE[number]:
                    return
                os._exit(128 + number)
            self._demand = number, now
        self.requested = self.requested or name
        if not self._quiet:
            leaves = "ending the evaluation" if self._raises else "saving and leaving"
            # Not print: a handler may interrupt a write to the same buffered stream, which raises when re-entered.
            with suppress(OSError):  # what reads it may have got the same signal, and ended
                os.write(2, f"\n{name}: {leaves}; once more to leave at once\n".encode())
        if self._raises:
            self._raises = False  # not again while this one unwinds
            raise StoppedEarly(name)
