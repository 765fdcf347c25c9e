"""Saving checkpoints: every tensor once, whoever holds it, one file per writing rank, in the background if asked."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastmae.train.checkpoint.format import (
    DTYPE_NAMES,
    SHARD,
    Chunk,
    discard,
    offsets_metadata,
    prune,
    publish,
    step_of,
    sync,
    write_manifest,
    write_tensors,
)
from fastmae.train.ranks import CheckpointError, LostRankError, Ranks

SMALL = 1 << 20
"""Bytes below which a tensor that all ranks hold is not worth another rank's writing it."""
WRITERS = 8
"""Ranks, at most, that divide the writing of tensors that all hold: every reader needs the files of them all."""
MAX_FAILED = 3
"""Failed saves in a row that end a run: a disk that stays full loses everything trained since."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavePlan:
    """What one rank writes, and where all tensors are."""

    chunks: dict[str, Chunk]
    tensors: dict[str, Tensor]  # the elements of this rank's chunks
    table: dict[str, Any]  # for the manifest: type, shape and file of every tensor; None means the shards
    shards: list[str]  # files of the shards, in the order of rows


def plan_save(tensors: Mapping[str, Tensor], ranks: Ranks) -> SavePlan:
    """What this rank writes. Every rank computes the same division, so nothing has to be exchanged.

    Each rank writes its shard of a DTensor, the first one where there are replicas. Tensors that all ranks hold are
    written by rank 0; if there are no others, up to ``WRITERS`` ranks, evenly spaced, divide the large ones.
    """
    plan = SavePlan({}, {}, {}, [])

    def add(name: str, file: str | None, mine: bool) -> None:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: safetensors has no type for {tensor.dtype}")
        plan.table[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "file": file}
        if mine:
            plan.chunks[name], plan.tensors[name] = local_chunk(tensor)

    own = SHARD.format(ranks.rank + 1)
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            plan.shards[:] = plan.shards or [SHARD.format(rank + 1) for rank in _first_replica(tensor)]
            add(name, None, own in plan.shards and tensor.to_local().numel() > 0)
    # The largest first, each to the rank that has the least to write.
    plain = {name: tensor.nbytes for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    load = dict.fromkeys(range(0, ranks.size, math.ceil(ranks.size / WRITERS)), 0)
    for name in sorted(plain, key=lambda name: (-plain[name], name)):
        writer = min(load, key=load.__getitem__) if not plan.shards and plain[name] >= SMALL else 0
        load[writer] += plain[name]
        add(name, SHARD.format(writer + 1), writer == ranks.rank)
    return plan


def write(folder: Path, step: int, plan: SavePlan, manifest: str, ranks: Ranks) -> Path:
    """All ranks write their files, then rank 0 writes the manifest, whose values are JSON text, and publishes."""
    final, partial = folder / f"step-{step}", folder / f"step-{step}.tmp"

    def begin() -> None:
        discard(partial)  # an earlier run's files must not be taken for this one's
        partial.mkdir()

    def write_own() -> dict[str, Any] | None:
        if not plan.chunks:
            return None
        partial.mkdir(exist_ok=True)  # on other nodes this makes a network file system look again
        file = partial / SHARD.format(ranks.rank + 1)
        written = write_tensors(file, plan.chunks, plan.tensors.__getitem__, offsets_metadata(plan.chunks))
        sync(partial)
        return written

    def commit() -> None:
        for file in files:
            path = partial / file["name"]
            size = path.stat().st_size if path.exists() else "nothing"
            if size != file["size"]:
                raise CheckpointError(
                    f"{path}: {file['size']} bytes were written, and rank 0 sees {size}; "
                    "expected a folder on a file system that all ranks share"
                )
        where = {"files": files, "tensors": plan.table, "shards": plan.shards}
        write_manifest(partial, step, {**json.loads(manifest), **where})
        publish(partial, final)

    try:
        ranks.first("beginning a checkpoint", begin)
        files = [file for file in ranks.gather("writing a checkpoint", write_own) if file]
        ranks.first("ending a checkpoint", commit)
    except CheckpointError as error:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # what little was written may be what fills the disk
        raise type(error)(f"could not write {final}: {error}; earlier checkpoints are untouched") from error
    return final


def local_chunk(tensor: Tensor) -> tuple[Chunk, Tensor]:
    """The rows of a tensor that this rank holds, and their elements; all of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return Chunk.whole(tensor), tensor
    (chunk,) = tensor.__create_chunk_list__()  # DTensor's protocol for checkpoints
    return Chunk(tensor.dtype, tuple(chunk.sizes), next(iter(chunk.offsets), 0)), tensor.to_local()


def _first_replica(tensor: DTensor) -> list[int]:
    """The ranks that together hold a tensor once, in the order of their rows."""
    mesh = tensor.device_mesh.mesh
    if not all(placement.is_replicate() or placement.is_shard(0) for placement in tensor.placements):
        raise CheckpointError(f"expected tensors that are replicated or sharded by rows, got {tensor.placements}")
    for dim in reversed(range(mesh.ndim)):
        if tensor.placements[dim].is_replicate():
            mesh = mesh.select(dim, 0)
    return mesh.reshape(-1).tolist()


