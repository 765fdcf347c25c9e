"""When to save and when to leave: at the same steps on all ranks, and once for each reason."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
from distributed import run_ranks

from fastmae.train.checkpoint import Ranks
from fastmae.train.liveness import watch
from fastmae.train.liveness.signals import StopRequest
from fastmae.train.liveness.watch import Watch

STEPS, EVERY = 30, 10.0


def saves_by_the_clock(rank: int) -> list[int]:
    """Steps after which a checkpoint is due: a step takes a second, by the clock of the first rank alone."""
    seconds = 0.0
    with Ranks.create() as ranks, patch.object(watch.time, "monotonic", lambda: seconds):
        looks = Watch(ranks, StopRequest(), math.inf, EVERY)
        saved = []
        for step in range(1, STEPS + 1):
            assert not looks.must_leave()
            seconds += rank == 0
            if looks.save_due:
                saved.append(step)
                looks.saved()
    return saved


def steps_until_a_signal_is_followed(rank: int) -> int:
    """A signal comes to the last rank during a step after which all of them save."""
    with Ranks.create() as ranks:
        stop = StopRequest()
        looks = Watch(ranks, stop, math.inf, None)
        for step in range(STEPS):
            if looks.must_leave():
                return step
            if step == 3:
                stop.requested = "SIGTERM" if rank == ranks.size - 1 else None
            looks.saved()
    return STEPS


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_by_the_clock_is_saved_once(world_size):
    calls = run_ranks(saves_by_the_clock, world_size)
    assert all(saved == calls[0] for saved in calls)
    assert len(calls[0]) == 2
    assert all(later - before >= EVERY for before, later in zip(calls[0], calls[0][1:], strict=False))


def test_a_save_does_not_hide_a_signal():
    assert run_ranks(steps_until_a_signal_is_followed, 2) == [5, 5]
