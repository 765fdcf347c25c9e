"""What was open on a thread, and when: nested spans as a sequence of segments."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple


class Span(NamedTuple):
    """An operator or a named range on a thread of the host; times in microseconds."""

    name: str
    begin: float
    end: float


class Segment(NamedTuple):
    """A stretch of a thread's time with the names of all spans that are open, outermost first."""

    begin: float
    end: float
    names: tuple[str, ...]


def segments(spans: Iterable[Span]) -> list[Segment]:
    """One thread's time, cut where a span begins or ends. Spans nest; one that outlasts its parent is cut off."""
    found: list[Segment] = []
    names: list[str] = []
    ends: list[float] = []
    now = 0.0

    def until(time: float) -> None:
        nonlocal now
        if names and time > now:
            found.append(Segment(now, time, tuple(names)))
        now = max(now, time)

    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        while ends and ends[-1] <= span.begin:
            until(ends.pop())
            names.pop()
        until(span.begin)
        ends.append(min(span.end, ends[-1]) if ends else span.end)
        names.append(span.name)
    while ends:
        until(ends.pop())
        names.pop()
    return found


class Timeline:
    """A thread's segments, to be asked what was open when."""

    def __init__(self, spans: Iterable[Span]):
        self.segments = segments(spans)
        self._begins = [segment.begin for segment in self.segments]

    def at(self, time: float) -> tuple[str, ...]:
        """The names that are open at a moment, outermost first."""
        index = bisect_right(self._begins, time) - 1
        return self.segments[index].names if index >= 0 and time < self.segments[index].end else ()
