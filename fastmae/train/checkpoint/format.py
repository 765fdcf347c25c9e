"""The checkpoint format: folders, manifest and tensor files. Knows nothing of models, optimisers or ranks.

A checkpoint is a folder ``checkpoints/step-N``. Each writing rank has one safetensors file in it; ``manifest.json``
lists the files with sizes and SHA-256, says where each tensor is, and holds everything that is not a tensor. It is
written last, and the folder gets its name by a rename after that: a folder of that name is whole, and later damage is
seen before anything is read. Nothing is pickled.

The files are those of ``torch.distributed.checkpoint`` (DCP) with safetensors storage, so its
``HuggingFaceStorageReader`` reads and reshards them too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmae.train.ranks import CheckpointError

FORMAT, FORMAT_VERSION = "fastmae-checkpoint", 2
READABLE_VERSIONS = (1, 2)
"""Version 1 has no table of tensors: the headers of all files say where they are."""
MANIFEST = "manifest.json"
SHARD = "shard-{:05d}-model-00001-of-00001.safetensors"
"""Tensor file of a rank, counted from 1, by DCP's naming."""
_SHARD_NAME = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_OFFSETS = "DCP_SHARDING_INFO"
"""Metadata key of the offsets of pieces: a JSON object ``{name: {"saved_offsets": [...]}}``."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: all of it, or one rank's shard.

    Attributes:
        dtype: element type.
        shape: extent of the box; ``()`` for a scalar.
        offsets: where the box begins in the tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Piece:
        """All of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape), (0,) * tensor.ndim)

    @property
    def bytes(self) -> int:
        """Size of the box's elements."""
        return math.prod(self.shape) * self.dtype.itemsize


# ---- folders ---------------------------------------------------------------------------------------------------------


def as_url(path: Path | str) -> str | None:
    """The object-store address given where a path is expected; None for a path."""
    protocol = re.match(r"([A-Za-z][A-Za-z0-9+.-]+:)/+", str(path))
    return f"{protocol[1]}//{str(path)[protocol.end() :]}" if protocol else None


def refuse_url(folder: Path | str) -> None:
    """Refuse ``s3://bucket/run``, which ``Path`` would turn into a local folder named ``s3:``.

    Raises:
        ValueError: if it begins with a protocol.
    """
    if url := as_url(folder):
        raise ValueError(
            f"{url}: expected a folder of a mounted file system: a checkpoint is published by a rename, which object "
            "stores do not have. Train into a local or shared folder and copy finished checkpoints"
        )


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoint folders, newest step first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def publish(partial: Path, final: Path) -> None:
    """Rename a finished folder, replacing an earlier one of that name."""
    replaced = final.with_name(f".trash-{final.name}")
    discard(replaced)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    discard(replaced)


def prune(folder: Path, written: Path, keep: int | None, keep_every: int | None, protected: int | None = None) -> None:
    """Delete all but the newest ``keep`` checkpoints, those of every ``keep_every`` steps, the one just written, and
    the newest up to step ``protected``."""
    spared = next((p for p in list_checkpoints(folder) if protected is not None and step_of(p) <= protected), None)
    for old in list_checkpoints(folder)[max(keep, 1) :] if keep is not None else ():
        milestone = keep_every and step_of(old) and step_of(old) % keep_every == 0
        if old not in (written, spared) and not milestone:
            try:
                discard(old)
            except OSError as error:
                print(f"WARNING: could not delete the old checkpoint {old}: {error}", file=sys.stderr, flush=True)


def set_aside_after(folder: Path, step: int, suffix: str = "damaged") -> list[Path]:
    """Rename checkpoints of later steps to ``step-N.<suffix>``: a run that fell back must not find them again."""
    renamed = []
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            target = path.with_name(f"{path.name}.{suffix}")
            discard(target)
            renamed.append(path.rename(target))
    return renamed


def clean(folder: Path) -> None:
    """Delete what an interrupted save or deletion left behind."""
    for path in [*folder.glob("step-*.tmp"), *folder.glob(".trash-*")]:
        discard(path)


def discard(path: Path) -> None:
    """Delete a folder such that it is never seen half deleted under its own name; of a link, the link alone."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        trash = path if path.name.startswith(".trash-") else path.rename(path.with_name(f".trash-{path.name}"))
        shutil.rmtree(trash)


def sync(path: Path) -> None:
    """``fsync`` of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- manifest --------------------------------------------------------------------------------------------------------


