"""Standard output and error that may go away: the reader of a pipe has ended, a terminal is closed, a disk is full."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

_log = logging.getLogger("fastmae")


class _Forgiving:
    """A stream that drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lost = stream, False

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        if not self._lost:
            self._lost = True
            _log.info("nobody reads what is printed any more: %s", error)


@contextmanager
def forgiving_output() -> Iterator[None]:
    """Inside, nothing that is printed raises for want of a place to go: a run does not end because ``| tee`` did."""
    with redirect_stdout(_Forgiving(sys.stdout)), redirect_stderr(_Forgiving(sys.stderr)):
        yield


def flush_output() -> None:
    """Before a process ends: what cannot be written is dropped, since Python would make another exit code of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
