"""Loading checkpoints: verified first, by all ranks together, then each rank reads what it holds and nothing else.

Tensors may be wanted in other pieces than they were written in: any number of ranks reads what any other has written.
What all ranks hold is read by one of them and sent to the others.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastmae.train.checkpoint.format import (
    MANIFEST,
    Piece,
    dtype_named,
    list_checkpoints,
    read_manifest,
    step_of,
    verify_file,
    write_tensors,
)
from fastmae.train.checkpoint.save import local_part
from fastmae.train.ranks import CheckpointError, LostRankError, Ranks, as_ranks

WHAT = "reading a checkpoint"


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint.

    Attributes:
        whole: its type and shape.
        files: the one that holds it, or the shards in the order of rows.
        pieces: of version 1, which says in its files' headers where each piece belongs; None: equal shares of rows.
    """

    whole: Piece
    files: tuple[str, ...]
    pieces: tuple[Piece, ...] | None = None

    def located(self) -> Iterator[tuple[str, Piece]]:
        """Files with the pieces that they hold."""
        if self.pieces is not None:
            yield from zip(self.files, self.pieces, strict=True)
        elif len(self.files) == 1:
            yield self.files[0], self.whole
        else:
            rows, *rest = self.whole.shape
            each = math.ceil(rows / len(self.files))  # as torch.chunk and FSDP cut rows; the last shards may be empty
            for index, begin in enumerate(range(0, rows, each)):
                shape = (min(each, rows - begin), *rest)
                yield self.files[index], Piece(self.whole.dtype, shape, (begin, *(0 for _ in rest)))


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; make one with :func:`open_checkpoint`."""

    path: Path
    manifest: Mapping[str, Any]
    tensors: Mapping[str, Entry]

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        whole = self.tensors[name].whole
        target = torch.empty(whole.shape, dtype=whole.dtype)
        self.read_into({name: target})
        return target

    @torch.no_grad()
    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors, plain or DTensors, with what the checkpoint holds under their names; opens only files needed.

        Raises:
            CheckpointError: if a tensor is not there, has another shape or type, or a file cannot be read.
        """
        self.check(targets)
        wanted: dict[str, list[tuple[str, Tensor, tuple[slice, ...]]]] = defaultdict(list)
        for name, target in targets.items():
            part = local_part(target)
            for file, piece in self.tensors[name].located():
                if (overlap := _overlap(piece, part.piece)) is not None:
                    there, here = overlap
                    wanted[file].append((name, part.tensor[here], there))
        for file, reads in wanted.items():
            try:
                with safe_open(self.path / file, framework="pt") as source:
                    for name, target, box in reads:
                        target.copy_(source.get_slice(name)[box] if box else source.get_tensor(name))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.path / file}: unreadable: {error}") from error

    def check(self, targets: Mapping[str, Tensor]) -> None:
        """Compare tensors with those that it holds under their names.

        Raises:
            CheckpointError: if one is not there, or has another shape or type.
        """
        for name, target in targets.items():
            if name not in self.tensors:
                raise CheckpointError(f"{self.path}: has no tensor {name}")
            whole = self.tensors[name].whole
            there, here = (whole.dtype, whole.shape), (target.dtype, tuple(target.shape))
            if there != here:
                raise CheckpointError(f"{self.path}: {name} is {_text(*there)}, expected {_text(*here)}")


def open_checkpoint(path: Path, *, verify: bool = True, ranks: Ranks | None = None) -> Checkpoint:
    """Read and verify a checkpoint folder; with ``torch.distributed`` initialised, every rank calls it.

    The files are divided among the ranks: each verifies its own part of them, and all learn what was found.

    Args:
        path: a folder ``step-N``.
        verify: compare contents with the manifest's checksums, not only names and sizes.
        ranks: who reads; None makes a group for this call.

    Raises:
        CheckpointError: on all ranks alike, naming the file that is missing, unknown, truncated or altered.
    """
    with as_ranks(ranks) as ranks:
        manifest = ranks.first("reading a manifest", lambda: read_manifest(path))
        tensors = ranks.first("reading a manifest", lambda: _tensors(path, manifest))
        files = manifest["files"]

        def verify_share() -> None:
            for index, file in enumerate(files):
                if reader_of(index, len(files), ranks.size) == ranks.rank:
                    _check_pieces(path / file["name"], verify_file(path / file["name"], file, checksum=verify), tensors)

        ranks.gather("verifying a checkpoint", verify_share)
        return Checkpoint(path, manifest, tensors)