def write_manifest(path: Path, step: int, values: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint folder; on return it and everything in the folder is on the disk."""
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": step, **values}
    text = json.dumps({**values, "sha256": _manifest_sha256(values)}, indent=1)
    with (path / MANIFEST).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, with the folder's files compared by name.

    Raises:
        CheckpointError: naming the file that is missing, unlisted, unreadable or not of this format.
    """
    name = path / MANIFEST
    try:
        require_file(name)
        manifest = json.loads(name.read_text())
        if not isinstance(manifest, dict):
            raise CheckpointError(f"{name}: expected a JSON object, got {type(manifest).__name__}")
        got = manifest.get("format"), manifest.get("format_version")
        if got[0] != FORMAT or got[1] not in READABLE_VERSIONS:
            raise CheckpointError(f"{name}: expected format {FORMAT} version {FORMAT_VERSION}, got {got}")
        if manifest.pop("sha256", None) != _manifest_sha256(manifest):
            raise CheckpointError(f"{name}: contents differ from the SHA-256 that it gives of itself")
        _check_listing(path, manifest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{name}: expected a checkpoint manifest: {error!r}"[:500]) from error
    return manifest


def _check_listing(path: Path, manifest: Mapping[str, Any]) -> None:
    name = path / MANIFEST
    step, files = manifest["step"], manifest["files"]
    if not isinstance(step, int) or step < 0 or not isinstance(files, list):
        raise CheckpointError(f"{name}: expected a step and a list of files, got {step!r} and {type(files).__name__}")
    for file in files:
        if not (_SHARD_NAME.fullmatch(file["name"]) and isinstance(file["size"], int)):
            raise CheckpointError(f"{name}: lists {file['name']}, which is not a checkpoint's tensor file")
        if len(str(file["sha256"])) != 64:
            raise CheckpointError(f"{name}: lists {file['name']} without a SHA-256")
    expected, present = {file["name"] for file in files}, {p.name for p in path.iterdir()} - {MANIFEST}
    for missing in sorted(expected - present):
        raise CheckpointError(f"{path / missing}: missing, but listed in {MANIFEST}")
    for unlisted in sorted(present - expected):
        raise CheckpointError(f"{path / unlisted}: not listed in {MANIFEST}; left over from another save?")


def _manifest_sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ---- tensor files ----------------------------------------------------------------------------------------------------


def write_tensors(
    path: Path, pieces: Mapping[str, Piece], read: Callable[[str], Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write a safetensors file tensor by tensor; on return it is on the disk, whole.

    ``safetensors`` is not used for writing: it wants all tensors in memory at once, and a checksum of the bytes on
    their way to the disk also catches what reading back would not.

    Args:
        path: the file; overwritten.
        pieces: what to write, by name.
        read: called with one name after the other; gives a tensor of that piece's shape and dtype, on any device.
        metadata: texts to keep in the header.

    Returns:
        ``name``, ``size`` and ``sha256``, as a manifest lists the file.

    Raises:
        OSError: if the disk is full or not writable.
        ValueError: if a tensor is not what was announced, or of a type that safetensors has no name for.
    """
    # In safetensors' order: the widest type first, so that every tensor is aligned.
    names = sorted(pieces, key=lambda name: (-pieces[name].dtype.itemsize, name))
    digest, written = hashlib.sha256(), 0
    try:
        with path.open("wb") as file:
            header = _header(names, pieces, metadata or {})
            digest.update(header)
            written += file.write(header)
            for name in names:
                block = _bytes(name, read(name), pieces[name])
                digest.update(block)
                written += file.write(block)
                del block  # before the next one is read
            file.flush()
            os.fsync(file.fileno())
        size = path.stat().st_size
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not name its file
    if size != written:
        raise OSError(f"{path}: wrote {written} bytes, the file has {size}")
    return {"name": path.name, "size": size, "sha256": digest.hexdigest()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """:func:`write_tensors` of whole tensors on any device. ``safetensors.torch.save_file`` makes files that only their
    owner can read, whatever the umask."""
    write_tensors(path, {n: Piece.whole(t) for n, t in tensors.items()}, tensors.__getitem__, metadata)


def offsets_metadata(pieces: Mapping[str, Piece]) -> dict[str, str]:
    """Metadata that tells PyTorch's reader where pieces of larger tensors belong."""
    where = {name: {"saved_offsets": list(piece.offsets)} for name, piece in pieces.items()}
    return {_OFFSETS: json.dumps(where), "DCP_VERSION": "1.0", "format": "pt"}


def read_header(path: Path) -> dict[str, Piece]:
    """Pieces in a safetensors file, from its header alone.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        offsets = json.loads(header.pop("__metadata__", {}).get(_OFFSETS, "{}"))
        pieces = {}
        for name, entry in header.items():
            shape = tuple(entry["shape"])
            begin = offsets[name]["saved_offsets"] if name in offsets else (0,) * len(shape)
            pieces[name] = Piece(_DTYPES[entry["dtype"]], shape, tuple(begin))
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a safetensors file: {error!r}") from error
    return pieces


def verify_file(path: Path, listed: Mapping[str, Any], *, checksum: bool = True) -> dict[str, Piece]:
    """Compare a tensor file with its entry in the manifest; return the pieces in it.

    Raises:
        CheckpointError: if it is truncated, altered or unreadable.
    """
    try:
        size = require_file(path)
        if size != listed["size"]:
            raise CheckpointError(f"{path}: expected {listed['size']} bytes, got {size}")
        if checksum:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != listed["sha256"]:
                    raise CheckpointError(f"{path}: contents differ from the SHA-256 in {MANIFEST}")
        return read_header(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable: {error}") from error


def require_file(path: Path) -> int:
    """Size of a regular file; a pipe or device, which would keep its reader waiting, is refused."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: expected a regular file")
    return status.st_size


def dtype_named(name: str) -> torch.dtype:
    """The element type of a safetensors name, such as ``"F32"``."""
    return _DTYPES[name]


def _header(names: Iterable[str], pieces: Mapping[str, Piece], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name in names:
        piece = pieces[name]
        if piece.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: safetensors has no type for {piece.dtype}")
        end = begin + piece.bytes
        header[name] = {"dtype": DTYPE_NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(name: str, tensor: Tensor, piece: Piece) -> memoryview:
    if (tensor.dtype, tuple(tensor.shape)) != (piece.dtype, piece.shape):
        raise ValueError(f"{name}: expected {piece.dtype} {piece.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
