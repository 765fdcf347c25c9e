"""Errors that the owner of the data can solve, and patience with file systems that fail for a moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
PAUSES = (0.1, 0.5, 2.0, 8.0, 20.0)
"""Seconds to wait before the second try, the third, and so on: half a minute in all."""


class DataError(Exception):
    """A problem with the data that its owner can solve; the message says what came and what was expected."""


class UndecodableImage(Exception):
    """An image cannot be used, which says nothing about others: its bytes are none, or have changed since."""


def with_retries(action: Callable[[], Result], path: str, give_up_on: tuple[type[BaseException], ...] = ()) -> Result:
    """Run an action on a file; on an ``OSError`` wait and try again, a few times.

    Errors of ``give_up_on`` pass through at once.

    Raises:
        DataError: the file system still fails after the last try.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except give_up_on:
            raise
        except OSError as error:
            if pause is None:
                raise DataError(f"{path}: cannot be read after {len(PAUSES) + 1} tries: {error}") from error
            logger.warning("%s: %s; trying again in %g s", path, error, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")