def open_latest(
    run_folder: Path,
    *,
    verify: bool = True,
    ranks: Ranks | None = None,
    check: Callable[[Mapping[str, Any]], object] = bool,
    newest: int | None = None,
) -> Checkpoint:
    """The newest usable checkpoint of a run. A damaged one is reported on stderr and passed over.

    Args:
        check: called with the manifest; whatever it raises counts as damage, since a manifest whose checksum fits may
            still have been written by a broken program.
        newest: step up to which checkpoints are looked at; None for all.

    Raises:
        CheckpointError: on all ranks alike, if there is none.
    """

    def checked(checkpoint: Checkpoint) -> None:
        try:
            check(checkpoint.manifest)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{checkpoint.path / MANIFEST}: not usable: {error!r}"[:500]) from error

    with as_ranks(ranks) as ranks:
        candidates = ranks.first("listing checkpoints", lambda: list_checkpoints(run_folder / "checkpoints"))
        candidates = [path for path in candidates if newest is None or step_of(path) <= newest]
        if not candidates:
            raise CheckpointError(f"{run_folder}: expected a run folder with checkpoints/step-N inside, found none")
        reasons = []
        for path in candidates:
            try:
                checkpoint = open_checkpoint(path, verify=verify, ranks=ranks)
                ranks.first("reading a manifest", lambda checkpoint=checkpoint: checked(checkpoint))
                return checkpoint
            except LostRankError:  # says nothing about the checkpoint
                raise
            except CheckpointError as error:
                reasons.append(str(error))
                if ranks.rank == 0:
                    print(f"WARNING: damaged checkpoint passed over: {error}", file=sys.stderr, flush=True)
        raise CheckpointError(f"{run_folder}: no undamaged checkpoint; " + "; ".join(reasons))


def latest_checkpoint(run_folder: Path, *, verify: bool = True, ranks: Ranks | None = None) -> Path:
    """The folder of :func:`open_latest`."""
    return open_latest(run_folder, verify=verify, ranks=ranks).path


