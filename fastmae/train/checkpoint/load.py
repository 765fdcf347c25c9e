"""Loading checkpoints: verified first, by all ranks together, then each rank reads what it holds and nothing else.

Any number of ranks reads what any other number has written: tensors are cut into other shards on the way. What all
ranks hold is read by one of them and sent to the others.
"""

from __future__ import annotations

import math
import operator
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastmae.train.checkpoint.format import (
    DTYPES,
    MANIFEST,
    Chunk,
    list_checkpoints,
    read_header,
    read_manifest,
    reading,
    replace_file,
    step_of,
    verify_file,
)
from fastmae.train.checkpoint.save import local_chunk
from fastmae.train.ranks import CheckpointError, LostRankError, Ranks


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint, and the file that holds it, or its shards in the order of rows."""

    whole: Chunk
    files: tuple[str, ...]

    def chunks(self) -> Iterator[tuple[str, Chunk]]:
        """Files with the rows that they hold, divided as ``torch.chunk`` and FSDP do; the last files may hold none."""
        if len(self.files) == 1:
            yield self.files[0], self.whole
            return
        rows, *rest = self.whole.shape
        each = max(math.ceil(rows / len(self.files)), 1)
        for file, begin in zip(self.files, range(0, rows, each), strict=False):
            yield file, Chunk(self.whole.dtype, (min(each, rows - begin), *rest), begin)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; make one with :func:`open_checkpoint`."""

    path: Path
    manifest: Mapping[str, Any]
    tensors: Mapping[str, Entry]

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU; raises CheckpointError if a file cannot be read."""
        whole = self.tensors[name].whole
        target = torch.empty(whole.shape, dtype=whole.dtype)
        self.read_into({name: target})
        return target

    def read_all(self, prefix: str = "") -> dict[str, Tensor]:
        """Whole tensors, on the CPU, of names that start with a prefix such as ``model.``, which is removed."""
        return {name.removeprefix(prefix): self.read(name) for name in self.tensors if name.startswith(prefix)}

    @torch.no_grad()
    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors, plain or DTensors, with what the checkpoint holds under their names; opens only files needed.

        Raises:
            CheckpointError: if a tensor has another shape or type, or a file cannot be read.
        """
        self.check(targets)
        wanted: dict[str, list[tuple[str, Tensor, slice]]] = defaultdict(list)
        for name, target in targets.items():
            own, elements = local_chunk(target)
            for file, chunk in self.tensors[name].chunks():
                begin, end = max(chunk.begin, own.begin), min(chunk.end, own.end)
                if begin < end:
                    here, there = (slice(begin - rows.begin, end - rows.begin) for rows in (own, chunk))
                    wanted[file].append((name, elements[here] if own.shape else elements, there))
        for file, reads in wanted.items():
            with reading(self.path / file), safe_open(self.path / file, framework="pt") as source:
                for name, target, rows in reads:
                    target.copy_(source.get_slice(name)[rows] if target.ndim else source.get_tensor(name))

    def check(self, targets: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError if it holds a tensor in another shape or type than the target's."""
        for name, target in targets.items():
            there, here = self.tensors[name].whole, Chunk.whole(target)
            if there != here:
                raise CheckpointError(f"{self.path}: {name} is {there}, expected {here}")


def open_checkpoint(
    path: Path, *, ranks: Ranks | None = None, check: Callable[[Mapping[str, Any]], object] = bool
) -> Checkpoint:
    """Read and verify a folder ``step-N``; every rank calls it, verifies some of the files, and learns what was found.

    Args:
        check: called with the manifest on rank 0; whatever it raises counts as damage, since a manifest whose checksum
            fits may still have been written by a broken program.

    Raises:
        CheckpointError: on all ranks alike, naming the file that is missing, unknown, truncated or altered.
    """
    ranks = ranks or Ranks()

    def read_manifest_and_table() -> tuple[dict[str, Any], dict[str, Entry]]:
        manifest = read_manifest(path)
        with reading(path / MANIFEST):
            check(manifest)
            return manifest, _read_table(path, manifest)

    manifest, tensors = ranks.first("reading a manifest", read_manifest_and_table)
    files = manifest["files"]

    def verify_own() -> None:
        for index, file in enumerate(files):
            if reader_of(index, len(files), ranks.size) == ranks.rank:
                found = verify_file(path / file["name"], file)
                _check_chunks(path / file["name"], found, tensors)

    ranks.gather("verifying a checkpoint", verify_own)
    return Checkpoint(path, manifest, tensors)


def open_latest(
    run_folder: Path,
    *,
    ranks: Ranks | None = None,
    check: Callable[[Mapping[str, Any]], object] = bool,
    newest: int | None = None,
) -> Checkpoint:
    """:func:`open_checkpoint` of a run's newest usable one up to step ``newest``; a damaged one is reported on stderr.

    Raises:
        CheckpointError: on all ranks alike, if there is none.
    """
    ranks, reasons = ranks or Ranks(), []
    candidates = ranks.first("listing checkpoints", lambda: list_checkpoints(run_folder / "checkpoints"))
    candidates = [path for path in candidates if newest is None or step_of(path) <= newest]
    if not candidates:
        raise CheckpointError(f"{run_folder}: expected a run folder with checkpoints/step-N inside, found none")
    for path in candidates:
        try:
            return open_checkpoint(path, ranks=ranks, check=check)
        except LostRankError:  # says nothing about the checkpoint
            raise
        except CheckpointError as error:
            reasons.append(str(error))
            if ranks.rank == 0:
                print(f"WARNING: damaged checkpoint passed over: {error}", file=sys.stderr, flush=True)
    raise CheckpointError(f"{run_folder}: no undamaged checkpoint; " + "; ".join(reasons))


def open_folder(path: Path) -> Checkpoint:
    """A checkpoint folder, or the newest usable one of a run folder; in this process alone."""
    return open_checkpoint(path) if path.name.startswith("step-") else open_latest(path)


def consolidate(checkpoint: Checkpoint, out: Path, *, optimizer: bool = False) -> Path:
    """Write a checkpoint's weights into one ``.safetensors`` file as an export does, one tensor in memory at a time.

    With ``optimizer`` it holds every tensor, under the names that they have in the checkpoint. Raises CheckpointError
    if the file cannot be written.
    """
    prefix = "" if optimizer else "model."
    chunks = {n.removeprefix(prefix): e.whole for n, e in checkpoint.tensors.items() if n.startswith(prefix)}
    metadata = {k: v for k, v in checkpoint.manifest.items() if k in ("architecture", "step", "config")}
    return replace_file(out, chunks, lambda name: checkpoint.read(prefix + name), metadata)


@torch.no_grad()
def read_together(checkpoint: Checkpoint, targets: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill tensors with what a checkpoint holds under their names; every rank calls it, with the same names.

    A plain tensor, whose shape is the same on all ranks, is read by the rank that verified its file and sent over the
    connections of the training, so that each byte is read from the file system once. Each rank reads its shard of a
    DTensor, the first one where there are replicas.

    Raises:
        CheckpointError: on all ranks alike, as :meth:`Checkpoint.read_into`, or if a rank has gone.
    """
    if ranks.size == 1:
        checkpoint.read_into(targets)
        return
    what = "reading a checkpoint"
    ranks.gather(what, lambda: checkpoint.check(targets))  # before anything is sent, so that nobody waits in vain
    failures: list[CheckpointError] = []

    def attempt(own: Mapping[str, Tensor]) -> None:
        try:
            if not failures:
                checkpoint.read_into(own)
        except CheckpointError as error:  # a rank that cannot read sends anything, and all of them raise at the end
            failures.append(error)

    files = [file["name"] for file in checkpoint.manifest["files"]]
    readers = {file: reader_of(index, len(files), ranks.size) for index, file in enumerate(files)}
    sharded = {name: target for name, target in targets.items() if isinstance(target, DTensor)}
    for name in sorted(targets.keys() - sharded.keys()):
        target = targets[name]
        reader = readers[next(iter(checkpoint.tensors[name].chunks()))[0]]
        block = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        if ranks.rank == reader:
            attempt({name: block})
        ranks.broadcast(what, block, reader)
        if block is not target:
            target.copy_(block)
    replicas = {}  # mesh dimensions
    for name, tensor in sharded.items():
        mesh, kinds = tensor.device_mesh, enumerate(tensor.placements)
        replicas[name] = [dim for dim, kind in kinds if kind.is_replicate() and mesh.size(dim) > 1]
    is_first = {n: all(t.device_mesh.get_local_rank(dim) == 0 for dim in replicas[n]) for n, t in sharded.items()}
    attempt({name: tensor for name, tensor in sharded.items() if is_first[name]})
    for name in sorted(sharded):
        local = sharded[name].to_local()
        for dim in replicas[name] if local.numel() else ():
            ranks.broadcast(what, local, 0, sharded[name].device_mesh.get_group(dim))

    def report() -> None:
        if failures:
            raise failures[0]

    ranks.gather(what, report)


def reader_of(file: int, files: int, ranks: int) -> int:
    """The rank that verifies the file of a number, and reads from it what all need: its own if there are as many files
    as ranks, else evenly spaced ranks, as they were written."""
    return file * ranks // files if files <= ranks else file % ranks


def _read_table(path: Path, manifest: dict[str, Any]) -> dict[str, Entry]:
    """Where all tensors are. Rank 0 sends this table to the others, and no header of a file."""
    if manifest["format_version"] == 1:
        return _table_of_headers(path, manifest["files"])
    shards, names = tuple(manifest.pop("shards")), {file["name"] for file in manifest["files"]}
    tensors = {}
    for name, entry in manifest.pop("tensors").items():
        shape = tuple(map(operator.index, entry["shape"]))
        whole = Chunk(DTYPES[entry["dtype"]], shape)
        tensors[name] = Entry(whole, shards if entry["file"] is None else (entry["file"],))
        if any(file not in names for file, chunk in tensors[name].chunks() if chunk.bytes):
            raise CheckpointError(f"{path / MANIFEST}: {name} is in a file that is not listed")
    return tensors


def _table_of_headers(path: Path, files: list[dict[str, Any]]) -> dict[str, Entry]:
    """The table that version 1 does not have. Its shards have the same rows as those of version 2."""
    found: dict[str, list[tuple[int, str, Chunk]]] = defaultdict(list)
    for file in files:
        for name, chunk in read_header(path / file["name"]).items():
            found[name].append((chunk.begin, file["name"], chunk))
    tensors = {}
    for name, located in found.items():
        *_, (_, _, last) = located = sorted(located, key=operator.itemgetter(0))
        shape = (last.end, *last.shape[1:]) if last.shape else ()
        tensors[name] = Entry(Chunk(last.dtype, shape), tuple(file for _, file, _ in located))
    return tensors


def _check_chunks(file: Path, found: Mapping[str, Chunk], tensors: Mapping[str, Entry]) -> None:
    """Compare what a file holds with the table."""
    expected = {name: chunk for name, entry in tensors.items() for place, chunk in entry.chunks() if place == file.name}
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise CheckpointError(f"{file}: {name} is {found.get(name)!r}, but {expected.get(name)!r} in {MANIFEST}")
