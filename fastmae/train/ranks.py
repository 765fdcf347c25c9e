"""The ranks of a run, for what the host has to agree on: results, errors, flags.

A rank that fails alone leaves the others waiting for it. Here every rank does a step, or the first one does, and an
error reaches all of them as one :class:`CheckpointError` with the same words. Collectives of the training go elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class CheckpointError(Exception):
    """What cannot be saved, loaded or agreed on; raised on all ranks alike, and the message is for the user."""


class LostRankError(CheckpointError):
    """A rank has ended or does not answer: nothing more can be agreed on."""


class Ranks:
    """All ranks of the job on a gloo group, or this process alone. Every rank makes each call.

    Every method raises :class:`LostRankError` if a rank has gone. What waits for other ranks runs inside
    ``waiting(words for it)``, which the watchdog sets.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1
        self.waiting: Callable[[str], AbstractContextManager[object]] = nullcontext

    @classmethod
    def create(cls, timeout: float = 1800.0) -> Ranks:
        """A new group of all ranks, if ``torch.distributed`` is initialised, that waits ``timeout`` seconds for the
        slowest rank in one step, such as writing its file."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return cls()
        return cls(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))

    def another(self, timeout: float = 1800.0) -> Ranks:
        """The same ranks on another group, for another thread or time limit."""
        if self.group is None:
            return Ranks()
        members = dist.get_process_group_ranks(self.group)
        # PyTorch 2.11 names a group that only its members make by how many groups there are: a name that comes again
        # once one is closed, and with it the old addresses. So all make it together where all are in it.
        some = self.size < dist.get_world_size()
        options = {"backend": "gloo", "timeout": timedelta(seconds=timeout), "use_local_synchronization": some}
        ranks = Ranks(dist.new_group(members, **options))
        ranks.waiting = self.waiting
        return ranks

    def close(self) -> None:
        """Give the group's connections back."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group, self.rank, self.size = None, 0, 1

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def gather(self, what: str, function: Callable[[], T]) -> list[T]:
        """Call a function on every rank; each gets the results of all, in the order of ranks.

        Raises:
            CheckpointError: on every rank with the same words, if the function raises on any.
        """
        result, text, error = _attempt(function)
        outcomes: list[Any] = [(result, text)]
        if self.group is not None:
            own, outcomes = outcomes[0], [None] * self.size
            self._guard(what, lambda: dist.all_gather_object(outcomes, own, self.group))
        failed = [f"rank {rank}: {text}" if self.size > 1 else text for rank, (_, text) in enumerate(outcomes) if text]
        if failed:
            more = [f"and {len(failed) - 3} more ranks"] if len(failed) > 3 else []
            raise CheckpointError("; ".join(failed[:3] + more)) from error
        return [result for result, _ in outcomes]

    def first(self, what: str, function: Callable[[], T]) -> T:
        """Call a function on rank 0; every rank gets its result, or a CheckpointError if it raises."""
        result, text, error = _attempt(function) if self.rank == 0 else (None, None, None)
        outcome: list[Any] = [(result, text)]
        if self.group is not None:
            self._guard(what, lambda: dist.broadcast_object_list(outcome, group=self.group, group_src=0))
        result, text = outcome[0]
        if text:
            raise CheckpointError(text) from error
        return result

    def first_in_hours(self, what: str, function: Callable[[], T]) -> T:
        """:meth:`first` of what may take rank 0 longer than the group's time limit, such as indexing many images."""
        with self.another(timeout=24 * 3600.0) as patient:
            return patient.first(what, function)

    def broadcast(self, what: str, tensor: Tensor, source: int, group: dist.ProcessGroup | None = None) -> None:
        """Give every rank of a group (None: all) the elements that a tensor has on ``source``, a rank of the group.

        Tensors on a GPU go over the default process group, if that is of these ranks: it is the fast one.
        """
        if group is None:
            fast = tensor.is_cuda and dist.get_world_size() == self.size
            group = dist.group.WORLD if fast else self.group
        self._guard(what, lambda: dist.broadcast(tensor, group=group, group_src=source))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.maximum(flag)()[0])

    def maximum(self, *values: float) -> Callable[[], list[float]]:
        """:meth:`collect`, of which the result is the largest of each value."""
        collected = self.collect("asking all ranks", values)
        return lambda: [max(column) for column in zip(*collected(), strict=True)]

    def collect(self, what: str, values: Sequence[float]) -> Callable[[], list[list[float]]]:
        """Exchange a few numbers of each rank. Returns at once: calling the result waits for all ranks."""
        if self.group is None:
            return lambda: [list(values)]
        own = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        work = dist.all_gather(gathered, own, self.group, async_op=True)

        def wait() -> list[list[float]]:
            self._guard(what, work.wait)
            return torch.stack(gathered).tolist()

        return wait

    def _guard(self, what: str, collective: Callable[[], object]) -> None:
        try:
            with self.waiting(what):
                collective()
        except RuntimeError as error:  # gloo: a connection was closed, or the time is over
            reason = str(error).strip().splitlines()[-1][:300]
            raise LostRankError(f"{what}: a rank has ended or does not answer ({reason})") from error


def _attempt(function: Callable[[], T]) -> tuple[T | None, str | None, Exception | None]:
    """The result; or an error, and its words: with the type, unless it is fastmae's own or about files or values."""
    try:
        return function(), None, None
    except Exception as error:
        own = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
        expected = own or isinstance(error, (OSError, ValueError))
        return None, str(error) if expected and str(error) else repr(error), error
