"""``--train.fit-steps``: a run's number of steps, set once so that its cosine ends within its time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from fastmae.train.config import PretrainConfig

FIRST, LAST = 10, 40
"""Steps of this process whose time is measured; before them, threads start and memory is allocated."""
_SHARE = 0.92
"""Of the time left that the steps are planned for; the rest is for pictures, checkpoints and noise."""
_MOST_WARMUP = 0.2
"""A shortened run's largest share of warm-up."""
_LENGTH = ("steps", "epochs", "warmup_steps", "warmup_epochs", "fit_steps")


class StepFit:
    """Measures the first steps of a run and shortens it to what its time holds.

    Args:
        deadline: of ``time.monotonic()``, when the run has to end.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline, self._ends = deadline, []

    def after_step(self, trainer: Any) -> None:
        """Take the time; after ``LAST`` steps, set the trainer's number of steps, the same on all ranks."""
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()  # the host runs ahead of the device
        self._ends.append(time.monotonic())
        if len(self._ends) < LAST:
            return
        ends = self._ends[FIRST - 1 :]
        seconds = median(later - earlier for earlier, later in pairwise(ends))
        fitting = trainer.step + max(1, int(_SHARE * (self._deadline - ends[-1]) / seconds))
        fitting = trainer.ranks.first("setting the number of steps", lambda: fitting)
        most = trainer.schedule.total_steps
        trainer.set_length(min(fitting, most))
        said = f"{fitting:,} steps fit" if fitting < most else f"all {most:,} steps fit"
        minutes = trainer.config.train.max_minutes
        trainer.console.print(f"{seconds * 1e3:.3g} ms per step: {said} into {minutes:g} minutes")


def with_length(config: PretrainConfig, steps: int, warmup_steps: float) -> PretrainConfig:
    """The configuration with a number of steps, and a warm-up of at most a fifth of it."""
    warmup = min(round(warmup_steps), int(_MOST_WARMUP * steps))
    length = dict(zip(_LENGTH, (steps, None, warmup, None, False), strict=True))
    return replace(config, train=replace(config.train, **length))


def with_saved_length(config: PretrainConfig, saved: Mapping[str, Any] | None) -> PretrainConfig:
    """The configuration with the number of steps that was set before a checkpoint, if it was.

    Args:
        saved: the checkpoint's manifest, if there is one.
    """
    if saved is None or not config.train.fit_steps or saved["config"]["train"].get("fit_steps", False):
        return config
    length = {name: saved["config"]["train"].get(name) for name in _LENGTH} | {"fit_steps": False}
    return replace(config, train=replace(config.train, **length))
