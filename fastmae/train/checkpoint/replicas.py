"""Reading what several ranks hold alike: one of them reads it, and sends it to the others.

Under DDP every rank holds all of a checkpoint, and under hybrid sharding as many hold a shard as there are replicas. If
each read for itself, a file system would be asked for a checkpoint as many times. What is sent goes over the
connections of the training, in blocks of bounded size, and is copied byte by byte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastmae.train.checkpoint.folder import CheckpointError
from fastmae.train.checkpoint.ranks import Ranks
from fastmae.train.checkpoint.read import Checkpoint, reader_of
from fastmae.train.checkpoint.tensor_file import Piece
from fastmae.train.checkpoint.write import is_distributed, local_part

BLOCK = 64 << 20
"""Bytes that are sent at once, unless a single tensor is larger: what reading takes of memory beside the tensors."""
_ALIGNED = 16


@dataclass(frozen=True)
class _Item:
    """Something to send: where it is in a block of bytes, and the part of the target that it becomes."""

    name: str
    piece: Piece
    target: Tensor
    begin: int

    def view(self, block: Tensor) -> Tensor:
        """The item's elements in a block."""
        return block[self.begin : self.begin + self.piece.bytes].view(self.piece.dtype).view(self.piece.shape)


@torch.no_grad()
def read_together(checkpoint: Checkpoint, targets: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill tensors with what a checkpoint holds under their names; every rank calls it, with the same names.

    Of a tensor that all ranks hold, each file is read by the rank that has verified it. Of a DTensor each rank reads
    its shard, the first where there are replicas.

    Args:
        targets: plain tensors, of the same shapes on all ranks, or DTensors; on any device.

    Raises:
        CheckpointError: on all ranks alike, as :meth:`Checkpoint.read_into`, or if a rank has gone.
    """
    if ranks.size == 1:
        checkpoint.read_into(targets)
        return
    # Before anything is sent, so that nobody waits for one who refuses.
    ranks.gather("reading a checkpoint", lambda: checkpoint.check(targets))
    failures: list[CheckpointError] = []
    whole = {name: target for name, target in targets.items() if not is_distributed(target)}
    for device in sorted({target.device.type for target in whole.values()}):
        _read_whole(checkpoint, {n: t for n, t in whole.items() if t.device.type == device}, ranks, failures)
    shards = {name: target for name, target in targets.items() if name not in whole}
    _attempt(lambda: checkpoint.read_into({n: t for n, t in shards.items() if _is_first(t)}), failures)
    _send_replicas(shards, ranks)

    def tell() -> None:
        if failures:
            raise failures[0]

    ranks.gather("reading a checkpoint", tell)


def _read_whole(
    checkpoint: Checkpoint, targets: Mapping[str, Tensor], ranks: Ranks, failures: list[CheckpointError]
) -> None:
    """Fill tensors of one kind of device that all ranks hold whole. A rank that cannot read sends anything."""
    by_file: dict[str, list[tuple[str, Piece, Tensor]]] = defaultdict(list)
    for name, target in sorted(targets.items()):
        for file, piece in checkpoint.tensors[name].pieces:
            box = tuple(slice(begin, begin + n) for begin, n in zip(piece.offsets, piece.shape, strict=True))
            by_file[file].append((name, piece, target[box]))
    files = [file["name"] for file in checkpoint.manifest["files"]]
    for index, file in enumerate(files):
        reader = reader_of(index, len(files), ranks.size)
        for items in _blocks(by_file.get(file, ())):
            block = _empty_block(items)
            if ranks.rank == reader and not failures:
                _attempt(lambda f=file, i=items, b=block: _fill(checkpoint, f, i, b), failures)
            ranks.broadcast("reading a checkpoint", block, reader)
            for item in items:
                item.target.copy_(item.view(block))


def _send_replicas(shards: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Give each rank the shards that the first rank of its replicas has read."""
    by_group: dict[Any, list[tuple[str, Piece, Tensor]]] = defaultdict(list)
    for name, target in sorted(shards.items()):
        for dim in _replicated_dims(target):
            part = local_part(target)
            by_group[target.device_mesh.get_group(dim)].append((name, part.piece, part.tensor))
    for group, parts in by_group.items():
        first = dist.get_rank(group) == 0
        for items in _blocks(parts):
            block = _empty_block(items)
            for item in items if first else ():
                item.view(block).copy_(item.target)
            ranks.broadcast("reading a checkpoint", block, 0, group)
            for item in () if first else items:
                item.target.copy_(item.view(block))


def _fill(checkpoint: Checkpoint, file: str, items: Iterable[_Item], block: Tensor) -> None:
    try:
        with safe_open(checkpoint.path / file, framework="pt") as source:
            for item in items:
                item.view(block).copy_(source.get_tensor(item.name))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.path / file}: unreadable: {error}") from error


def _blocks(parts: Iterable[tuple[str, Piece, Tensor]]) -> Iterator[list[_Item]]:
    """Parts in their order, as many at a time as a block has room for."""
    items: list[_Item] = []
    end = 0
    for name, piece, target in parts:
        begin = -(-end // _ALIGNED) * _ALIGNED
        if items and begin + piece.bytes > BLOCK:
            yield items
            items, begin = [], 0
        items.append(_Item(name, piece, target, begin))
        end = begin + piece.bytes
    if items:
        yield items


def _empty_block(items: list[_Item]) -> Tensor:
    last = items[-1]
    return torch.empty(last.begin + last.piece.bytes, dtype=torch.uint8, device=last.target.device)


def _replicated_dims(tensor: Any) -> list[int]:
    mesh = tensor.device_mesh
    return [dim for dim, kind in enumerate(tensor.placements) if kind.is_replicate() and mesh.size(dim) > 1]


def _is_first(tensor: Any) -> bool:
    """Whether this rank is the one among the replicas of its shard that reads it."""
    return all(tensor.device_mesh.get_local_rank(dim) == 0 for dim in _replicated_dims(tensor))


def _attempt(function: Callable[[], None], failures: list[CheckpointError]) -> None:
    try:
        function()
    except CheckpointError as error:
        failures.append(error)