def load_checkpoint(path: Path, *, prefix: str = "", verify: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors (on the CPU, by name) and manifest of a checkpoint folder, in this process alone.

    Args:
        prefix: read only tensors whose names start with it, such as ``model.``; it is removed.

    Raises:
        CheckpointError: if anything is missing or altered.
    """
    checkpoint = open_checkpoint(path, verify=verify, ranks=Ranks())
    names = [name for name in checkpoint.tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): checkpoint.read(name) for name in names}, dict(checkpoint.manifest)


def consolidate(folder: Path, out: Path, *, optimizer: bool = False) -> Path:
    """Write the tensors of a checkpoint into one file, holding one tensor in memory at a time.

    Args:
        folder: a checkpoint, ``step-N``; it is verified first.
        out: a ``.safetensors`` file; replaced atomically.
        optimizer: False writes the weights, under facebookresearch/mae's keys and with the architecture in the
            metadata, as an export does; True writes every tensor, under the names that it has in the checkpoint.

    Raises:
        CheckpointError: if the checkpoint is damaged or the file cannot be written.
    """
    checkpoint = open_checkpoint(folder, ranks=Ranks())
    prefix = "" if optimizer else "model."
    pieces = {
        name.removeprefix(prefix): entry.whole for name, entry in checkpoint.tensors.items() if name.startswith(prefix)
    }
    kept = {key: checkpoint.manifest[key] for key in ("architecture", "step", "config") if key in checkpoint.manifest}
    metadata = {"format": "pt", **{key: json.dumps(value) for key, value in kept.items()}}
    partial = out.with_name(f".{out.name}.tmp")
    try:
        write_tensors(partial, pieces, lambda name: checkpoint.read(prefix + name), metadata)
        return partial.replace(out)
    except OSError as error:
        raise CheckpointError(f"could not write {out}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


@torch.no_grad()
def read_together(checkpoint: Checkpoint, targets: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill tensors with what a checkpoint holds under their names; every rank calls it, with the same names.

    Of a tensor that all ranks hold, each file is read by the rank that verified it, tensor by tensor, and sent over the
    connections of the training: a file system is asked once. Each rank reads its shard of a DTensor, the first one
    where there are replicas.

    Args:
        targets: plain tensors, of the same shapes on all ranks, or DTensors; on any device.

    Raises:
        CheckpointError: on all ranks alike, as :meth:`Checkpoint.read_into`, or if a rank has gone.
    """
    if ranks.size == 1:
        checkpoint.read_into(targets)
        return
    ranks.gather(WHAT, lambda: checkpoint.check(targets))  # before anything is sent, so that nobody waits in vain
    failures: list[CheckpointError] = []

    def attempt(function: Callable[[], None]) -> None:
        try:
            if not failures:
                function()
        except CheckpointError as error:  # a rank that cannot read sends anything, and all of them raise at the end
            failures.append(error)

    files = [file["name"] for file in checkpoint.manifest["files"]]
    readers = {file: reader_of(index, len(files), ranks.size) for index, file in enumerate(files)}
    sharded = {name: target for name, target in targets.items() if isinstance(target, DTensor)}
    for name in sorted(targets.keys() - sharded.keys()):
        target = targets[name]
        reader = readers[next(iter(checkpoint.tensors[name].located()))[0]]
        block = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        if ranks.rank == reader:
            attempt(lambda name=name, block=block: checkpoint.read_into({name: block}))
        ranks.broadcast(WHAT, block, reader)
        if block is not target:
            target.copy_(block)
    attempt(lambda: checkpoint.read_into({name: t for name, t in sharded.items() if _is_first_replica(t)}))
    for name in sorted(sharded):
        local = sharded[name].to_local()
        for dim in _replicated_dims(sharded[name]):
            if local.numel():
                ranks.broadcast(WHAT, local, 0, sharded[name].device_mesh.get_group(dim))

    def tell() -> None:
        if failures:
            raise failures[0]

    ranks.gather(WHAT, tell)


def reader_of(file: int, files: int, ranks: int) -> int:
    """The rank that verifies the file of a number, and reads from it what all want: its own if there are as many files
    as ranks, else ranks far apart, as they were written."""
    return file * ranks // files if files <= ranks else file % ranks


def _tensors(path: Path, manifest: Mapping[str, Any]) -> dict[str, Entry]:
    """Where all tensors are; on rank 0."""
    if manifest["format_version"] == 1:
        return _tensors_of_headers(path, manifest)
    try:
        shards, names = tuple(manifest["shards"]), {file["name"] for file in manifest["files"]}
        tensors = {}
        for name, entry in manifest["tensors"].items():
            shape = tuple(map(int, entry["shape"]))
            whole = Piece(dtype_named(entry["dtype"]), shape, (0,) * len(shape))
            tensors[name] = Entry(whole, shards if entry["file"] is None else (entry["file"],))
            if any(file not in names for file, piece in tensors[name].located() if math.prod(piece.shape)):
                raise CheckpointError(f"{path / MANIFEST}: {name} is in a file that is not listed")
        return tensors
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: its table of tensors is not usable: {error!r}"[:500]) from error


def _tensors_of_headers(path: Path, manifest: Mapping[str, Any]) -> dict[str, Entry]:
    found: dict[str, list[tuple[str, Piece]]] = defaultdict(list)
    for file in manifest["files"]:
        for name, piece in verify_file(path / file["name"], file, checksum=False).items():
            found[name].append((file["name"], piece))
    tensors = {}
    for name, located in found.items():
        pieces = [piece for _, piece in located]
        ends = ([b + n for b, n in zip(piece.offsets, piece.shape, strict=True)] for piece in pieces)
        shape = tuple(map(max, zip(*ends, strict=True)))
        if sum(math.prod(p.shape) for p in pieces) != math.prod(shape) or len({p.dtype for p in pieces}) > 1:
            raise CheckpointError(f"{path}: the pieces of {name} do not make up a tensor of shape {shape}")
        whole = Piece(pieces[0].dtype, shape, (0,) * len(shape))
        tensors[name] = Entry(whole, tuple(file for file, _ in located), tuple(pieces))
    return tensors


def _check_pieces(file: Path, found: Mapping[str, Piece], tensors: Mapping[str, Entry]) -> None:
    """That a file holds what the manifest's table says."""
    expected = {
        name: piece
        for name, entry in tensors.items()
        if file.name in entry.files
        for place, piece in entry.located()
        if place == file.name
    }
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise CheckpointError(f"{file}: {name} is {found.get(name)}, but {expected.get(name)} in {MANIFEST}")


def _overlap(there: Piece, here: Piece) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where the common part of two boxes lies in each of them; None if they have none. Of scalars: ``((), ())``."""
    first, second = [], []
    for a, length_a, b, length_b in zip(there.offsets, there.shape, here.offsets, here.shape, strict=True):
        begin, end = max(a, b), min(a + length_a, b + length_b)
        if begin >= end:
            return None
        first.append(slice(begin - a, end - a))
        second.append(slice(begin - b, end - b))
    return tuple(first), tuple(second)


def _replicated_dims(tensor: DTensor) -> list[int]:
    mesh = tensor.device_mesh
    return [dim for dim, kind in enumerate(tensor.placements) if kind.is_replicate() and mesh.size(dim) > 1]


def _is_first_replica(tensor: DTensor) -> bool:
    return all(tensor.device_mesh.get_local_rank(dim) == 0 for dim in _replicated_dims(tensor))


def _text(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {shape}"
