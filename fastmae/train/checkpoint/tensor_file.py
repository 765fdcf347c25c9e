"""One safetensors file: written tensor by tensor with its checksum, and what its header says.

``safetensors`` itself reads the tensors; it is not used for writing because its functions want all tensors in memory at
once, and because a checksum taken of the bytes on their way to the disk also sees what a later reading back would not.
A file with pieces of larger tensors says where they belong as PyTorch's distributed checkpoints do
(``DCP_SHARDING_INFO``), so that ``torch.distributed.checkpoint.HuggingFaceStorageReader`` reads it too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PIECES = "DCP_SHARDING_INFO"
"""Metadata key of the offsets of pieces: a JSON object ``{name: {"saved_offsets": [...]}}``."""

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: all of it, or what one rank holds.

    Attributes:
        dtype: element type.
        shape: extent of the box; ``()`` of a scalar.
        offsets: where the box begins in the tensor, as many numbers as ``shape``.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the box's elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """A finished file, as a manifest lists it."""

    name: str
    size: int
    sha256: str


def write_tensors(
    path: Path,
    pieces: Mapping[str, Piece],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write a safetensors file; when this returns, it is on the disk, whole.

    Args:
        path: the file; overwritten.
        pieces: what to write, by name.
        read: called with one name after the other; gives a tensor of that piece's shape and dtype, on any device. Only
            one tensor at a time is held.
        metadata: texts to keep in the header.

    Raises:
        OSError: if the disk is full or not writable.
        ValueError: if a tensor is not what was announced, or of a type that safetensors has no name for.
    """
    # As safetensors orders them: the widest type first, so that every tensor is aligned.
    names = sorted(pieces, key=lambda name: (-pieces[name].dtype.itemsize, name))
    header = _header(names, pieces, metadata or {})
    digest, written = hashlib.sha256(), 0
    try:
        with path.open("wb") as file:
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
    return Written(path.name, size, digest.hexdigest())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Written:
    """Write whole tensors of any device, which :func:`write_tensors` does; errors are the same.

    ``safetensors.torch.save_file`` makes files that only their owner can read, whatever the umask.
    """
    pieces = {name: Piece(t.dtype, tuple(t.shape), (0,) * t.dim()) for name, t in tensors.items()}
    return write_tensors(path, pieces, tensors.__getitem__, metadata)


def read_header(path: Path) -> tuple[dict[str, Piece], dict[str, str]]:
    """Pieces and metadata of a safetensors file, from its header alone.

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
        metadata = header.pop("__metadata__", {})
        offsets = json.loads(metadata.get(PIECES, "{}"))
        pieces = {}
        for name, entry in header.items():
            shape = tuple(entry["shape"])
            begin = offsets[name]["saved_offsets"] if name in offsets else (0,) * len(shape)
            pieces[name] = Piece(_TYPES[entry["dtype"]], shape, tuple(begin))
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a safetensors file: {error!r}") from error
    return pieces, metadata


def sha256(path: Path) -> str:
    """Checksum of a whole file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def offsets_metadata(pieces: Mapping[str, Piece]) -> dict[str, str]:
    """The metadata that tell PyTorch's reader where pieces of larger tensors belong."""
    where = {name: {"saved_offsets": list(piece.offsets)} for name, piece in pieces.items()}
    return {PIECES: json.dumps(where), "DCP_VERSION": "1.0", "format": "pt"}


def _header(names: Iterable[str], pieces: Mapping[str, Piece], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name in names:
        piece = pieces[name]
        if piece.dtype not in _NAMES:
            raise ValueError(f"{name}: safetensors has no type for {piece.dtype}")
        end = begin + piece.bytes
        header[name] = {"dtype": _NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(name: str, tensor: Tensor, piece: Piece) -> memoryview:
    if (tensor.dtype, tuple(tensor.shape)) != (piece.dtype, piece.shape):
        raise ValueError(f"{name}: expected {piece.dtype} {piece.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
