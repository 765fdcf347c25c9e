"""Saving beside training: the step waits for a copy in host memory, a thread does the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmae.train.ranks import Ranks
from fastmae.train.sharded import Part, Share, prune, refuse_url, share_of, write


class BackgroundSaver:
    """Saves checkpoints in a thread, one at a time; use as a context manager, on every rank.

    The thread's collectives go over a group of their own, so that training may go on with its own meanwhile. The copies
    in host memory (page-locked, of CUDA tensors) are kept for the next save: they take as much memory as what the rank
    writes.

    Args:
        folder: the run's ``checkpoints`` folder.
        keep, keep_every: as in :func:`~fastmae.train.sharded.save`.
        timeout: seconds that one step of a save may take on the slowest rank.
    """

    def __init__(
        self, folder: Path, *, keep: int | None = None, keep_every: int | None = None, timeout: float = 1800.0
    ) -> None:
        refuse_url(folder)
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._ranks, self._asking = Ranks.create(timeout), Ranks.create(timeout)
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
    ) -> None:
        """Begin a save; the tensors may change as soon as this returns. Waits for the save before, if that is not done.

        Args and exceptions are those of :func:`~fastmae.train.sharded.save`; errors of the save before are raised here.
        """
        self.wait()
        text = json.dumps(manifest)
        share = share_of(tensors, own or {}, self._ranks)
        self._pending = self._thread.submit(self._save, step, self._copies.take(share), text)

    @property
    def failed(self) -> bool:
        """Whether the save that was begun last has failed here. Costs nothing, but ranks may differ for a while."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def check(self) -> None:
        """Raise the error of a failed save, on all ranks at the same step. Every rank calls it, at every step or some.

        Raises:
            CheckpointError: as :func:`~fastmae.train.sharded.save`.
        """
        if self._asking.any(self.failed):
            self.wait()

    def wait(self) -> Path | None:
        """Wait for the save that was begun last; every rank gets the same path or error. None if there is none.

        Raises:
            CheckpointError: as :func:`~fastmae.train.sharded.save`; once.
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
            self._asking.close()

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _save(self, step: int, copy: _Copied, manifest: str) -> Path:
        for event in copy.events:
            event.synchronize()
        path = write(self.folder, step, copy.share, manifest, self._ranks)
        if self._ranks.rank == 0:
            prune(self.folder, path, self.keep, self.keep_every)
        return path


@dataclass
class _Copied:
    share: Share
    events: list[torch.cuda.Event]


@dataclass
class _HostCopies:
    """Buffers in host memory, by name."""

    buffers: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def take(self, share: Share) -> _Copied:
        """Begin copying; on a CUDA device in its current stream, so before anything that the stream is given next."""
        parts, devices = {}, set()
        for name, part in share.parts.items():
            cuda = part.tensor.device if part.tensor.is_cuda else None
            buffer = self.buffers.get(name)
            if buffer is None or (buffer.dtype, buffer.shape) != (part.tensor.dtype, part.tensor.shape):
                buffer = torch.empty(part.tensor.shape, dtype=part.tensor.dtype, pin_memory=cuda is not None)
            self.buffers[name] = buffer.copy_(part.tensor, non_blocking=cuda is not None)
            parts[name] = Part(part.piece, buffer)
            devices |= {cuda} if cuda else set()
        events = []
        for device in devices:
            events.append(torch.cuda.Event())
            events[-1].record(torch.cuda.current_stream(device))
        return _Copied(Share(parts, share.own, share.total), events)
