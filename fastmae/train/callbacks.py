"""Callbacks: pictures, probes and traces attach to a run between its steps without touching the loop."""

from __future__ import annotations

from typing import Any


class Callback:
    """Called between steps, on every rank alike, so that it may use collectives. It must not change the training.

    The trainer's ``step``, ``model``, ``config``, ``run``, ``console``, ``device`` and ``parallelism`` may be read.
    """

    state_name: str | None = None
    """By what name checkpoints keep its state; it then has ``state_dict`` and ``load_state_dict``."""

    def attach(self, trainer: Any) -> None:
        """Once, when the trainer is made, before it loads a checkpoint."""

    def begin(self, trainer: Any) -> None:
        """Once, before the first step, with the initial or resumed weights."""

    def after_step(self, trainer: Any) -> None:
        """After a step, which ``trainer.step`` counts already."""

    def finish(self, trainer: Any) -> None:
        """After the last step of a run that is finished: all steps done, or the time limit reached."""

    def end(self) -> None:
        """Once, however the training ended, if :meth:`begin` was called, the last callback first; no collectives."""
