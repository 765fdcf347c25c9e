"""Where the time of a log interval goes, by the host's clock and without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Times a log interval and, in it, the waiting for images.

    A host that queues work for a GPU is ahead of it by many steps, and waits for the next batch although the device has
    plenty to do. Such a wait costs nothing and is not counted: what is queued before it has an event behind it, and if
    that has not been reached when the batch is there, the device has not waited. The event is asked, never waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self.restart()

    def restart(self) -> None:
        """Begin an interval."""
        self._begun, self._waited = time.monotonic(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for images."""
        if self._event is not None:
            self._event.record()
        begun = time.monotonic()
        yield
        if self._event is None or self._event.query():
            self._waited += time.monotonic() - begun

    def read(self, steps: int, images: int) -> dict[str, float]:
        """``images_per_second``; ``step_time``, the seconds that each of the steps took, with all between them;
        ``data_time``, those of them that waited for images; ``data_share``, the share of the interval that did."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        return {
            "images_per_second": images / seconds,
            "step_time": seconds / max(steps, 1),
            "data_time": self._waited / max(steps, 1),
            "data_share": self._waited / seconds,
        }
