"""The checkpoint format: folders, manifest and tensor files. Knows nothing of models, optimisers or ranks.

A checkpoint is a folder ``checkpoints/step-N``. Each writing rank has one safetensors file in it; ``manifest.json``
lists the files with sizes and SHA-256, says where each tensor is, and holds everything that is not a tensor. It is
written last, and the folder gets its name by a rename after that: a folder of that name is complete, and later damage
is detected before anything is read. Nothing is pickled.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
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
"""Metadata key of the offsets of chunks: a JSON object ``{name: {"saved_offsets": [...]}}``."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Element types by safetensors' names."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Chunk:
    """Rows of a tensor, all of them or one rank's shard, and the number of the first."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0

    @classmethod
    def whole(cls, tensor: Tensor) -> Chunk:
        """All of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def end(self) -> int:
        """The number behind the last row; a scalar is one row."""
        return self.begin + (self.shape[0] if self.shape else 1)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a missing, damaged or forged file makes its reader raise into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # KeyError, RecursionError, UnicodeDecodeError, struct.error, SafetensorError, ...
        text = str(error) if isinstance(error, OSError) else repr(error)
        raise CheckpointError(f"{path}: unreadable: {text[:400]}") from error


# ---- folders ---------------------------------------------------------------------------------------------------------


def refuse_url(path: Path | str, name: str = "--out") -> None:
    """Raise ``ValueError`` for an address such as ``s3://bucket/run``, of which ``Path`` would make a folder ``s3:``.

    A checkpoint is published by a rename, which object stores do not have.
    """
    if protocol := re.match(r"([A-Za-z][A-Za-z0-9+.-]+:)/+", str(path)):
        raise ValueError(
            f"{name}: expected a path of a mounted file system, got {protocol[1]}//{str(path)[protocol.end() :]}: "
            "object stores are neither read nor written. Mount the bucket, or copy what is in it"
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
    found = list_checkpoints(folder)
    spared = {written, *[path for path in found if protected is not None and step_of(path) <= protected][:1]}
    for old in found[max(keep, 1) :] if keep is not None else ():
        milestone = keep_every and step_of(old) and step_of(old) % keep_every == 0
        if old not in spared and not milestone:
            try:
                discard(old)
            except OSError as error:
                print(f"WARNING: could not delete the old checkpoint {old}: {error}", file=sys.stderr, flush=True)


def set_aside_after(folder: Path, step: int, suffix: str = "damaged") -> None:
    """Rename checkpoints of later steps to ``step-N.<suffix>``: a run that fell back must not find them again."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            target = path.with_name(f"{path.name}.{suffix}")
            discard(target)
            path.rename(target)


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
    with (path / MANIFEST).open("w") as file:
        file.write(json.dumps({**values, "sha256": _manifest_sha256(values)}, indent=1))
        file.flush()
        os.fsync(file.fileno())
    sync(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, which holds the files that the manifest lists and no others.

    Raises:
        CheckpointError: naming the file that is missing, unlisted, unreadable or not of this format.
    """
    name = path / MANIFEST
    with reading(name):
        require_file(name)
        manifest = json.loads(name.read_text())
        got = manifest.get("format"), manifest.get("format_version")
        if got[0] != FORMAT or got[1] not in READABLE_VERSIONS:
            raise CheckpointError(f"{name}: expected format {FORMAT} version {FORMAT_VERSION}, got {got}")
        if manifest.pop("sha256", None) != _manifest_sha256(manifest):
            raise CheckpointError(f"{name}: contents differ from the SHA-256 that it gives of itself")
        if not isinstance(manifest["step"], int):
            raise CheckpointError(f"{name}: expected a step, got {manifest['step']!r}")
        listed, present = {file["name"] for file in manifest["files"]}, {p.name for p in path.iterdir()} - {MANIFEST}
        for other in listed:
            if not _SHARD_NAME.fullmatch(other):
                raise CheckpointError(f"{name}: lists {other}, which is not a checkpoint's tensor file")
    for file in sorted(listed ^ present):
        why = f"missing, but listed in {MANIFEST}" if file in listed else f"not listed in {MANIFEST}"
        raise CheckpointError(f"{path / file}: {why}")
    return manifest


def _manifest_sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ---- tensor files ----------------------------------------------------------------------------------------------------


def write_tensors(
    path: Path, chunks: Mapping[str, Chunk], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write a safetensors file tensor by tensor; on return it is on the disk. Returns its entry in a manifest.

    ``safetensors`` is not used for writing: it needs all tensors in memory at once, and a checksum of the bytes on
    their way to the disk also detects what reading back would not. ``read`` returns a name's tensor, on any device.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    # In safetensors' order: the widest type first, so that every tensor is aligned.
    names = sorted(chunks, key=lambda name: (-chunks[name].dtype.itemsize, name))
    for name in names:
        chunk, end = chunks[name], begin + chunks[name].bytes
        header[name] = {"dtype": DTYPE_NAMES[chunk.dtype], "shape": chunk.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    def blocks() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(text)) + text
        for name in names:
            yield memoryview(read(name).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    try:
        with path.open("wb") as file:
            for block in blocks():
                digest.update(block)
                file.write(block)
                del block  # before the next one is read
            file.flush()
            os.fsync(file.fileno())
            return {"name": path.name, "size": file.tell(), "sha256": digest.hexdigest()}
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not name its file


def replace_file(
    path: Path, chunks: Mapping[str, Chunk], read: Callable[[str], Tensor], metadata: Mapping[str, Any]
) -> Path:
    """Replace a safetensors file atomically, with JSON-able metadata; raises CheckpointError if it cannot."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        write_tensors(partial, chunks, read, {"format": "pt", **{k: json.dumps(v) for k, v in metadata.items()}})
        return partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def offsets_metadata(chunks: Mapping[str, Chunk]) -> dict[str, str]:
    """Metadata that tells PyTorch's reader where chunks of larger tensors belong."""
    where = {n: {"saved_offsets": [c.begin, *(0 for _ in c.shape[1:])] if c.shape else []} for n, c in chunks.items()}
    return {_OFFSETS: json.dumps(where), "DCP_VERSION": "1.0", "format": "pt"}


def read_header(path: Path) -> dict[str, Chunk]:
    """Chunks in a safetensors file, from its header alone; raises CheckpointError if it is no such file."""
    chunks = {}
    with reading(path):
        require_file(path)
        with safe_open(path, framework="pt") as file:
            offsets = json.loads((file.metadata() or {}).get(_OFFSETS, "{}"))
            for name in file.keys():  # noqa: SIM118
                rows, begin = file.get_slice(name), offsets.get(name, {}).get("saved_offsets", ())
                chunks[name] = Chunk(DTYPES[rows.get_dtype()], tuple(rows.get_shape()), next(iter(begin), 0))
    return chunks


def verify_file(path: Path, listed: Mapping[str, Any]) -> dict[str, Chunk]:
    """Compare a tensor file with its entry in the manifest, else raise CheckpointError; return the chunks in it."""
    with reading(path):
        if (size := require_file(path)) != listed["size"]:
            raise CheckpointError(f"{path}: expected {listed['size']} bytes, got {size}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != listed["sha256"]:
                raise CheckpointError(f"{path}: contents differ from the SHA-256 in {MANIFEST}")
    return read_header(path)


def require_file(path: Path) -> int:
    """Size of a regular file; a pipe or device, which would block its reader, is refused."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: expected a regular file")
    return status.st_size
