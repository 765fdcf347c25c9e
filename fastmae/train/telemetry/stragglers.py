"""Which rank holds the others up.

In synchronous training the steps of all ranks take as long as the slowest one's, so that a rank's step time says
nothing of it. What is compared is each rank's own work: how long it waits for its images, and how long it computes
something in which it waits for nobody, the forward of one block.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

COMPUTES = 1.25
"""Times the median that a rank's block takes, from which on the rank is a straggler."""
WAITS = 0.1
"""Share of a step that a rank waits for images longer than the median, from which on it is a straggler."""
IN_A_ROW = 3
"""Intervals after which a straggler is named."""
AGAIN = 100
"""Intervals after which it is named again."""
_MATTERS = 0.05
"""Share of a step by which slow computing makes it longer, at least; the blocks of a tiny model vary for no reason."""
_NAMED = 3


def summarize(name: str, values: Sequence[float], hosts: Sequence[str]) -> dict[str, Any]:
    """Smallest, median and largest of the ranks' values, and where the largest is; nothing without a finite one.

    Args:
        name: of the value, with which the result's names begin.
        values: one a rank, NaN for unknown.
        hosts: one a rank.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return {}
    most = max(range(len(values)), key=lambda rank: values[rank] if math.isfinite(values[rank]) else -math.inf)
    return {
        f"{name}_min": min(finite),
        f"{name}_median": statistics.median(finite),
        f"{name}_max": values[most],
        f"{name}_max_rank": most,
        f"{name}_max_host": hosts[most],
    }


class Stragglers:
    """Finds ranks whose own work takes longer than the median's in several intervals in a row, and says so now and
    then.

    Args:
        hosts: the host of each rank.
        forwards: times the forward of the block that a rank's blocks take in a step.
    """

    def __init__(self, hosts: Sequence[str], forwards: float) -> None:
        self._hosts, self._forwards, self._interval = hosts, forwards, 0
        self._streaks: dict[tuple[str, int], int] = {}
        self._said: dict[tuple[str, int], int] = {}

    def look(self, block_time: Sequence[float], data_time: Sequence[float], step_time: float) -> list[str]:
        """Lines to print of an interval, usually none.

        Args:
            block_time: seconds that the block takes each rank, NaN for unknown.
            data_time: seconds that each rank waits for images in a step.
            step_time: seconds that a step takes, all ranks alike.
        """
        self._interval += 1
        block, data = _common(block_time), _common(data_time)
        slow = {("block", rank) for rank, value in enumerate(block_time)
                if value > COMPUTES * block and self._forwards * (value - block) > _MATTERS * step_time}  # fmt: skip
        slow |= {("data", rank) for rank, value in enumerate(data_time) if value > data + WAITS * step_time}
        self._streaks = {key: self._streaks.get(key, 0) + 1 for key in slow}
        return self._lines("block", block_time, block) + self._lines("data", data_time, data)

    def _lines(self, kind: str, values: Sequence[float], common: float) -> list[str]:
        due = [rank for one, rank in self._streaks if one == kind and self._is_due((one, rank))]
        due.sort(key=lambda rank: -values[rank])
        self._said |= {(kind, rank): self._interval for rank in due}
        lines = []
        for rank in due[:_NAMED]:
            who, much = f"rank {rank} ({self._hosts[rank]})", f"{1e3 * values[rank]:.1f} ms"
            if kind == "block":
                line = f"{who} computes {values[rank] / common:.1f}x as long as the median (a block's forward {much} "
                line += f"against {1e3 * common:.1f} ms)"
            else:
                line = f"{who} waits {much} a step for images, the median {1e3 * common:.1f} ms"
            lines.append(f"{line}; all ranks wait for it")
        if len(due) > _NAMED:
            lines.append(f"and so do {len(due) - _NAMED} more ranks: {', '.join(map(str, due[_NAMED:][:20]))}")
        return lines

    def _is_due(self, key: tuple[str, int]) -> bool:
        said = self._said.get(key)
        return self._streaks[key] >= IN_A_ROW and (said is None or self._interval - said >= AGAIN)


def _common(values: Sequence[float]) -> float:
    """The lower median, which is the faster one of two; infinite where nothing can be compared."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median_low(finite) if len(finite) > 1 else math.inf
