"""The run folder: created and locked first, so that a long run does not end in a folder that it cannot write.

It holds ``config.json``, ``status.json``, ``metrics.jsonl``, ``evaluations.jsonl``, TensorBoard events,
``checkpoints/``, ``reconstructions/``, ``bad_files.jsonl`` if there are any, and at the end ``model.safetensors`` (the
final weights) and ``summary.json``.
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

from fastmae.train.checkpoint.format import clean, refuse_url, sync

_log = logging.getLogger(__name__)

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
"""Errors of ``flock`` on a network file system that is mounted without locks."""
_LOCK = ".lock"


class RunFolder:
    """A run folder, made if it does not exist, and the lock on it; use as a context manager.

    Only rank 0, the ``leader``, holds the lock and writes. With ``resume`` the folder may hold a run. Messages call it
    by the ``flag`` that names it.

    Raises:
        ValueError: if the folder holds something and ``resume`` is false, or is in an object store.
        OSError: if it cannot be made or written, or if another process holds the lock (``BlockingIOError``).
    """

    def __init__(self, path: Path, *, resume: bool = False, leader: bool = True, flag: str = "--out") -> None:
        refuse_url(path, flag)
        self.path, self.leader, self._flag = Path(path), leader, flag
        self.checkpoints, self.reconstructions = self.path / "checkpoints", self.path / "reconstructions"
        self.metrics, self.evaluations = self.path / "metrics.jsonl", self.path / "evaluations.jsonl"
        if not leader:
            return
        self._existed = self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        if not resume and not self._is_new():
            self.close()
            raise ValueError(
                f"{flag}: expected a new or empty folder, got {self.path}, which is not empty; "
                "add --resume to continue the run in it, or choose another"
            )
        self.checkpoints.mkdir(exist_ok=True)
        self.reconstructions.mkdir(exist_ok=True)
        clean(self.checkpoints)

    def _acquire(self) -> None:
        self._lock = (self.path / _LOCK).open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise BlockingIOError(f"{self._flag} {self.path}: in use by {holder}") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _log.warning("%s: THE FILE SYSTEM HAS NO LOCKS (%s): a second run is not refused", self.path, error)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. If no run began, remove what was made for it, so that the next one can begin."""
        if not self.leader or self._lock.closed:
            return
        if self._is_new():
            for path in (self.checkpoints, self.reconstructions):
                if path.is_dir():
                    path.rmdir()
            (self.path / _LOCK).unlink(missing_ok=True)
            if not self._existed:
                self.path.rmdir()
        self._lock.close()

    def _is_new(self) -> bool:
        folders = (self.checkpoints, self.reconstructions)
        empty = {_LOCK, *(path.name for path in folders if path.is_dir() and not any(path.iterdir()))}
        return all(path.name in empty for path in self.path.iterdir())

    def write_json(self, name: str, values: dict[str, Any]) -> Path:
        """Replace a JSON file of the folder atomically: readers never see half of it, nor does a power cut leave it."""
        path = self.path / name
        if self.leader:
            replace_text(path, json.dumps(values, indent=1) + "\n")
        return path

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder; None if there is none."""
        return read_json(self.path / name)

    @contextmanager
    def failure_noted(self, step: Callable[[], int]) -> Iterator[None]:
        """Record an exception raised inside in ``status.json``, with the step that the function returns."""
        try:
            yield
        except BaseException as error:
            self.note_failure(step(), repr(error))
            raise

    def note_failure(self, step: int, reason: str) -> None:
        """Record in ``status.json`` that the run failed, if the disk is not full."""
        with suppress(OSError):
            self.write_json("status.json", {"status": "failed", "step": step, "reason": reason})

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``."""
        return read_rows(self.metrics)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """The rows of ``evaluations.jsonl``."""
        return read_rows(self.evaluations)

    def cut_metrics(self, step: int) -> None:
        """Drop the rows of metrics and evaluations after a step, which a resumed run writes again."""
        for path in (self.metrics, self.evaluations):
            if self.leader and path.exists():
                replace_text(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step))


def read_json(path: Path) -> dict[str, Any] | None:
    """The values in a JSON file; None if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, in order, without one that a kill left half written."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text)
    sync(partial)
    partial.replace(path)
