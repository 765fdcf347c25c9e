"""Which errors mean that ranks no longer reach each other, as opposed to bugs that happen in several processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from fastmae.train.checkpoint import CheckpointError, LostRankError

_TRANSPORT = re.compile(
    r"\bgloo/(transport|rendezvous)/|Gloo connectFullMesh failed|Application timeout|NCCL communicator was aborted"
)
"""gloo raises plain RuntimeErrors that begin with the file of its source that found the connection broken."""

_DISAGREEMENT = "enforce fail"
"""In what gloo raises when ranks send each other tensors of different sizes: a bug, though in the same files."""


class CollectiveError(RuntimeError):
    """A collective failed because a rank ended, hangs or cannot be reached; the message says in one line which."""


def is_broken(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that another rank could not be reached in time."""
    while isinstance(error, RuntimeError | CheckpointError):  # what others make of it says more
        if isinstance(error, CollectiveError | LostRankError | dist.DistError):
            return True
        if isinstance(error, RuntimeError) and _TRANSPORT.search(str(error)) and _DISAGREEMENT not in str(error):
            return True
        error = error.__cause__
    return False


@contextmanager
def joining() -> Iterator[None]:
    """Around what makes the process group.

    Raises:
        CollectiveError: if the processes do not find each other.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_broken(error):
            raise
        raise CollectiveError(f"the processes do not find each other: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What the transport says, in one line of at most 200 characters, without the place in its source."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return re.sub(r"^\[\S*\] ", "", text).partition(" This is typically caused")[0][:200]
