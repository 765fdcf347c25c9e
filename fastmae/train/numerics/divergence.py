"""Steps without a finite gradient: each is skipped where it happens; many in a row mean that the run has diverged.

A skipped step leaves weights and moments as they are, so the same weights have then failed on batch after batch. More
batches will not mend them. Older weights on other images may: Chowdhery et al., "PaLM" (arXiv 2204.02311, section 5.1),
restart from a checkpoint before the trouble and leave out the batches around it; with the same batches from other
weights it did not come back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmae.train.telemetry.metrics import HostCopy


LEAST_FP16 = 17
"""Steps in a row that a divergence takes at least in fp16. A loss scale that is too high is halved in one after the
other: 17 times until it is below 1, from its first value of 2**16."""


class Divergence:
    """Counts steps in a row without a finite gradient, and says when, and how far, the run has to go back.

    It looks at values that reach the host late, with the rows of metrics. What follows from them does not depend on how
    late: the first ``rollback_after`` steps of a streak are the offending ones, whatever was done since.

    Args:
        rollback_after: steps in a row after which a run goes back.
        max_rollbacks: times in a run.

    Attributes:
        due: the first of ``rollback_after`` steps in a row, counted from 1; None if there are none.
        rollbacks: times that the run has gone back.
        last_finite: the newest step that is known to have been taken; 0 before the first.
    """

    def __init__(self, rollback_after: int, max_rollbacks: int) -> None:
        self.rollback_after, self.max_rollbacks = rollback_after, max_rollbacks
        self.restore({})

    def observe(self, row: dict[str, Any], values: Mapping[str, Sequence[float]]) -> None:
        """Look at an interval's values, one a step up to ``row["step"]``; adds ``rollbacks`` to the row."""
        row["rollbacks"] = self.rollbacks
        skipped = values["skipped"]
        for step, one in enumerate(skipped, row["step"] - len(skipped) + 1):
            if not one:
                self._length, self.last_finite = 0, step
                continue
            self._first = self._first if self._length else step
            self._length += 1
            if self._length >= self.rollback_after and self.due is None:
                self.due = self._first

    def newest_taken(self, step: int, interval: HostCopy) -> Callable[[], int]:
        """A function that gives the newest step that was taken and not skipped, and may wait for it.

        Args:
            step: of now.
            interval: values of the steps up to it that have not been observed.
        """
        observed = self.last_finite

        def newest() -> int:
            skipped = interval.wait()["skipped"]
            return max((s for s, one in enumerate(skipped, step - len(skipped) + 1) if not one), default=observed)

        return newest

    @property
    def offending(self) -> tuple[int, int]:
        """The first and the last of the steps for which the run goes back."""
        assert self.due is not None
        return self.due, self.due + self.rollback_after - 1

    @property
    def newest_sound(self) -> int:
        """The step up to which a checkpoint may be gone back to.

        The one before the offending steps. But if that is where the run went back to last time, then its weights have
        failed twice, on different images.
        """
        assert self.due is not None
        return self.due - 1 - (self._went_to == self.due - 1)

    def went_back(self, step: int, rollbacks: int) -> None:
        """The run went back to ``step``, and has done so ``rollbacks`` times."""
        self.due, self._length, self._went_to, self.rollbacks = None, 0, step, rollbacks
        self.last_finite = min(self.last_finite, step)

    def state(self) -> dict[str, int | None]:
        """For a checkpoint's manifest."""
        return {
            "due": self.due,
            "first": self._first,
            "length": self._length,
            "last_finite": self.last_finite,
            "rollbacks": self.rollbacks,
            "went_to": self._went_to,
        }

    def restore(self, state: Mapping[str, int | None]) -> None:
        """Go on from what :meth:`state` returned; from nothing, if that is empty."""
        self.due = state.get("due")
        self._first, self._length = state.get("first") or 0, state.get("length") or 0
        self.last_finite, self.rollbacks = state.get("last_finite") or 0, state.get("rollbacks") or 0
        self._went_to = state.get("went_to")
