"""Reading checkpoints: verified first, by all ranks together, then each rank reads what it holds and nothing else.

Tensors may be wanted in other pieces than they were written in: any number of ranks reads what any other has written.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastmae.train.checkpoint.folder import MANIFEST, CheckpointError, list_checkpoints, read_manifest
from fastmae.train.checkpoint.ranks import LostRankError, Ranks, as_ranks
from fastmae.train.checkpoint.tensor_file import Piece, read_header, sha256
from fastmae.train.checkpoint.write import local_part

_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint: what it is as a whole, and which files hold which pieces of it."""

    whole: Piece
    pieces: tuple[tuple[str, Piece], ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are known; make one with :func:`open_checkpoint`."""

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
        wanted: dict[str, list[tuple[str, Tensor, tuple[slice, ...] | None]]] = defaultdict(list)
        for name, target in targets.items():
            entry = self.tensors[name]
            part = local_part(target)
            for file, piece in entry.pieces:
                overlap = _overlap(piece, part.piece)
                if overlap is not None:
                    there, here = overlap
                    wanted[file].append((name, part.tensor[here], None if piece == part.piece else there))
        for file, reads in wanted.items():
            try:
                with safe_open(self.path / file, framework="pt") as source:
                    for name, target, box in reads:
                        stored = source.get_tensor(name) if box is None else source.get_slice(name)[box]
                        target.copy_(stored)
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
    """Read the manifest and all headers of a checkpoint folder; with ``torch.distributed`` initialised, every rank.

    The files are divided among the ranks: each checks its own part of them, and all learn what was found.

    Args:
        path: a folder ``step-N``.
        verify: compare contents with the manifest's checksums, not only names and sizes.
        ranks: who reads; None makes a group for this call.

    Raises:
        CheckpointError: on all ranks alike, naming the file that is missing, unknown, truncated or altered.
    """
    with as_ranks(ranks) as ranks:
        manifest = ranks.first("reading a manifest", lambda: _read_listing(path))
        files = manifest["files"]
        share = [file for i, file in enumerate(files) if reader_of(i, len(files), ranks.size) == ranks.rank]
        headers = ranks.gather("verifying a checkpoint", lambda: [_check_file(path, file, verify) for file in share])
        found = [item for rank in headers for item in rank]
        return Checkpoint(path, manifest, _tensors(path, found))


def reader_of(file: int, files: int, ranks: int) -> int:
    """The rank that verifies the file of a number, and reads of it what all want.

    With as many files as ranks it is the rank's own, and fewer files go to ranks far apart, as they were written.
    """
    return file * ranks // files if files <= ranks else file % ranks


def open_latest(run_folder: Path, *, verify: bool = True, ranks: Ranks | None = None) -> Checkpoint:
    """The newest undamaged checkpoint of a run. A damaged one is reported on stderr and passed over.

    Raises:
        CheckpointError: on all ranks alike, if there is none.
    """
    with as_ranks(ranks) as ranks:
        candidates = ranks.first("listing checkpoints", lambda: list_checkpoints(run_folder / "checkpoints"))
        if not candidates:
            raise CheckpointError(f"{run_folder}: expected a run folder with checkpoints/step-N inside, found none")
        reasons = []
        for path in candidates:
            try:
                return open_checkpoint(path, verify=verify, ranks=ranks)
            except LostRankError:  # which says nothing of the checkpoint
                raise
            except CheckpointError as error:
                reasons.append(str(error))
                if ranks.rank == 0:
                    print(f"WARNING: damaged checkpoint passed over: {error}", file=sys.stderr, flush=True)
        raise CheckpointError(f"{run_folder}: no undamaged checkpoint; " + "; ".join(reasons))


def latest_checkpoint(run_folder: Path, *, verify: bool = True, ranks: Ranks | None = None) -> Path:
    """The folder of :func:`open_latest`."""
    return open_latest(run_folder, verify=verify, ranks=ranks).path


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compare a checkpoint's files with its manifest, in this process alone: names, sizes, SHA-256.

    Returns:
        The manifest.

    Raises:
        CheckpointError: naming the file that is missing, unknown, truncated or altered.
    """
    return dict(open_checkpoint(path, ranks=Ranks()).manifest)


def load_checkpoint(path: Path, *, prefix: str = "", verify: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors (on the CPU, by name) and manifest of a checkpoint folder, in this process alone.

    Args:
        prefix: read only tensors whose names start with it, such as ``model.``; it is taken off.

    Raises:
        CheckpointError: if anything is missing or altered; see :func:`verify_checkpoint`.
    """
    checkpoint = open_checkpoint(path, verify=verify, ranks=Ranks())
    names = [name for name in checkpoint.tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): checkpoint.read(name) for name in names}, dict(checkpoint.manifest)


def _read_listing(path: Path) -> dict[str, Any]:
    """The manifest, after a comparison of the names that it lists with those that are there."""
    manifest = read_manifest(path)
    expected, present = [file["name"] for file in manifest["files"]], {p.name for p in path.iterdir()} - {MANIFEST}
    for name in expected:
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{path / MANIFEST}: lists {name}, which is no tensor file of a checkpoint")
        if name not in present:
            raise CheckpointError(f"{path / name}: missing, but listed in {MANIFEST}")
    for name in sorted(present - set(expected)):
        raise CheckpointError(f"{path / name}: not listed in {MANIFEST}; left over from another save?")
    return manifest


def _check_file(path: Path, file: Mapping[str, Any], verify: bool) -> tuple[str, dict[str, Piece]]:
    name = file["name"]
    try:
        size = (path / name).stat().st_size
        if size != file["size"]:
            raise CheckpointError(f"{path / name}: expected {file['size']} bytes, got {size}")
        if verify and sha256(path / name) != file["sha256"]:
            raise CheckpointError(f"{path / name}: contents differ from the SHA-256 in {MANIFEST}")
        return name, read_header(path / name)[0]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / name}: unreadable: {error}") from error


def _tensors(path: Path, headers: Iterable[tuple[str, dict[str, Piece]]]) -> dict[str, Entry]:
    """Tensors by name, each put together from its pieces.

    Raises:
        CheckpointError: if pieces leave a gap or overlap.
    """
    found: dict[str, list[tuple[str, Piece]]] = defaultdict(list)
    for file, pieces in headers:
        for name, piece in pieces.items():
            found[name].append((file, piece))
    tensors = {}
    for name, pieces in found.items():
        boxes = [piece for _, piece in pieces]
        ends = ([begin + length for begin, length in zip(b.offsets, b.shape, strict=True)] for b in boxes)
        shape = tuple(map(max, zip(*ends, strict=True)))
        whole = Piece(boxes[0].dtype, shape, (0,) * len(shape))
        if sum(math.prod(box.shape) for box in boxes) != math.prod(shape) or len({box.dtype for box in boxes}) > 1:
            raise CheckpointError(f"{path}: the pieces of {name} do not make up a tensor of shape {shape}")
        tensors[name] = Entry(whole, tuple(pieces))
    return tensors


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


def _text(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {shape}"
