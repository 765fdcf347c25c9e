"""Writing checkpoints: every tensor once, whoever holds it, and one file a rank."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmae.train.checkpoint.folder import (
    SHARD,
    CheckpointError,
    discard,
    prune,
    publish,
    refuse_url,
    sync,
    write_manifest,
)
from fastmae.train.checkpoint.ranks import Ranks, as_ranks
from fastmae.train.checkpoint.tensor_file import Piece, Written, offsets_metadata, write_tensors

SMALL = 1 << 20
"""Bytes below which a tensor that all ranks hold is not worth another rank's writing it."""
WRITERS = 8
"""Ranks, at most, that share the writing of tensors that all hold: every reader needs the files of them all."""


@dataclass(frozen=True)
class Part:
    """What one rank writes of a tensor: a box, and the elements in it."""

    piece: Piece
    tensor: Tensor


@dataclass(frozen=True)
class Share:
    """All that one rank writes, and how many elements there are of what ranks write together."""

    parts: Mapping[str, Part]
    own: frozenset[str]
    total: int

    @property
    def written(self) -> int:
        """Elements of tensors that ranks hold together."""
        return sum(part.tensor.numel() for name, part in self.parts.items() if name not in self.own)


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
    *,
    own: Mapping[str, Tensor] | None = None,
    keep: int | None = None,
    keep_every: int | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Write ``folder/step-N`` atomically, then delete checkpoints that are no longer to be kept.

    With ``torch.distributed`` initialised, every rank calls it, with tensors of the same names.

    Args:
        folder: the run's ``checkpoints`` folder; must exist, on a file system that all ranks share.
        step: optimiser steps done.
        tensors: plain ones, equal on all ranks, or DTensors; any device and number of dimensions.
        manifest: JSON-able values to keep beside the tensors; those of rank 0 count.
        own: tensors that this rank alone has, under names that no other rank uses.
        keep: number of newest checkpoints to keep, at least 1; None keeps all.
        keep_every: checkpoints of steps that are multiples of it are kept for ever.
        ranks: who saves; None makes a group for this call.

    Raises:
        CheckpointError: on all ranks alike, if the disk is full or not writable on any; earlier checkpoints are
            untouched.
        TypeError: if the manifest's values are not JSON-able.
        ValueError: if the folder is in an object store.
    """
    refuse_url(folder)
    text = json.dumps(manifest)
    with as_ranks(ranks) as ranks:
        path = write(folder, step, share_of(tensors, own or {}, ranks), text, ranks)
        if ranks.rank == 0:
            prune(folder, path, keep, keep_every)
    return path


def share_of(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], ranks: Ranks) -> Share:
    """What this rank writes. Every rank computes the same division, so nothing has to be exchanged.

    Of a DTensor each rank writes its shard, the first where there are replicas. Tensors that all ranks hold are written
    by rank 0; if there are no others, ranks far apart share the large ones.
    """
    spread = not any(map(is_distributed, tensors.values()))
    writers = dict.fromkeys(range(0, ranks.size, math.ceil(ranks.size / WRITERS)), 0)
    parts = {name: Part(_whole(tensor), tensor) for name, tensor in own.items()}
    for name in sorted(tensors, key=lambda name: (-tensors[name].numel(), name)):
        tensor = tensors[name]
        if is_distributed(tensor):
            part = local_part(tensor)
            if part.tensor.numel() and _is_first_replica(tensor):
                parts[name] = part
            continue
        size = tensor.numel() * tensor.dtype.itemsize
        writer = min(writers, key=writers.__getitem__) if spread and size >= SMALL else 0
        writers[writer] += size
        if writer == ranks.rank:
            parts[name] = Part(_whole(tensor), tensor)
    return Share(parts, frozenset(own), sum(tensor.numel() for tensor in tensors.values()))


def write(folder: Path, step: int, share: Share, manifest: str, ranks: Ranks) -> Path:
    """The work of :func:`save_checkpoint` but deleting: all ranks write, and then rank 0 makes it a checkpoint.

    Args:
        manifest: the values, as JSON text.
    """
    final, partial = folder / f"step-{step}", folder / f"step-{step}.tmp"
    try:
        ranks.first("beginning a checkpoint", lambda: _begin(partial))
        results = ranks.gather("writing a checkpoint", lambda: _write_share(partial, share, ranks))
        ranks.first("ending a checkpoint", lambda: _commit(final, partial, step, results, manifest))
    except CheckpointError as error:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # what little was written may be what fills the disk
        raise type(error)(f"could not write {final}: {error}; earlier checkpoints are untouched") from error
    return final


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked without importing them where there are none."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Part:
    """The part of a tensor that this rank holds; of a plain tensor all of it."""
    if not is_distributed(tensor):
        return Part(_whole(tensor), tensor)
    (chunk,) = tensor.__create_chunk_list__()  # DTensor's protocol for checkpoints
    return Part(Piece(tensor.dtype, tuple(chunk.sizes), tuple(chunk.offsets)), tensor.to_local())


def _whole(tensor: Tensor) -> Piece:
    return Piece(tensor.dtype, tuple(tensor.shape), (0,) * tensor.ndim)


def _is_first_replica(tensor: Any) -> bool:
    coordinate = tensor.device_mesh.get_coordinate()
    pairs = zip(coordinate or (), tensor.placements, strict=False)
    return coordinate is not None and not any(at for at, placement in pairs if placement.is_replicate())


def _begin(partial: Path) -> None:
    discard(partial)  # of an earlier run, whose files must not be taken for this one's
    partial.mkdir()


def _write_share(partial: Path, share: Share, ranks: Ranks) -> tuple[Written | None, int, int]:
    written = None
    if share.parts:
        partial.mkdir(exist_ok=True)  # on other nodes this makes a network file system look again
        pieces = {name: part.piece for name, part in share.parts.items()}
        file = partial / SHARD.format(ranks.rank + 1)
        written = write_tensors(file, pieces, lambda name: share.parts[name].tensor, offsets_metadata(pieces))
        sync(partial)
    return written, share.written, share.total


def _commit(
    final: Path, partial: Path, step: int, results: list[tuple[Written | None, int, int]], manifest: str
) -> None:
    files = [written for written, _, _ in results if written]
    totals = {total for _, _, total in results}
    if totals != {sum(elements for _, elements, _ in results)}:
        raise CheckpointError(f"ranks hold {sorted(totals)} elements, wrote {sum(n for _, n, _ in results)}")
    for file in files:
        size = (partial / file.name).stat().st_size if (partial / file.name).exists() else "nothing"
        if size != file.size:
            raise CheckpointError(
                f"{partial / file.name}: a rank wrote {file.size} bytes, rank 0 sees {size}; "
                "expected a folder on a file system that all ranks share"
            )
    write_manifest(partial, step, {**json.loads(manifest), "files": [vars(file) for file in files]})
    publish(partial, final)
