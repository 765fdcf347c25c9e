"""Which errors are the user's to mend (one line, no traceback) and which are bugs (a traceback)."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UsageError(Exception):
    """Something that the user can mend; printed as one line."""


@contextmanager
def mistakes(flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """What goes wrong here is the user's to mend: outside, a ValueError or OSError counts as a bug.

    Args:
        flags: by the name of an argument, with which a message begins, the flag that it comes from.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        name, colon, rest = str(error).partition(":")
        raise UsageError((flags or {}).get(name, name) + colon + rest) from error


def is_mistake(error: Exception) -> bool:
    """Whether an error that ended a command is the user's to mend."""
    from fastmae.data import DataError
    from fastmae.train.checkpoint import CheckpointError
    from fastmae.train.liveness.collectives import CollectiveError

    full_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full_disk or isinstance(
        error, UsageError | DataError | CheckpointError | CollectiveError | FloatingPointError
    )
