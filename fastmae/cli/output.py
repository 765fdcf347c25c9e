"""What commands print and write: from several processes, on streams that may go away, into files that are whole."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from fastmae.train.launcher import rank_and_size

_log = logging.getLogger("fastmae")


def print_error(text: str, patience: float = 2.0) -> None:
    """Print the error that ends this process on stderr, unless another rank has ended first, with the same error.

    Rank 0 prints at once. Another rank waits for the SIGTERM that torchrun sends to the others when one has ended; if
    none comes, the error is its own. A little longer on higher ranks, so that one of those on a node prints.
    """
    rank, size = rank_and_size()
    where = f"rank {rank} ({socket.gethostname()}): " if rank else ""
    if rank and size > 1 and threading.current_thread() is threading.main_thread():
        ended = threading.Event()
        previous = signal.signal(signal.SIGTERM, lambda *_: ended.set())
        others_ended = ended.wait(patience + 0.3 * min(int(os.environ.get("LOCAL_RANK", 0)), 8))
        signal.signal(signal.SIGTERM, previous)
        if others_ended:
            _log.info("ends by an error: %s", text)
            return
    print(f"fastmae: error: {where}{text}", file=sys.stderr, flush=True)


class _Forgiving:
    """A stream that drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lost = stream, False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, function: Any) -> None:
        try:
            function()
        except OSError as error:
            if not self._lost:
                self._lost = True
                _log.info("nobody reads what is printed any more: %s", error)


@contextmanager
def forgiving_output() -> Iterator[None]:
    """Context in which printing never raises: a run survives the end of ``| tee``, a full disk and closed streams."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:  # what was closed; the next file opened would be in its place
        pass
    with os.fdopen(null, "w") as null:
        out, err = _Forgiving(sys.stdout or null), _Forgiving(sys.stderr or null)
        with redirect_stdout(out), redirect_stderr(err):
            yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write beside a file, which takes its place once the block ends; an error leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.partial")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def flush_output() -> None:
    """Drop what cannot be written before the process ends; Python would exit with another code because of it."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
