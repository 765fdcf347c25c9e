"""When to save by the clock and when to leave: what no rank may decide alone."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastmae.train.liveness.signals import StoppedEarly, StopRequest
from fastmae.train.ranks import Ranks


class Watch:
    """Looks at signals and clocks between steps, with the same outcome on all ranks at the same step.

    Several ranks ask each other at every step and look at the answers a step later, so that none waits.

    Args:
        ranks: who has to agree.
        stop: this process's signals.
        deadline: of ``time.monotonic()``, when to leave.
        save_every: seconds between two checkpoints; None for none by the clock.

    Attributes:
        save_due: whether the time for a checkpoint has come, at the last look.
    """

    def __init__(self, ranks: Ranks, stop: StopRequest, deadline: float, save_every: float | None) -> None:
        self._ranks, self._stop, self._deadline, self._save_every = ranks, stop, deadline, save_every
        self._answers: Callable[[], list[bool]] = lambda: [False, False]
        self.saved()

    def saved(self) -> None:
        """A checkpoint was saved: the time until the next one begins; every rank calls it at the same steps."""
        self._saved_at, self.save_due = time.monotonic(), False
        asked = self._answers  # before this save, which was what they asked for
        self._answers = lambda: [asked()[0], False]

    def must_leave(self) -> bool:
        """Look: whether a signal has come, or the time is over."""
        now = time.monotonic()
        leaves = bool(self._stop.requested) or now >= self._deadline
        asked = self._ranks.ask(leaves, bool(self._save_every and now - self._saved_at >= self._save_every))
        answers, self._answers = (asked, asked) if self._ranks.size == 1 else (self._answers, asked)
        leaves, self.save_due = answers()
        return leaves

    def signal(self) -> str | None:
        """The signal that came, to this rank or to another; all have to ask."""
        return _signal(self._ranks, self._stop)


def leave_if_asked(ranks: Ranks, stop: StopRequest) -> None:
    """Between two stages of what comes before the first step; every rank calls it.

    Raises:
        StoppedEarly: on all ranks, if a signal has come to any.
    """
    if name := _signal(ranks, stop):
        raise StoppedEarly(name)


def _signal(ranks: Ranks, stop: StopRequest) -> str | None:
    anywhere = ranks.any(bool(stop.requested))
    return stop.requested or ("a signal to another rank" if anywhere else None)
