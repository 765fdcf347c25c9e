"""Errors that the user can fix. The command line prints them as one line; anything else is a bug with a traceback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UsageError(ValueError):
    """An argument, flag or path that cannot be used; the message names it, what was expected and what came."""


@contextmanager
def usage_errors(flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn a ValueError or OSError raised inside into a :class:`UsageError`.

    Args:
        flags: maps an argument's name, if a message begins with it, to the flag that the value came from.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        name, colon, rest = str(error).partition(":")
        raise UsageError((flags or {}).get(name, name) + colon + rest) from error