class CheckpointManager:
    """A run's checkpoints while it trains; use as a context manager, on every rank.

    In the background the step waits for a copy in host memory only, and a thread does the rest, with collectives on a
    group of its own. The copies (page-locked, of CUDA tensors) are kept for the next save.

    Disks fill up and are emptied again, so a failed save is logged and the run saves again at its next time, unless it
    is the run's first, its last, or the third in a row. A lost rank ends the run at once.

    Args:
        folder: must exist, on a file system that all ranks share.
        keep: number of newest checkpoints to keep, at least 1; None keeps all.
        keep_every: checkpoints of steps that are multiples of it are never deleted.
        background: whether training continues meanwhile.

    Attributes:
        newest: the newest checkpoint; a resumed run sets it.
        failed: failed saves in a row.
        on_saved: called with each checkpoint's folder, between two steps.
        on_failed: called with the values that report a failed save, and with none once a save succeeds again.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks | None = None,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        background: bool = False,
    ) -> None:
        self.folder, self.keep, self.keep_every, self.background = folder, keep, keep_every, background
        self._run_ranks = ranks or Ranks()
        self.newest: Path | None = None
        self.failed = 0
        self.on_saved: Callable[[Path], None] = lambda path: None
        self.on_failed: Callable[[dict[str, Any]], None] = lambda values: None
        self._step = 0
        self._pending: Future[Path] | None = None
        self._buffers: dict[str, Tensor] = {}

    def __enter__(self) -> CheckpointManager:
        self._ranks = self._run_ranks.another()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.wait()
        except CheckpointError as error:
            if kind is None:
                raise
            print(f"WARNING: {error}", file=sys.stderr, flush=True)  # the training's own error says why it ended
        finally:
            self._thread.shutdown()
            self._ranks.close()

    def holds(self, step: int) -> bool:
        """Whether the newest checkpoint is of this step."""
        return self.newest is not None and step_of(self.newest) == step

    @property
    def saving(self) -> bool:
        """Whether a save in the background is not done yet on this rank."""
        return self._pending is not None and not self._pending.done()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        manifest: Mapping[str, Any],
        *,
        last: bool = False,
        protect: Callable[[], int] | None = None,
    ) -> None:
        """Save ``step-N``, or begin to; the tensors may change as soon as this returns. Waits for the save before.

        Args:
            tensors: plain ones, equal on all ranks, or DTensors, of the same names on all; any device.
            manifest: JSON-able values to keep beside the tensors; those of rank 0 count.
            last: of the run: it is waited for, and must not fail.
            protect: called in the thread, returns a step: the newest checkpoint up to it is not deleted.

        Raises:
            CheckpointError: on all ranks alike, if a save failed that must not, this one or the one before; earlier
                checkpoints are untouched.
        """
        self.wait()
        self._step, text = step, json.dumps(manifest)
        plan = plan_save(tensors, self._ranks)
        if self.background and not last:
            plan = replace(plan, tensors={name: self._copy(name, tensor) for name, tensor in plan.tensors.items()})
        ready = _events(tensors)

        def work() -> Path:
            for event in ready:
                with torch.cuda.device(event.device):  # threads start on the first GPU, and would open a context there
                    event.synchronize()
            path = write(self.folder, step, plan, text, self._ranks)
            if self._ranks.rank == 0:
                prune(self.folder, path, self.keep, self.keep_every, protect() if protect else None)
            return path

        self._pending = self._thread.submit(work)
        if last or not self.background:
            self.wait(last=last)

    def wait(self, *, last: bool = False) -> None:
        """Wait for the pending save; raises as :meth:`save`. All ranks call it at the same step, also to notice one
        that is done."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            path = pending.result()
        except LostRankError:
            raise
        except CheckpointError as error:
            self._fail(error, last)
            return
        if self.failed:
            _log.warning("%s is saved, after %d failed saves", path.name, self.failed)
            self.on_failed({})
        self.newest, self.failed = path, 0
        self.on_saved(path)

    def _fail(self, error: CheckpointError, last: bool) -> None:
        self.failed += 1
        if self.newest is None or last:
            raise error
        if self.failed >= MAX_FAILED:
            raise CheckpointError(
                f"{self.failed} saves in a row failed; the newest checkpoint is {self.newest}. The last: {error}"
            ) from error
        _log.log(
            logging.WARNING if self._run_ranks.rank == 0 else logging.INFO,
            "CHECKPOINT OF STEP %d NOT SAVED: %s. The newest is %s; training goes on and saves again at its time. "
            "%d failed in a row, %d end the run",
            self._step, error, self.newest.name, self.failed, MAX_FAILED,
        )  # fmt: skip
        self.on_failed({"failed_saves": self.failed, "newest_checkpoint": self.newest.name, "reason": str(error)})

    @torch.no_grad()
    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy in host memory; that of a CUDA tensor is queued behind what computes it."""
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.dtype, buffer.shape) != (tensor.dtype, tensor.shape):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._buffers[name] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        return buffer


def _events(tensors: Mapping[str, Tensor]) -> list[torch.cuda.Event]:
    """Reached when everything queued so far on the tensors' CUDA devices is done."""
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    return [torch.cuda.current_stream(device).record_event() for device in devices]
