"""What looks at a run between its steps: pictures, probes, traces. None of it changes the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmae.train.loop import Trainer


class Observer:
    """Is called between steps, on every rank alike, so that it may use collectives; the methods here do nothing."""

    def begin(self, trainer: Trainer) -> None:
        """Once, before the first step, with the weights that it begins with."""

    def after_step(self, trainer: Trainer) -> None:
        """After a step, which ``trainer.step`` counts already."""

    def finish(self, trainer: Trainer) -> None:
        """After the last step of a run that is finished: all steps done, or the time limit reached."""

    def end(self) -> None:
        """Once, however the training ended, if :meth:`begin` was called; without collectives."""


@contextmanager
def observing(observers: Sequence[Observer], trainer: Trainer) -> Iterator[None]:
    """Begin all observers; end those that were begun, the last one first."""
    begun: list[Observer] = []
    try:
        for observer in observers:
            begun.append(observer)
            observer.begin(trainer)
        yield
    finally:
        for observer in reversed(begun):
            observer.end()
