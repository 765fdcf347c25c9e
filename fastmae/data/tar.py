"""Tar shards in the WebDataset convention, read by position: no member is ever extracted to a file.

Members whose names agree up to the first dot of the last component are one sample: ``a/0001.jpg`` is the image and
``a/0001.cls`` its class, a number. A name is only a label and never becomes a path, so it may be anything.

The walk over the headers is our own. Python's tarfile takes a damaged header for the end of the archive, loses the
members behind it without a word, and loops or raises at lengths that make no sense. Here every step moves forward, no
header is believed beyond the end of the file, and what is not understood is reported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmae.data.errors import DataError, with_retries
from fastmae.data.formats import IMAGE_SUFFIXES, BadImage, Header, Reader, parse_header
from fastmae.data.storage import open_reader, read_if_there, write_whole
from fastmae.data.table import ENTRY, Part, PartBuilder

logger = logging.getLogger(__name__)
VERSION = 2  # version 1 lost what lies behind damage
INDEX_SUFFIX = ".index.npz"
BLOCK = 512
DAMAGE = "damage"
_KINDS = {"1": "hard link", "2": "symbolic link", "3": "device", "4": "device", "5": "folder", "6": "pipe",
          "S": "sparse file"}  # fmt: skip
_METADATA = "LKxXg"  # kinds of headers whose data describe the next member or, ignored here, a link or all members
_MAX_METADATA = 1 << 20  # bytes of them; more is taken for damage
_CHECKSUM = slice(148, 156)
_CHECKSUM_BYTES = np.isin(np.arange(256), list(b" \x0001234567"))
_FIRST_SCAN, _LARGEST_SCAN = 4096, 1 << 20
_MAX_LABEL_BYTES = 32
_IDENTITY = 65536


# ---------------------------------------------------------------------------------------------------------------------
# Members: POSIX.1-2001 (ustar and pax) and GNU tar's formats


class Member(NamedTuple):
    """A member of an archive.

    Attributes:
        name: its bytes, not checked.
        offset, size: where its data are.
        kind: empty for a plain file, else what it is; ``DAMAGE`` for bytes that are no member.
    """

    name: bytes
    offset: int
    size: int
    kind: str


def members(shard: Reader) -> Iterator[Member]:
    """The members of one archive, or of several concatenated ones, in order; those behind damage are found again.

    Raises:
        DataError: the file is truncated, or no tar archive.
        OSError: the file system failed.
    """
    at, known = 0, {}  # what metadata say of the next member
    while at is not None:
        start, block = at, shard.read(at, BLOCK)
        name, size, kind = _parse_header(block) or (b"", 0, None)
        if kind is None or (kind in _METADATA and size > _MAX_METADATA):
            (at, found), known = _skip(shard, start, block), {}
        elif kind in _METADATA:
            at = _end(shard, start + BLOCK, size, "the name of a member")
            metadata = _read_metadata(kind, shard.read(start + BLOCK, size))
            known, found = (metadata or {}) | known, _damage(start, at) if metadata is None else None
        else:
            name, size = known.get("path", name), int(known.get("size", size))
            what = _KINDS.get(kind, "unknown kind")
            if kind in "0\x007":
                what = "folder" if name.endswith(b"/") else "sparse file" if "sparse" in known else ""
            # Links and folders have no data, whatever their size says.
            found = Member(name, start + BLOCK, 0 if kind in "123456" or what == "folder" else size, what)
            at, known = _end(shard, found.offset, found.size, repr(os.fsdecode(name))), {}
        if found is not None:
            yield found


def _parse_header(block: bytes) -> tuple[bytes, int, str] | None:
    """Name, size and kind by the block of a header."""
    if len(block) < BLOCK:
        return None
    size, checksum = _number(block[124:136]), block[_CHECKSUM]
    if size is None or _number(checksum) != sum(block) - sum(checksum) + 8 * ord(" "):
        return None
    name, prefix = _text(block[:100]), _text(block[345:500])
    if prefix and block[257:263] == b"ustar\0":  # GNU tar keeps times there
        name = prefix + b"/" + name
    return name, size, chr(block[156])


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes) -> int | None:
    """Octal digits; what needs more is binary behind a byte of 128."""
    if field[0] == 128:
        return int.from_bytes(field[1:], "big")
    digits = _text(field).strip() or b"0"
    return int(digits, 8) if not digits.strip(b"01234567") else None


def _read_metadata(kind: str, content: bytes) -> dict[str, bytes] | None:
    """What a long name or pax records say of a member's name, size and sparseness; None if they make no sense."""
    if kind in "LKg":
        return {"path": _text(content)} if kind == "L" else {}
    known, at = {}, 0
    while at < len(content) and content[at]:
        digits = content[at : at + 8].partition(b" ")[0]
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = content[at + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or content[end - 1 : end] != b"\n":
            return None
        if key == b"size" and not (value.isdigit() and len(value) < 20):
            return None
        if key in (b"path", b"size"):
            known[key.decode()] = value
        elif key.startswith(b"GNU.sparse."):
            known["sparse"] = b""
        at = end
    return known


def _end(shard: Reader, start: int, size: int, what: str) -> int:
    """Where the block after some data begins."""
    if start + size > shard.size:
        raise _no_tar(shard, f"{what} ends at byte {start + size} of {shard.size}")
    return start + -(-size // BLOCK) * BLOCK


def _no_tar(shard: Reader, why: str) -> DataError:
    return DataError(f"{shard.name}: expected a whole, plain tar file: {why}")


def _damage(start: int, end: int) -> Member:
    return Member(b"bytes %d to %d" % (start, end), start, end - start, DAMAGE)


def _skip(shard: Reader, start: int, block: bytes) -> tuple[int | None, Member | None]:
    """From a block that is no header to the next one: where it is (None: nowhere), and the damage in between.

    Zeros end an archive, and another may follow. A single block of them in front of something was a header.
    """
    zeros, at, step, found = block == bytes(BLOCK), start + BLOCK, _FIRST_SCAN, None
    filled = start if zeros else min(at, shard.size)  # the end of the last block that is not zero
    while found is None and (chunk := shard.read(at, step)):
        blocks = np.frombuffer(chunk.ljust(-(-len(chunk) // BLOCK) * BLOCK, b"\0"), np.uint8).reshape(-1, BLOCK)
        possible = _CHECKSUM_BYTES[blocks[:, _CHECKSUM]].all(1) & (blocks[:, _CHECKSUM] >= ord("0")).any(1)
        found = next((i for i in np.flatnonzero(possible).tolist() if _parse_header(blocks[i].tobytes())), None)
        last = np.flatnonzero(blocks[:found].any(1))[-1:]
        filled = min(at + BLOCK * (int(last[0]) + 1), shard.size) if last.size else filled
        at, step = at + BLOCK * (len(blocks) if found is None else found), min(2 * step, _LARGEST_SCAN)
    if found is not None:
        return at, _damage(start, at) if filled > start or at == start + BLOCK else None
    if not zeros and shard.size - filled < BLOCK:
        raise _no_tar(shard, f"no end of archive at byte {start}")
    return None, _damage(start, filled) if filled > start else None


# ---------------------------------------------------------------------------------------------------------------------
# Images and their index


def shard_part(place: Path | str) -> Part:
    """The images in a shard, by path or URL: from the index beside it if that is of this very shard, else from itself.

    Raises:
        DataError: it is no tar file, is truncated, or cannot be read.
    """
    return read_shard_index(place) or with_retries(lambda: parse_shard(place), str(place), (PermissionError,))


def parse_shard(place: Path | str) -> Part:
    """The images in a shard, in the order of its members. Damage between members is a bad image named by its bytes.

    Raises:
        DataError: it is no tar file, or is truncated.
        OSError: the file system failed.
    """
    images, labels, skipped, whole, builder = [], {}, [], 0, PartBuilder()
    with open_reader(str(place)) as shard:
        for member in members(shard):
            name = os.fsdecode(member.name)
            key, suffix = split_key(name)
            whole += member.kind != DAMAGE
            if member.kind == DAMAGE or (suffix in IMAGE_SUFFIXES and not member.kind):
                images.append((key, member))
            elif suffix in IMAGE_SUFFIXES:
                skipped.append(f"{name!r} ({member.kind})")
            elif suffix == ".cls" and not member.kind and member.size <= _MAX_LABEL_BYTES:
                text = shard.read(member.offset, member.size).strip()
                labels[key] = int(text) if text.isdigit() and int(text) < 2**31 else -1
        if images and not whole:
            raise _no_tar(shard, "no member found")
        for key, member in images:
            numbers = {"size": member.size, "offset": member.offset, "label": labels.get(key, -1)}
            builder.add(member.name, _header(shard, member), **numbers)
    if skipped:
        logger.warning("%s: skipped %d members that are no plain files, the first %s", place, len(skipped), skipped[0])
    return builder.build()


def split_key(name: str) -> tuple[str, str]:
    """What the members of a sample share, and the suffix by which they differ, lower case with its dot."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _header(shard: Reader, member: Member) -> Header | str:
    if member.kind == DAMAGE:
        return f"damaged tar: {member.size} bytes are not understood, members may be lost"

    def read(at: int, count: int) -> bytes:
        return shard.read(member.offset + at, max(0, min(count, member.size - at)))

    try:
        return parse_header(Reader(os.fsdecode(member.name), member.size, read)) or "not an image"
    except BadImage as error:
        return str(error)


def write_shard_index(path: Path, part: Part | None = None) -> Path:
    """Store what a local shard holds (None: parse it) beside it, in ``<shard>.index.npz``, whole or not at all.

    Raises:
        DataError: the shard is no tar file, is truncated, or cannot be read.
        OSError: the index cannot be written.
    """
    part = part or with_retries(lambda: parse_shard(path), str(path), (PermissionError,))
    arrays = {"rows": part.rows.tobytes(), "names": part.names, "bad": json.dumps(sorted(part.bad.items())).encode()}
    named = {name: np.frombuffer(content, np.uint8) for name, content in arrays.items()}
    file, target = BytesIO(), path.with_name(path.name + INDEX_SUFFIX)
    np.savez(file, version=np.int64(VERSION), shard=np.frombuffer(_identity(path), np.uint8), **named)
    write_whole(target, file.getvalue())
    return target


def read_shard_index(place: Path | str) -> Part | None:
    """What the index beside a shard says; None if there is none, or a damaged one, or one of another version or shard.

    A shard is recognised by its size, beginning and end.
    """
    try:
        content = read_if_there(f"{place}{INDEX_SUFFIX}")
        with np.load(BytesIO(content), allow_pickle=False) as arrays:
            if int(arrays["version"]) != VERSION or arrays["shard"].tobytes() != _identity(place):
                return None
            rows = arrays["rows"].reshape(-1).view(ENTRY)
            names, bad = arrays["names"].tobytes(), json.loads(arrays["bad"].tobytes())
            return Part(rows, names, {int(i): str(reason) for i, reason in bad})
    except Exception:  # zipfile and NumPy raise whatever they like at damaged bytes; the shard itself tells everything
        return None


def _identity(place: Path | str) -> bytes:
    """Tells a shard from another without reading it: size, beginning and end. Times do not survive a copy."""
    with open_reader(str(place)) as shard:
        ends = shard.read(0, _IDENTITY) + shard.read(max(0, shard.size - _IDENTITY), _IDENTITY)
        return hashlib.blake2b(b"%d" % shard.size + ends, digest_size=16).digest()
