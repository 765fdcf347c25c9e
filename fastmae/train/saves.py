"""A run's checkpoints while it trains: one that cannot be saved does not end the training, and is not kept quiet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmae.train.checkpoint import BackgroundSaver, CheckpointError, LostRankError, Ranks
from fastmae.train.checkpoint.folder import step_of
from fastmae.train.config import TrainConfig
from fastmae.train.run_folder import RunFolder

MAX_FAILED = 3
"""Saves in a row that fail until the run ends: a disk that stays full is not going to keep what is trained on."""

_log = logging.getLogger(__name__)


class Saves:
    """Saves checkpoints, and decides what a failure means; every rank has one, and all decide alike.

    Disks fill up, and are emptied again. So a save that fails is reported and the next one is tried at its time, unless
    it is the run's first, its last, or the third in a row. A rank that has gone ends the run at once.

    Args:
        run: the run folder.
        train: how often to save, how many checkpoints to keep, and whether in the background.
        device: of the training; on a GPU saves are in the background unless the configuration says otherwise.
        ranks: who saves.

    Attributes:
        newest: the newest checkpoint, None before the first. A run that goes on from one sets it.
        failed: saves that have failed since the last that did not.
        on_saved: called with each checkpoint's folder, between two steps, once it is there.
    """

    def __init__(self, run: RunFolder, train: TrainConfig, device: torch.device, ranks: Ranks) -> None:
        self._run, self._train, self._ranks = run, train, ranks
        self._in_background = device.type == "cuda" if train.background_save is None else train.background_save
        self._begun = 0
        self.newest: Path | None = None
        self.failed = 0
        self.on_saved: Callable[[Path], None] | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """While it may be saved; waits for the last save, also after an error."""
        keep, keep_every = self._train.keep_checkpoints, self._train.keep_every_steps
        with BackgroundSaver(self._run.checkpoints, keep=keep, keep_every=keep_every, ranks=self._ranks) as self._saver:
            yield

    def holds(self, step: int) -> bool:
        """Whether the newest checkpoint is of this step."""
        return self.newest is not None and step_of(self.newest) == step

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        manifest: Mapping[str, Any],
        own: Mapping[str, Tensor],
        *,
        spare: Callable[[], int] | None = None,
        last: bool = False,
    ) -> None:
        """Save, or begin to; arguments as :func:`~fastmae.train.checkpoint.save_checkpoint` has them.

        Args:
            spare: as :meth:`~fastmae.train.checkpoint.BackgroundSaver.save` has it.
            last: of the run: it is waited for, and must not fail.

        Raises:
            CheckpointError: on all ranks alike, if a save failed that must not, this one or the one before.
        """
        self.wait()
        self._begun = step
        self._saver.save(step, tensors, manifest, own=own, copy=self._in_background, spare=spare)
        if last or not self._in_background:
            self.wait(last=last)

    def poll(self) -> None:
        """Take notice of a save that is done; every rank calls it at the same steps.

        Raises:
            CheckpointError: as :meth:`save`.
        """
        self._notice(self._saver.poll)

    def wait(self, *, last: bool = False) -> None:
        """Wait for the save that was begun.

        Raises:
            CheckpointError: as :meth:`save`.
        """
        self._notice(self._saver.wait, last)

    def _notice(self, ask: Callable[[], Path | None], last: bool = False) -> None:
        try:
            path = ask()
        except LostRankError:
            raise
        except CheckpointError as error:
            self._fail(error, last)
            return
        if path is None:
            return
        if self.failed:
            self._say(f"{path.name} is saved, after {self.failed} that failed", {})
        self.newest, self.failed = path, 0
        if self.on_saved:
            self.on_saved(path)

    def _fail(self, error: CheckpointError, last: bool) -> None:
        self.failed += 1
        if self.newest is None or last:
            raise error
        if self.failed >= MAX_FAILED:
            raise CheckpointError(
                f"{self.failed} saves in a row failed; the newest checkpoint is {self.newest}. The last: {error}"
            ) from error
        self._say(
            f"CHECKPOINT OF STEP {self._begun} NOT SAVED: {error}. The newest is {self.newest.name}; the training goes "
            f"on and saves again at its time. {self.failed} failed in a row, {MAX_FAILED} end the run",
            {"failed_saves": self.failed, "newest_checkpoint": self.newest.name, "reason": str(error)},
        )

    def _say(self, text: str, status: Mapping[str, Any]) -> None:
        _log.log(logging.WARNING if self._ranks.rank == 0 else logging.INFO, text)
        with suppress(OSError):  # the disk may be full
            self._run.write_json("status.json", {"status": "running", "step": self._begun, **status})
