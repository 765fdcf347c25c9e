"""The folder that shards are packed into: whose it is, what was begun in it, and how far that got."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastmae.data.batch import DataError
from fastmae.data.shard_file import sync_folder
from fastmae.data.tar_shards import INDEX_SUFFIX

MANIFEST = "shards.json"
_PROGRESS = ".progress.jsonl"


class ShardFolder:
    """Held by one process at a time; use as a context manager.

    Attributes:
        path: the folder.
        done: what there is to say about each complete shard, by its name.

    Raises:
        DataError: it is in use, holds something else, or was begun with another plan.
        OSError: it cannot be made or written.
    """

    def __init__(self, path: Path, plan: dict[str, Any]):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"{path}: another process is packing shards into it") from error
            except OSError as error:  # some cluster file systems know no locks
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
            self._begin(plan)
            self.done = self._finished()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> ShardFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._lock)

    def add(self, record: dict[str, Any]) -> None:
        """Remember that a shard is complete."""
        with (self.path / _PROGRESS).open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[record["name"]] = record

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write down the whole: from now on the folder says that it is complete."""
        write_text(self.path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        (self.path / _PROGRESS).unlink(missing_ok=True)
        sync_folder(self.path)

    def _begin(self, plan: dict[str, Any]) -> None:
        """Write down what is going to be done, or see that it is what was begun."""
        path = self.path / MANIFEST
        if not path.exists():
            there = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
            if there:
                raise DataError(
                    f"{self.path}: expected a new or empty folder, or one with {MANIFEST}; found {there[0]!r}"
                )
            write_text(path, json.dumps(plan, indent=1) + "\n")
            return
        begun = self._manifest()
        differences = [f"{name} {begun.get(name)} there, {value} here" for name, value in plan.items()
                       if begun.get(name) != value]  # fmt: skip
        if differences:
            raise DataError(
                f"{self.path}: was begun with another source or other options: {'; '.join(differences)}. "
                "Give the same ones to continue it, or choose another folder"
            )
        for leftover in (*self.path.glob(".*.partial"), *self.path.glob(f".writing-*{INDEX_SUFFIX}")):
            leftover.unlink()  # of a process that was killed, since this one holds the lock

    def _manifest(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / MANIFEST).read_text()))
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.path / MANIFEST}: is damaged: {error}; remove the folder to begin anew") from error

    def _finished(self) -> dict[str, dict[str, Any]]:
        records = list(self._manifest().get("shards", []))
        if (self.path / _PROGRESS).is_file():
            for line in (self.path / _PROGRESS).read_text().splitlines():
                with suppress(ValueError):  # a kill can leave half a line
                    records.append(json.loads(line))
        complete = {record["name"]: record for record in records if self._is_complete(record)}
        # Written anew, so that nothing is appended to half a line.
        write_text(self.path / _PROGRESS, "".join(json.dumps(record) + "\n" for record in complete.values()))
        return complete

    def _is_complete(self, record: dict[str, Any]) -> bool:
        path = self.path / record["name"]
        index = path.with_name(path.name + INDEX_SUFFIX)
        return path.is_file() and path.stat().st_size == record["bytes"] and index.is_file()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
