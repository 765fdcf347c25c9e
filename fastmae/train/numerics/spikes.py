"""Steps whose loss or gradient norm stands out from those before them: found robustly, counted, and logged by position.

A step is judged by the median of the steps before it and by their median absolute deviation from it (MAD; Hampel,
"The Influence Curve and Its Role in Robust Estimation", JASA 1974), neither of which a few outliers move, and by their
logarithms, since both quantities are positive and scatter by factors. The values are those of all ranks together, and
come an interval at a time with the rows of metrics.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

WINDOW = 128
"""Steps that a step is compared with."""

LEAST = 48
"""Steps without which nothing is judged: the first ones of a run."""

DEVIATIONS = 7.0
"""Standard deviations of the logarithm above the median, as the MAD estimates them: 1.48 times the MAD."""

FACTORS = {"loss": 1.1, "grad_norm": 2.0}
"""Multiple of the median that a spike has at least, however little the values scatter; constant values do not."""

_TINY = 1e-30
"""In the place of zero, which has no logarithm."""

MAX_TOLD = 10
"""Lines on the terminal in a run; the file has all spikes."""


class Usual:
    """The last ``WINDOW`` finite values of a quantity, and what they say of the next one.

    Values that stand out are kept like others, so that a level that stays becomes the usual one after half a window.

    Args:
        factor: multiple of the median that a spike has at least.
        values: to begin with.
    """

    def __init__(self, factor: float, values: Sequence[float] = ()) -> None:
        self._factor, self.values = factor, deque(values, WINDOW)

    def judge(self, value: float) -> float | None:
        """What is usual, if the value is far above it; else None. The value then counts among the ones before."""
        if not math.isfinite(value):
            return None  # a skipped step: of that, others speak
        usual = self._exceeded(value) if len(self.values) >= LEAST else None
        self.values.append(value)
        return usual

    def _exceeded(self, value: float) -> float | None:
        middle = median(self.values)
        if value <= self._factor * middle:  # most steps, for which no deviation is computed
            return None
        center = math.log(max(middle, _TINY))
        deviation = 1.4826 * median(abs(math.log(max(other, _TINY)) - center) for other in self.values)
        return middle if math.log(value) > center + DEVIATIONS * deviation else None


class Spikes:
    """Watches losses and gradient norms, writes ``spikes.jsonl``, and says the first few on the terminal.

    A line of the file has ``step``, ``what`` (``loss`` or ``grad_norm``), ``value``, ``usual`` (the median of the steps
    before), ``positions`` (the first and the last image of the step, in the order of the run) and ``row``, the step of
    the row of metrics that counts it.

    Args:
        path: of the file.
        positions: of a step, counted from 1: the global positions of its first and last image.
        say: shows a line.
        writes: False on all ranks but one.
    """

    def __init__(
        self,
        path: Path,
        positions: Callable[[int], tuple[int, int]],
        say: Callable[[str], None],
        *,
        writes: bool = True,
    ) -> None:
        self._path, self._positions, self._say, self._writes = path, positions, say, writes
        self.restore({})

    def observe(self, row: dict[str, Any], values: Mapping[str, Sequence[float]]) -> None:
        """Look at an interval's values, one a step up to ``row["step"]``.

        Adds ``loss_max``, ``loss_spikes``, ``grad_norm_max`` and ``grad_norm_spikes`` to the row.
        """
        size = [row.get("input_height"), row.get("input_width")]
        if size != self._size:  # other images have another loss
            self._size, self._usual = size, {what: Usual(factor) for what, factor in FACTORS.items()}
        found = []
        for what, usual in self._usual.items():
            row[f"{what}_max"] = max(filter(math.isfinite, values[what]), default=None)
            spikes = list(map(usual.judge, values[what]))
            row[f"{what}_spikes"] = sum(spike is not None for spike in spikes)
            first = row["step"] - len(spikes) + 1
            for step, value, spike in zip(range(first, row["step"] + 1), values[what], spikes, strict=True):
                if spike is not None:
                    found.append((step, what, value, spike))
        for spike in sorted(found):
            self._record(*spike, row["step"])

    def _record(self, step: int, what: str, value: float, usual: float, row: int) -> None:
        first, last = positions = self._positions(step)
        if self._writes:
            line = {"step": step, "what": what, "value": value, "usual": usual, "positions": positions, "row": row}
            with suppress(OSError), self._path.open("a") as file:  # a full disk, which rows of metrics speak of
                file.write(json.dumps(line) + "\n")
        continues, self._last[what] = self._last.get(what) == step - 1, step
        if continues or self._told >= MAX_TOLD:
            return
        self._told += 1
        last_line = f"; more of them in {self._path.name} only" if self._told == MAX_TOLD else ""
        name = what.replace("grad_norm", "gradient norm")
        self._say(
            f"step {step}: {name} {value:.4g}, usually {usual:.4g} (images {first:,} to {last:,} of the run's order)"
            + last_line
        )

    def state(self) -> dict[str, Any]:
        """What the next steps are judged by, for a checkpoint's manifest."""
        usual = {what: list(usual.values) for what, usual in self._usual.items()}
        return {"usual": usual, "size": self._size, "last": dict(self._last), "told": self._told}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned; from nothing, if that is empty."""
        usual = state.get("usual", {})
        self._usual = {what: Usual(factor, usual.get(what, ())) for what, factor in FACTORS.items()}
        self._size: list[int | None] = state.get("size", [None, None])
        self._last: dict[str, int] = dict(state.get("last", {}))
        self._told: int = state.get("told", 0)
