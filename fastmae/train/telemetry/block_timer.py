"""How long a rank computes something in which it waits for nobody."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from typing import Any

import torch
from torch import nn

_KEPT = 32
"""Timings that may wait to be taken; older ones are dropped."""


class BlockTimer:
    """Times the forward of one block now and then, by events on a GPU, which are read when they have happened.

    A hook before the forward runs after those that were there: with FSDP, after the wait for the block's weights. A
    block that is compiled by itself has its hooks outside the graph; in a model that is compiled as a whole there must
    be no hook, and this class has no place.

    Args:
        block: after ``fully_shard``; called once in each forward pass.
        device: of the block.
        every: steps between two that are timed.
    """

    def __init__(self, block: nn.Module, device: torch.device, every: int = 1) -> None:
        self._cuda, self._every, self._steps = device.type == "cuda", every, 0
        self._armed, self._begin = True, None
        self._timed: deque[tuple[Any, Any]] = deque(maxlen=_KEPT)
        self._hooks = [
            block.register_forward_pre_hook(self._before),
            block.register_forward_hook(self._after, prepend=True),
        ]

    def next_step(self) -> None:
        """A step is done."""
        self._steps += 1
        self._armed = self._steps % self._every == 0

    def take(self) -> float:
        """Median seconds of what was timed since the last call, as far as it has happened; NaN if nothing has."""
        seconds = []
        while self._timed and (not self._cuda or self._timed[0][1].query()):
            begin, end = self._timed.popleft()
            seconds.append(begin.elapsed_time(end) / 1e3 if self._cuda else end - begin)
        return statistics.median(seconds) if seconds else math.nan

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, block: nn.Module, args: object) -> None:
        self._begin = None
        if self._armed and block.training:  # in a picture or a probe the model is in evaluation mode
            self._armed, self._begin = False, self._now()

    def _after(self, block: nn.Module, args: object, result: object) -> None:
        if self._begin is not None:
            self._timed.append((self._begin, self._now()))
            self._begin = None

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
