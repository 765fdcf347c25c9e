"""The run folder: made and locked before anything else, so that a long run does not end in an unwritable place.

It holds ``config.json``, ``status.json``, ``metrics.jsonl``, ``evaluations.jsonl``, TensorBoard events,
``checkpoints/``, ``reconstructions/``, ``model.safetensors`` (the final weights) and
``summary.json``; and ``bad_files.jsonl`` if there are any.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastmae.train.checkpoint import clean, refuse_url
from fastmae.train.checkpoint.format import sync

_log = logging.getLogger(__name__)

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
"""What ``flock`` says on a network file system that was mounted without locks."""

_LOCK = ".lock"


class RunFolder:
    """A run folder that this process holds the lock of; use as a context manager.

    Args:
        path: made if it is not there.
        resume: whether it may hold a run.
        leader: False for the other processes of the one that holds the lock: they write nothing here themselves, and
            what they are told to write is left to it.

    Raises:
        ValueError: if the folder already holds something and ``resume`` is false, or is in an object store.
        OSError: if it cannot be made or written, or if another process holds it (``BlockingIOError``).
    """

    def __init__(self, path: Path, *, resume: bool = False, leader: bool = True) -> None:
        refuse_url(path)
        self.path = Path(path)
        self.checkpoints, self.reconstructions = self.path / "checkpoints", self.path / "reconstructions"
        self.metrics, self.evaluations = self.path / "metrics.jsonl", self.path / "evaluations.jsonl"
        self.leader = leader
        if not leader:
            return
        self._was_there = self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / _LOCK).open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise BlockingIOError(f"--out {self.path}: in use by {holder}") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _log.warning("%s: THE FILE SYSTEM HAS NO LOCKS (%s): a second run in it would not be refused", path, error)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        if not resume and not self._is_new():
            self.close()
            raise ValueError(
                f"--out: expected a new or empty folder, got {self.path}, which is not empty; "
                "add --resume to continue the run in it, or choose another"
            )
        self.checkpoints.mkdir(exist_ok=True)
        self.reconstructions.mkdir(exist_ok=True)
        clean(self.checkpoints)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. What was made for a run that did not begin is removed, so that the next one can."""
        if not self.leader or self._lock.closed:
            return
        if self._is_new():
            for path in (self.checkpoints, self.reconstructions):
                if path.is_dir():
                    path.rmdir()
            (self.path / _LOCK).unlink(missing_ok=True)
            if not self._was_there:
                self.path.rmdir()
        self._lock.close()

    def _is_new(self) -> bool:
        empty = {_LOCK} | {
            p.name for p in (self.checkpoints, self.reconstructions) if p.is_dir() and not any(p.iterdir())
        }
        return all(p.name in empty for p in self.path.iterdir())

    def write_json(self, name: str, values: dict[str, Any]) -> Path:
        """Write a JSON file of the folder by way of a rename, so that it is never seen half written, nor after the
        machine went down."""
        path = self.path / name
        if not self.leader:
            return path
        partial = path.with_name(f".{name}.tmp")
        partial.write_text(json.dumps(values, indent=1) + "\n")
        sync(partial)
        return partial.replace(path)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None where there is none."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    @contextmanager
    def failure_noted(self, step: Callable[[], int]) -> Iterator[None]:
        """Whatever is raised inside is put into ``status.json``, with the step that a function gives, and raised on."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):  # a full disk must not hide what went wrong
                self.write_json("status.json", {"status": "failed", "step": step(), "reason": repr(error)})
            raise

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``, without one that a kill left half written."""
        return read_rows(self.metrics)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """The rows of ``evaluations.jsonl``, in the order in which they were written."""
        return read_rows(self.evaluations)

    def cut_metrics(self, step: int) -> None:
        """Drop the rows of metrics and evaluations after a step, which a continued run writes again."""
        for path in (self.metrics, self.evaluations):
            if self.leader and path.exists():
                kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
                partial = path.with_name(f".{path.name}.tmp")
                partial.write_text("".join(kept))
                sync(partial)
                partial.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file, or None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, without one that a kill left half written."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows
