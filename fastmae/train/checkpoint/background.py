"""Saving beside training: the step waits for a copy in host memory, a thread does the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmae.train.checkpoint.folder import CheckpointError, prune, refuse_url
from fastmae.train.checkpoint.ranks import Ranks
from fastmae.train.checkpoint.write import Part, Share, share_of, write


class BackgroundSaver:
    """Saves checkpoints in a thread, one at a time; use as a context manager, on every rank.

    The thread's collectives go over a group of their own, so that training may go on with its own meanwhile. The copies
    in host memory (page-locked, of CUDA tensors) are kept for the next save: they take as much memory as what the rank
    writes.

    Args:
        folder: the run's ``checkpoints`` folder.
        keep, keep_every: as in :func:`~fastmae.train.checkpoint.save_checkpoint`.
        ranks: who saves; None makes a group. Each has to be here.
        timeout: seconds that one step of a save may take on the slowest rank.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        ranks: Ranks | None = None,
        timeout: float = 1800.0,
    ) -> None:
        refuse_url(folder)
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._made = None if ranks else Ranks.create(timeout)
        self._asking = ranks or self._made
        self._ranks = self._asking.another(timeout)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copies = _HostCopies()
        self._pending: Future[Path] | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        manifest: Mapping[str, Any],
        *,
        own: Mapping[str, Tensor] | None = None,
        copy: bool = True,
        spare: Callable[[], int] | None = None,
    ) -> None:
        """Begin a save; the tensors may change as soon as this returns. Waits for the save before, if that is not done.

        Arguments and exceptions are those of :func:`~fastmae.train.checkpoint.save_checkpoint`; errors of the save
        before are raised here.

        Args:
            copy: False takes no memory for copies, and the tensors must not change until :meth:`wait` returns.
            spare: asked in the thread, a step: the newest checkpoint up to it is not deleted, however old it is.
        """
        self.wait()
        text = json.dumps(manifest)
        share = share_of(tensors, own or {}, self._ranks)
        share = self._copies.take(share) if copy else share
        self._pending = self._thread.submit(self._save, step, share, _events({**tensors, **(own or {})}), text, spare)

    def poll(self) -> Path | None:
        """The folder of a save that has just been done on all ranks, or its error; None if there is nothing new.

        Every rank calls it at the same steps. It asks the others only while a save is under way.

        Raises:
            CheckpointError: on all ranks alike, as :func:`~fastmae.train.checkpoint.save_checkpoint`; once.
        """
        if self._pending is None or self._asking.any(not self._pending.done()):
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """Wait for the save that was begun last; every rank gets the same path or error. None if there is none.

        Raises:
            CheckpointError: as :func:`~fastmae.train.checkpoint.save_checkpoint`; once.
        """
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    def close(self) -> None:
        """Wait for the save that was begun last, and give threads and connections back."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._ranks.close()
            if self._made:
                self._made.close()

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            print(f"WARNING: {error}", file=sys.stderr, flush=True)  # what ended the training is told by its own error

    def _save(
        self,
        step: int,
        share: Share,
        ready: list[torch.cuda.Event],
        manifest: str,
        spare: Callable[[], int] | None,
    ) -> Path:
        for event in ready:
            with torch.cuda.device(event.device):  # threads start on the first GPU, and would open a context there
                event.synchronize()
        path = write(self.folder, step, share, manifest, self._ranks)
        if self._ranks.rank == 0:
            prune(self.folder, path, self.keep, self.keep_every, spare() if spare else None)
        return path


@dataclass
class _HostCopies:
    """Buffers in host memory, by name."""

    buffers: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def take(self, share: Share) -> Share:
        """Begin copying; on a CUDA device in its current stream, so before anything that the stream is given next."""
        parts = {}
        for name, part in share.parts.items():
            tensor, buffer = part.tensor, self.buffers.get(name)
            if buffer is None or (buffer.dtype, buffer.shape) != (tensor.dtype, tensor.shape):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.buffers[name] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
            parts[name] = Part(part.piece, buffer)
        return Share(parts, share.own, share.total)


def _events(tensors: Mapping[str, Tensor]) -> list[torch.cuda.Event]:
    """What is reached when all that was queued so far on the tensors' CUDA devices is done."""
    events = []
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        events.append(torch.cuda.Event())
        events[-1].record(torch.cuda.current_stream(device))
    return events
