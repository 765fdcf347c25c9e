"""What each rank is doing, for all ranks to read: kept in the process group's store, and told in one line."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

COMPUTING, COMPUTING_FIRST, WAITING = "computing", "computing the first step", "waiting for the others"
"""Phases in which a rank may stand because of another one. In any other it has work of its own."""

SAVING = "saving"

LONG = ("starting", "opening", "reading", SAVING, "evaluating", "ending", COMPUTING_FIRST)
"""Beginnings of phases that may take minutes with nothing wrong."""

_SHOWN = 3


class StoreError(RuntimeError):
    """The process group's store cannot be reached; the message names its host."""


@dataclass(frozen=True)
class RankState:
    """What a rank says of itself.

    Attributes:
        rank, host: which process, and on which machine.
        step: optimiser steps it has done.
        phase: what it is doing, such as "computing".
        since: ``time.time()`` at which it began to.
        beat: counts while the process lives.
        alive: ``time.time()`` of the last beat.
        ended: the error that ended its part, if one did.
        broken: whether that error was only that another rank could not be reached.
    """

    rank: int
    host: str
    step: int = 0
    phase: str = "starting"
    since: float = 0.0
    beat: int = 0
    alive: float = 0.0
    ended: str | None = None
    broken: bool = False

    @property
    def progress(self) -> tuple[int, int]:
        """Grows with what a rank has done: of two ranks the one behind is waited for."""
        stands = 2 if self.phase.startswith(WAITING) else int(self.phase in (COMPUTING, COMPUTING_FIRST))
        return self.step, stands

    @property
    def place(self) -> str:
        return f"rank {self.rank} ({self.host})"

    def __str__(self) -> str:
        seconds = self.alive - self.since
        lasting = f" for {seconds:.0f} s" if seconds >= 1 else ""
        return f"at step {self.step}, {self.phase}{lasting}"


class StateBoard:
    """The states of all ranks in a store. No call waits longer than ``limit`` seconds, whatever the store's host does.

    Args:
        connect: makes a client that nothing else uses, since one that waits keeps others from using it; called by the
            first of the methods below, which it may keep for ``patience`` seconds.
        rank, size: who publishes here, and how many do.
        host: of the store, for messages.
        limit, patience: seconds.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        rank: int,
        size: int,
        host: str = "this machine",
        limit: float = 5.0,
        patience: float = 60.0,
    ) -> None:
        self._connect, self._key, self.host, self._limit, self._patience = connect, str(rank), host, limit, patience
        self._keys = [str(rank) for rank in range(size)]
        self._store: dist.Store | None = None
        self._failed = False

    @classmethod
    def create(cls) -> StateBoard | None:
        """In the default process group's store; None where there is no group of several."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return None
        store = dist.distributed_c10d._get_default_store()
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if not isinstance(store, dist.TCPStore):
            return cls(store.clone, dist.get_rank(), dist.get_world_size())

        # Not clone(), which takes over the time limit of the collectives: of hundreds of ranks that connect at once
        # most are kept waiting for half of it.
        def connect() -> dist.Store:
            limit = timedelta(seconds=30)
            return dist.TCPStore(store.host, store.port, is_master=False, timeout=limit, wait_for_workers=False)

        return cls(connect, dist.get_rank(), dist.get_world_size(), store.host)

    def publish(self, state: RankState) -> None:
        """Make this rank's state known.

        Raises:
            StoreError: if the store does not answer. This and all other calls then raise it at once.
        """
        self._call(lambda: self._store.set(self._key, json.dumps(asdict(state))))

    def read(self) -> list[RankState | None]:
        """The states of all ranks; None of those that have not published any.

        Raises:
            StoreError: as above.
        """

        def get() -> list[bytes | None]:
            if self._store.check(self._keys):
                return self._store.multi_get(self._keys)
            return [self._store.get(key) if self._store.check([key]) else None for key in self._keys]

        return [None if text is None else RankState(**json.loads(text)) for text in self._call(get)]

    def agree(self, text: str) -> str:
        """The text of the rank that calls this first, on all ranks.

        Raises:
            StoreError: as above.
        """
        return self._call(lambda: self._store.compare_set("verdict", "", text)).decode()

    def agreed(self) -> str | None:
        """What :meth:`agree` settled, if it did.

        Raises:
            StoreError: as above.
        """
        return self._call(lambda: self._store.get("verdict").decode() if self._store.check(["verdict"]) else None)

    def _call(self, function: Callable[[], T]) -> T:
        """In a thread of its own: a host that hangs keeps a client waiting beyond the store's own time limit."""
        outcome: list[T] = []

        def run() -> None:
            with suppress(RuntimeError):  # DistStoreError, DistNetworkError
                self._store = self._store or self._open()
                outcome.append(function())

        if not self._failed:
            thread = threading.Thread(target=run, name="store", daemon=True)
            thread.start()
            thread.join(self._limit if self._store else self._patience)
        if not outcome:
            self._failed = True  # an answer that comes late would be taken for that to a later question
            raise StoreError(f"the process group's store on {self.host} does not answer")
        return outcome[0]

    def _open(self) -> dist.Store:
        store = self._connect()
        store.set_timeout(timedelta(seconds=self._limit))
        # A store may outlive a run. All ranks have begun as many, this one included.
        return dist.PrefixStore(f"fastmae/run-{store.add(f'fastmae/runs/{self._key}', 1)}", store)


