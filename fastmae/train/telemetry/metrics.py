"""Metrics without synchronisation: values stay on the device for an interval and reach the host one interval late."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]


class StepValues:
    """Values of each step of an interval, (interval, names) float32 on the device.

    They are part of a checkpoint, so that the interval in which a run was interrupted has the same mean as it would
    have had without the interruption.

    Args:
        names: of the values.
        interval: steps in a row of metrics.
        device: where the values are.
        average: a mean over all ranks, which is taken of an interval's values together and not of each step's.
    """

    def __init__(
        self,
        names: Sequence[str],
        interval: int,
        device: torch.device,
        average: Callable[[Tensor], Tensor] = torch.clone,
    ) -> None:
        self.names, self.count, self._average = tuple(names), 0, average
        self.values = torch.zeros(interval, len(self.names), device=device)

    def add(self, *values: Tensor) -> None:
        """One step's values: scalars on the device, in the order of the names."""
        torch.stack(values, out=self.values[self.count])
        self.count += 1

    def take(self) -> HostCopy:
        """Start copying the interval to the host, and begin the next one."""
        copy = HostCopy(self.names, self._average(self.values[: self.count]))
        self.count = 0
        return copy

    def state(self) -> Tensor:
        """The steps of the unfinished interval, (count, names), the same on all ranks."""
        return self._average(self.values[: self.count])

    def copy_of(self, state: Tensor) -> HostCopy:
        """What :meth:`state` returned, on its way to the host."""
        return HostCopy(self.names, state)

    def restore(self, state: Tensor, step: int) -> None:
        """Continue the unfinished interval of a run that was saved at ``step``, perhaps with another interval."""
        self.count = min(len(state), step % len(self.values))
        self.values[: self.count] = state[len(state) - self.count :].to(self.values.device)


class HostCopy:
    """An interval's values on their way to the host."""

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        self._names, self._event = names, None
        self._host = torch.empty(values.shape, pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> dict[str, list[float]]:
        """The values by name, one a step."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._host.T.tolist(), strict=True))


def mean_of_finite(values: Sequence[float]) -> float | None:
    """Mean of the finite values; None without any, since JSON has no NaN."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def without_nan(value: Any) -> Any:
    """The same dicts, lists and values with None for numbers that are not finite, since JSON has none of these."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
