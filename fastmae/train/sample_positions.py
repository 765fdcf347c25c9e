"""Which images belong to which step: consecutive ones, but for those that a run leaves out when it goes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class SamplePositions:
    """Global positions in the run's order of images, by step.

    A run that goes back to an earlier step after a divergence continues with later images, so that it does not meet the
    same ones again. From then on ``position = (step - jump's step) * samples_per_step + jump's position``.

    Args:
        samples_per_step: images that a step decodes, on all ranks together.
        jumps: (step, position) pairs, ascending in both: after so many steps, images follow from there. The first is
            (0, 0) of a run that starts at the beginning.
    """

    def __init__(self, samples_per_step: int, jumps: Sequence[Sequence[int]] = ((0, 0),)) -> None:
        self.samples_per_step = samples_per_step
        self._jumps = [(int(step), int(position)) for step, position in jumps]

    def after(self, step: int) -> int:
        """The position after ``step`` steps: images consumed so far, those left out among them."""
        begun, position = next(jump for jump in reversed(self._jumps) if jump[0] <= step)
        return position + (step - begun) * self.samples_per_step

    def of(self, step: int) -> tuple[int, int]:
        """The first and the last position of a step, counted from 1."""
        first = self.after(step - 1)
        return first, first + self.samples_per_step - 1

    def step_of(self, position: int) -> int:
        """The step, counted from 1, that a position belongs to."""
        begun, first = next(jump for jump in reversed(self._jumps) if jump[1] <= position)
        return begun + (position - first) // self.samples_per_step + 1

    def jump(self, step: int, position: int) -> None:
        """Have a later position follow after ``step`` steps; what was known of later steps no longer holds."""
        if position < self.after(step):
            raise ValueError(f"position: expected at least {self.after(step)} after step {step}, got {position}")
        self._jumps = [jump for jump in self._jumps if jump[0] < step] + [(step, position)]

    def state(self) -> list[list[int]]:
        """The jumps, for a checkpoint's manifest."""
        return [list(jump) for jump in self._jumps]

    def restore(self, manifest: Mapping[str, Any]) -> None:
        """Go on from a manifest: its ``jumps``, or where it has none its ``step`` and ``samples_consumed``."""
        step, consumed = manifest["step"], manifest["samples_consumed"]
        self._jumps = [(int(begun), int(position)) for begun, position in manifest.get("jumps", [[0, 0]])]
        if self.after(step) != consumed:
            self._jumps = [jump for jump in self._jumps if jump[0] < step] + [(step, consumed)]