def lost_ranks(
    before: Sequence[RankState | None], after: Sequence[RankState | None], now: float
) -> dict[int, float | None]:
    """Ranks that gave no sign of life between two readings, with the seconds since their last; None: they never did.

    Told by their counts and not by the time, so that it does not matter how well clocks of machines agree.

    Args:
        now: ``time.time()`` of the second reading.
    """
    lost: dict[int, float | None] = {}
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        if new is None:
            lost[rank] = None
        elif old is not None and old.beat == new.beat and new.ended is None:
            lost[rank] = max(now - new.alive, 0.0)
    return lost


def lagging_ranks(states: Sequence[RankState | None], lost: Mapping[int, float | None]) -> list[int]:
    """Ranks that the others wait for: those that failed or are lost, else those behind; none if all are alike."""
    failed = {state.rank for state in states if state and state.ended is not None and not state.broken}
    if failed or lost:
        return sorted(failed | lost.keys())
    present = [state for state in states if state]
    behind = min((state.progress for state in present), default=None)
    found = [state.rank for state in present if state.progress == behind]
    return found if len(found) < len(present) else []


def may_be_long(states: Sequence[RankState | None], lost: Mapping[int, float | None], lagging: Sequence[int]) -> bool:
    """Whether what all wait for is something that takes its time."""
    waited_for = [states[rank] for rank in lagging] if lagging else states
    well = not lost and all(state is not None and state.ended is None for state in waited_for)
    return well and all(state.phase.startswith(LONG) for state in waited_for)


def tell(states: Sequence[RankState | None], lost: Mapping[int, float | None], lagging: Sequence[int]) -> str:
    """In one line: what the lagging ranks are doing, and the others."""
    present = [state for state in states if state and state.rank not in lagging]
    if len(states) == 1:
        return str(states[0])
    if not lagging and _alike(present):
        return f"all {len(states)} ranks are {min(present, key=lambda state: state.alive - state.since)}"
    if not lagging:
        return f"of all ranks {_group(present)}"
    named = [_tell_one(rank, states[rank], lost) for rank in lagging[:_SHOWN]]
    if len(lagging) > _SHOWN:
        named.append(f"{len(lagging) - _SHOWN} more ranks like these")
    return "; ".join([*named, *([f"the other {_group(present)}"] if present else [])])


def _tell_one(rank: int, state: RankState | None, lost: Mapping[int, float | None]) -> str:
    if state is None:
        return f"rank {rank} has never been heard from"
    at = f"at step {state.step}, {state.phase}"
    if state.ended is not None:
        return f"{state.place} ended {at}: {state.ended}"
    if (silent := lost.get(rank)) is not None:
        return f"{state.place} has not been heard from for {silent:.0f} s, last {at}"
    return f"{state.place} is {state}"


def _group(states: Sequence[RankState]) -> str:
    """Several ranks in few words: "15 are at step 42, computing"."""
    steps = sorted({state.step for state in states})
    at = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    phases = [phase for phase, _ in Counter(state.phase for state in states).most_common(_SHOWN)]
    return f"{len(states)} {'is' if len(states) == 1 else 'are'} at {at}, {' or '.join(phases)}"


def _alike(states: Sequence[RankState]) -> bool:
    return len({(state.step, state.phase) for state in states}) == 1
