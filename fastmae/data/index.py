"""The index of a data set: built once, published under its checksum, mapped by every rank.

An index lies in a *home*: beside the data, where ``--data.index`` says, or in the cache. There
``index-<key>-<checksum>`` is a complete index, never changed but for the verdicts of ``fastmae data verify``, and
``current-<key>.json`` names the newest. The key stands for the path and for which images are good. A folder
``writing-<key>-*`` is being built, or its builder was killed: the next build takes over its rows, and those of the
newest index, for files of the same name, size and time.

Bad images stay in the index, flagged, so that the numbers of all images do not depend on when a bad one was found.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

from fastmae.data.errors import DataError
from fastmae.data.formats import COLOR_16, MODES, READY_MODES, Format
from fastmae.data.sources import INDEX_MARK, LIST_SUFFIXES, Known, Progress, Source
from fastmae.data.storage import as_url
from fastmae.data.table import ENTRY, MOST_CHANNELS, NAMES, SMALL, TIMES, Column, Part, Table, npy_header

logger = logging.getLogger(__name__)
VERSION = 4
_HASHED_VERSION = 2
"""What the hash begins with. It has not changed with the files, so that data keep the hash that a checkpoint stores."""
_KEPT_SECONDS = 30 * 86400
"""How long an index stays after another has replaced it: a run, on another machine even, may be reading it."""
_COLUMNS = {"rows.npy": ENTRY, "names.npy": NAMES, "times.npy": TIMES}
_ROWS, _NAMES, _TIMES = _COLUMNS
MANIFEST, _VERDICTS = "manifest.json", "verdicts.json"
BESIDE = ".fastmae"
"""The home beside the data, a hidden folder in theirs."""
_PIECE = 4 << 20
"""Bytes per checksum. CRC-32 finds any flipped bit and reads 2.4 GB/s on one core, three times as fast as BLAKE2."""
_REMEMBERED = 1 << 20
"""Names of an earlier index that are held while a list file is compared with it, about 250 MB."""
_READY, _COLOR_16 = ([MODES.index(mode) for mode in modes] for modes in (READY_MODES, COLOR_16))
_FEW = 64
"""An array whose first axis is shorter than this and than its last is more likely to have its channels there."""


@dataclass(frozen=True)
class Accepts:
    """What images a data set is for; anything else is bad. Raises ValueError for values out of range.

    Attributes:
        channels: of the decoded images.
        value_range: what 16-bit and float pixels are mapped from, for all channels or for each; None if they are not
            expected.
        max_pixels: the largest height x width.
        channels_first: whether arrays are (C, height, width).
    """

    channels: int = 3
    value_range: tuple[float, ...] | None = None
    max_pixels: int = 178_956_970
    channels_first: bool = field(default=False, repr=False)

    def __post_init__(self):
        if self.channels < 1:
            raise ValueError(f"channels: expected at least 1, got {self.channels}")
        if not 1 <= self.max_pixels <= Accepts.max_pixels:
            raise ValueError(f"max_pixels: expected 1 to {Accepts.max_pixels} (Pillow's limit), got {self.max_pixels}")
        if self.value_range is not None:
            object.__setattr__(self, "value_range", check_value_range(self.value_range, self.channels))

    @property
    def layout(self) -> tuple[str, ...]:
        """Part of the index's hash only where it is not the usual one."""
        return ("channels first",) if self.channels_first else ()

    def __str__(self) -> str:
        return repr((self, *self.layout))


def check_value_range(value_range: Sequence[float], channels: int) -> tuple[float, ...]:
    """Low and high, for all channels or for each in turn, as a tuple.

    Raises:
        ValueError: another number of values, or some that are not finite or not in order.
    """
    pairs = list(zip(value_range[::2], value_range[1::2], strict=False))
    if len(value_range) not in (2, 2 * channels) or not all(-math.inf < low < high < math.inf for low, high in pairs):
        each = f", or {2 * channels} with those of each channel in turn" if channels > 1 else ""
        raise ValueError(f"value_range: expected finite LOW HIGH, smallest first{each}, got {tuple(value_range)}")
    return tuple(map(float, value_range))


@dataclass(frozen=True)
class Index:
    """An index, open.

    Attributes:
        table: rows and names.
        reasons: why images are bad by their headers: by number, in the order of the numbers.
        content: hex digest of all that the order and the pixels of the samples depend on, but for the verdicts.
        classes: names of the labels, empty if unknown.
        shards: relative paths of the tar files; empty if each image is a file of its own.
        formats: those of the good images.
        modes: of all images whose header can be read, by ``formats.MODES``.
        source: what it was built from.
        folder: where it is kept; None if it is not.
        verdicts: why images are bad by ``fastmae data verify``, by number.
    """

    table: Table
    reasons: dict[int, str]
    content: str
    classes: list[str]
    shards: list[str]
    formats: frozenset[Format]
    modes: frozenset[str]
    source: str
    folder: Path | None = None
    verdicts: dict[int, str] = field(default_factory=dict)

    @cached_property
    def bad(self) -> dict[int, str]:
        """Why images are bad, by number, in the order of the numbers."""
        return dict(sorted((self.verdicts | self.reasons).items())) if self.verdicts else self.reasons

    @cached_property
    def hash(self) -> str:
        """Hex digest: equal on two machines if and only if the data sets are."""
        if not self.verdicts:
            return self.content
        digest = hashlib.blake2b(self.content.encode(), digest_size=16)
        digest.update(np.array(sorted(self.verdicts), "<i8"))
        return digest.hexdigest()

    @property
    def keeps_verdicts(self) -> bool:
        """Whether what is found to be bad later is remembered."""
        return self.folder is not None and os.access(self.folder, os.W_OK)

    def with_verdicts(self, verdicts: Mapping[int, str]) -> Index:
        """The index with more images known to be bad; stored with it for the next time, if it can be."""
        new = {int(i): reason for i, reason in verdicts.items() if int(i) not in self.bad}
        index = replace(self, verdicts=self.verdicts | new)
        if self.keeps_verdicts and new:
            try:
                _write_json(self.folder / _VERDICTS, sorted(index.verdicts.items()))
            except OSError as error:
                logger.warning("%s: cannot remember which images are bad: %s", self.folder, error)
        return index


# ---------------------------------------------------------------------------------------------------------------------
# Building


def build_index(
    source: Source,
    accepts: Accepts,
    folder: Path | None = None,
    workers: int | None = None,
    *,
    known: Known | None = None,
    progress: Progress | None = None,
) -> Index:
    """Read every image's header and write the index into a folder.

    Without a folder it is kept in memory, or in a temporary file from a million images on. The other arguments are
    those of ``source.parts``.

    Raises:
        OSError: the index cannot be written.
        DataError: the data cannot be read.
    """
    key = repr((_HASHED_VERSION, accepts, source.classes, source.shards, *accepts.layout))
    digest = hashlib.blake2b(key.encode(), digest_size=16)
    reasons, formats, modes = {}, set(), set()
    files, sizes = [_create(folder, name, len(source)) for name in _COLUMNS], [0] * len(_COLUMNS)
    for file, dtype in zip(files, _COLUMNS.values(), strict=True):
        file.write(npy_header(dtype, 0))
    for number, part in enumerate(_read(source, known, workers, progress)):
        rows = part.rows.copy()  # to count names, shards and numbers from the beginning of the index
        if accepts.channels_first:
            _turn_arrays(rows, part.fresh)
        bad = part.bad | _judge(rows, accepts)
        reasons |= {sizes[0] + i: reason for i, reason in sorted(bad.items())}
        rows["bad"][list(bad)] = 1
        rows["name"] += sizes[1]
        rows["shard"] = number if source.shards else 0
        formats.update(rows["format"][rows["bad"] == 0].tolist())
        modes.update(rows["mode"].tolist())
        digest.update(rows)
        digest.update(part.names)
        # Times are not hashed: a copy of the data is the same data.
        for i, values in enumerate((rows, part.names, part.times)):
            files[i].write(values)
            files[i].flush()  # a build that is killed is continued from here
            sizes[i] += len(values)
    for file, dtype, size in zip(files, _COLUMNS.values(), sizes, strict=True):
        file.seek(0)
        file.write(npy_header(dtype, size))
        file.flush()
    manifest = {
        "reasons": list(reasons.items()),
        "content": digest.hexdigest(),
        "classes": source.classes,
        "shards": source.shards,
        "formats": sorted(formats - {0}),
        "modes": [MODES[mode] for mode in sorted(modes - {0})],
        "source": location(source.root),
    }
    if folder is not None:
        columns = {name: [(folder / name).stat().st_size, _checksums(folder / name)] for name in _COLUMNS}
        _write_json(folder / MANIFEST, manifest | {"accepts": str(accepts), "files": columns})
    return replace(_index(manifest, Table(*files[:2])), folder=folder)


def _create(folder: Path | None, name: str, count: int) -> BinaryIO:
    if folder is not None:
        return (folder / name).open("w+b")
    if count < 1 << 20 and hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create(f"fastmae-{name}"), "w+b")
    return tempfile.TemporaryFile(prefix="fastmae-index-")


def _read(source: Source, *options) -> Iterator[Part]:
    """The parts of a source; errors of reading it are kept apart from those of writing the index."""
    try:
        yield from source.parts(*options)
    except OSError as error:
        raise DataError(f"{error.filename or source.root}: cannot be read: {error.strerror or error}") from error


def _turn_arrays(rows: np.ndarray, fresh: np.ndarray | bool) -> None:
    """Shapes of arrays (C, height, width), which headers read as (height, width, C); two axes are one channel."""
    arrays = fresh & (rows["format"] == Format.NPY) & (rows["channels"] != 1)
    channels, height, width = (rows[name][arrays] for name in ("height", "width", "channels"))
    rows["height"][arrays], rows["width"][arrays] = height, width
    rows["channels"][arrays] = np.minimum(channels, MOST_CHANNELS)


def _judge(rows: np.ndarray, accepts: Accepts) -> dict[int, str]:
    """Why images whose headers are good are not what the data set is for: reason by number."""
    headers = rows[["format", "mode", "height", "width", "channels"]].tolist()
    reasons = {i: _reason(accepts, *headers[i]) for i in np.flatnonzero(rows["bad"] == 0).tolist()}
    return {i: reason for i, reason in reasons.items() if reason}


def _reason(accepts: Accepts, format_: int, mode: int, height: int, width: int, channels: int) -> str | None:
    is_array, has_range = format_ in (Format.TIFF, Format.NPY), accepts.value_range is not None
    if height * width > accepts.max_pixels:
        return f"huge: {height} x {width} pixels, more than --data.max-pixels {accepts.max_pixels}"
    if is_array and not has_range and mode not in _READY:
        return f"{MODES[mode]} pixels: expected uint8, or --data.value-range that they are mapped from"
    if has_range and mode in _COLOR_16:
        return "16-bit colour PNG: expected 8 bits or grey with --data.value-range; convert it to TIFF"
    if channels == accepts.channels or (accepts.channels == 3 and (channels == 1 or not is_array)):
        return None
    hint = f"--model.in-chans {channels}"
    if format_ == Format.NPY and not accepts.channels_first and height < min(_FEW, channels):
        hint = f"shape ({height}, {width}, {channels}) looks channels-first: --data.channels-first"
        hint += "" if height == accepts.channels else f" --model.in-chans {height}"
    return f"{channels} channels: expected {accepts.channels} ({hint})"


class _KnownRows:
    """Rows of earlier indexes by name, of the first folder that has them; one may be half of an index. A window moves
    over each, so that memory is bounded; a file whose name it does not hold is read again."""

    def __init__(self, folders: Iterable[Path]):
        self._windows = [(_rows_by_name(folder), OrderedDict()) for folder in folders]

    def find(self, names: list[bytes], ordered: bool) -> tuple[np.ndarray, np.ndarray]:
        """What :data:`fastmae.data.sources.Known` says."""
        found, missing = {}, set(names)
        for rows, window in self._windows:
            while len(window) < _REMEMBERED and not (ordered and window and next(reversed(window)) >= names[-1]):
                if not (some := dict(islice(rows, len(names)))):
                    break
                window.update(some)
            here = [name for name in missing if name in window]
            found |= {name: window.pop(name) for name in here}
            missing.difference_update(here)
            too_many = len(missing) if len(window) >= _REMEMBERED else 0
            passed = takewhile(names[-1].__ge__, window) if ordered else islice(window, too_many)
            for name in list(passed):
                del window[name]
        rows, times = zip(*(found.get(name, (bytes(ENTRY.itemsize), 0)) for name in names), strict=True)
        return np.frombuffer(b"".join(rows), ENTRY), np.array(times, np.int64)


def _rows_by_name(folder: Path) -> Iterator[tuple[bytes, tuple[bytes, int]]]:
    """The rows of good images and their times; none if the table cannot be read."""
    with suppress(OSError, ValueError):
        table, times = _open_table(folder), Column((folder / _TIMES).open("rb"), TIMES)
        start = 0
        for rows, names in table.scan_names():
            modified = times.read(start, start + len(rows)).tolist()
            good = ((rows["bad"] == 0) & (rows["mode"] < len(MODES))).tolist()
            for name, row, when, is_good in zip(names, rows, modified, good, strict=False):
                if is_good:
                    yield name, (row.tobytes(), when)
            start += len(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Publishing


class _Home:
    """Where the indexes of a data set lie, and the key that tells them from others there."""

    def __init__(self, folder: Path, path: Path, accepts: Accepts, place: str = ""):
        # A home of one data set may move with it, so the data's folder is no part of the key there.
        name = os.fsencode(place or ("" if path.is_dir() else path.name))
        key = hashlib.blake2b(name + b"\0" + str(accepts).encode(), digest_size=8).hexdigest()
        self.folder, self.accepts = folder, accepts
        self._index, self._writing, self._current = f"index-{key}-", f"writing-{key}", folder / f"current-{key}.json"

    def current(self, fingerprint: str | None = None, *, verify: bool = False) -> Index | None:
        """The newest index; None if there is none, it cannot be used, or is of another listing than ``fingerprint``."""
        with suppress(_Unusable):
            pointer = _read_json(self._current)
            folder = self.folder / pointer["folder"]
            try:
                if fingerprint in (None, pointer["fingerprint"]):
                    return _load(folder, self.accepts, verify=verify)
            except _Unusable as error:
                if fingerprint is None:  # else it is looked at once more before it is built again
                    logger.warning("The index %s cannot be used, and is built again: it %s", folder, error)
        return None

    def build(self, fingerprint: str, source: Source, **options) -> Index:
        """:func:`build_index` here, with the rows of a build that was killed and of the index before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / INDEX_MARK).touch()
        killed: list[Path] = []
        with (self.folder / f"{self._writing}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("Another process is building the index in %s; waiting for it", self.folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (index := self.current(fingerprint)) is not None:
                    return index
            except OSError:  # a file system without locks, on which none of these may be taken over
                lock = None
            if lock is not None:
                killed = sorted(self.folder.glob(f"{self._writing}-*"), key=_rows_written)
            before, writing = self.current(verify=True), self.folder / f"{self._writing}-{uuid4().hex[:8]}"
            known = _KnownRows([*killed[-1:], *([before.folder] if before else [])])
            try:
                for fewer in killed[:-1]:
                    shutil.rmtree(fewer)
                writing.mkdir()
                index = build_index(source, self.accepts, writing, known=known.find, **options)
                index = self._publish(index, fingerprint, before)
            except OSError:  # a full disk should not stay full
                for path in (writing, *killed):
                    shutil.rmtree(path, ignore_errors=True)
                raise
            for path in killed[-1:]:
                shutil.rmtree(path, ignore_errors=True)
        for old in (*self.folder.glob(f"{self._index}*"), *self.folder.glob(f"{self._writing}-*")):
            with suppress(OSError):
                if before is not None and old == before.folder != index.folder:
                    os.utime(old)  # from now on its time is running out
                elif old != index.folder and old.stat().st_mtime < time.time() - _KEPT_SECONDS:
                    shutil.rmtree(old, ignore_errors=True)
        return index

    def _publish(self, index: Index, fingerprint: str, before: Index | None) -> Index:
        """Give a finished index its name; a reader sees the whole index or none."""
        writing = index.folder
        for path in writing.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        folder = self.folder / f"{self._index}{json.loads((writing / MANIFEST).read_text())['checksum']}"
        try:
            writing.rename(folder)
        except OSError:  # it is there already, and perhaps is damaged
            if not folder.is_dir():
                raise
            for path in list(writing.iterdir()):
                path.replace(folder / path.name)
            writing.rmdir()
        index = replace(index, folder=folder, verdicts=_read_verdicts(folder))
        if before is not None and before.folder != folder:
            index = index.with_verdicts(_carried(before, index))
        _write_json(self._current, {"folder": folder.name, "fingerprint": fingerprint})
        return index


def _rows_written(folder: Path) -> int:
    path = folder / _ROWS
    return path.stat().st_size if path.is_file() else 0


def root_of(path: Path) -> Path:
    """The folder that the names in an index of ``path`` start from."""
    is_file = path.suffix in (".tar", *LIST_SUFFIXES) if as_url(path) else not path.is_dir()
    return path.parent if is_file else path


def _beside(source: Source, path: Path) -> Path:
    """Where an index lies near the data: not among class folders, of which torchvision's ``ImageFolder`` would take it
    for one, unless the data are a mount, beside which nothing may be shared."""
    root = root_of(path).resolve()
    return root / BESIDE if root.is_mount() or not source.classes else root.parent / BESIDE / root.name


def location(path: Path | str) -> str:
    """A path from anywhere on this machine, or a URL."""
    return as_url(path) or str(Path(path).resolve())


def trusted_index(place: Path, path: Path, accepts: Accepts) -> Index | None:
    """The index that a home names as the newest for a path, or the one in this very folder; None if there is none.

    The data are not looked at.

    Raises:
        DataError: the folder is an index, but a damaged one or one for other images.
    """
    if (place / MANIFEST).is_file():
        try:
            index = _load(place, accepts)
        except _Unusable as error:
            text = f"--data.index {place}: {error}; build it with fastmae data index and the same options"
            raise DataError(text) from error
    else:
        index = _Home(place, path, accepts).current()
    root = location(root_of(path))
    if index is not None and index.source != root:
        logger.warning("The index %s is used for %s; it was built from %s", index.folder, root, index.source)
    return index


def publish_index(
    source: Source,
    path: Path,
    accepts: Accepts,
    *,
    home: Path | None = None,
    cache_dir: Path | None = None,
    verify: bool = False,
    **options,
) -> Index:
    """The index of a source as it is now: as it was kept if the listing has not changed since, else built and kept.

    Args:
        source: what lies at ``path``.
        path: as the user has given it.
        home: where to keep it. None: near the data, else in the cache, else, with a line in the log, nowhere.
        cache_dir: keep it only there, for any number of data sets.
        verify: compare all of a kept index with its checksums, however large it is.
        options: ``workers`` and ``progress`` of :func:`build_index`.

    Raises:
        DataError: the data cannot be read, ``home`` cannot be written, or there is no room anywhere.
    """
    if home and home.resolve() == root_of(path).resolve():
        raise DataError(f"--data.index {home}: expected a folder other than that of the images")
    fingerprint = source.fingerprint(VERSION, str(accepts))
    if home:
        homes = [_Home(home, path, accepts)]
    else:
        homes = [] if cache_dir or as_url(path) else [_Home(_beside(source, path), path, accepts)]
        with suppress(RuntimeError):  # the user has no home
            cache = cache_dir or Path.home() / ".cache" / "fastmae"
            homes.append(_Home(cache, path, accepts, location(path)))
    for place in homes:
        if (index := place.current(fingerprint, verify=verify)) is not None:
            return index
    logger.info("Reading the headers of the images in %s (%d files)", path, len(source))
    problem = "no home folder"
    for place in homes:
        try:
            return place.build(fingerprint, source, **options)
        except OSError as error:
            problem = f"{error.filename or place.folder}: {error.strerror or error}"
            logger.info("The index of %s is not kept: %s", path, problem)
    if home is not None:
        raise DataError(f"--data.index {home}: cannot be written: {problem}")
    logger.warning("The index of %s is not cached, and the next run builds it again: %s", path, problem)
    try:
        return build_index(source, accepts, **options)
    except OSError as error:
        raise DataError(f"the index of {path} cannot be written anywhere ({error}); give --data.index PATH") from error


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts of fastmae data verify


def _carried(before: Index, index: Index) -> dict[int, str]:
    """The verdicts of an earlier index on images that have not changed, by their numbers in the new one."""
    identities = _identities(before, np.array([*before.verdicts], np.int64))
    reasons = dict(zip(identities, before.verdicts.values(), strict=True))
    names, carried, start = {name for name, *_ in reasons}, {}, 0
    for rows, found in index.table.scan_names() if reasons else ():
        numbers = start + np.flatnonzero([name in names for name in found])
        some = zip(numbers.tolist(), _identities(index, numbers), strict=True)
        carried |= {number: reasons[identity] for number, identity in some if identity in reasons}
        start += len(rows)
    return carried


def _identities(index: Index, numbers: np.ndarray) -> list[tuple]:
    """Images by what tells whether they have changed: name, place in a shard, header, and the time of a file."""
    rows, times = index.table.rows(numbers), Column((index.folder / _TIMES).open("rb"), TIMES).values
    shards = [index.shards[shard] for shard in rows["shard"].tolist()] if index.shards else [""] * len(rows)
    when = times.take(numbers).tolist() if len(times) else shards
    inside = rows[["offset", "size", "height", "width"]].tolist()
    return list(zip(index.table.names(rows), shards, inside, when, strict=True))


def _read_verdicts(folder: Path) -> dict[int, str]:
    path = folder / _VERDICTS
    try:
        return dict(_read_json(path)) if path.is_file() else {}
    except _Unusable:
        logger.warning("%s is damaged: run fastmae data verify again", path)
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# Files


class _Unusable(Exception):
    """Why the files of an index cannot be used."""


def _write_json(path: Path, content: dict | list) -> None:
    """Atomically, with a checksum."""
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}")
    temporary.write_text(json.dumps({"version": VERSION, "checksum": _checksum(content), "content": content}))
    temporary.replace(path)


def _read_json(path: Path) -> Any:
    try:
        stored = json.loads(path.read_text())
        version, is_whole = stored["version"], stored.get("checksum") == _checksum(stored.get("content"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Unusable(f"is damaged: {error}") from error
    if version != VERSION:
        raise _Unusable(f"was written by another version of fastmae (format {version}, not {VERSION})")
    if not is_whole:
        raise _Unusable(f"is damaged: {path.name}")
    return stored["content"]


def _checksum(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _checksums(path: Path) -> list[int]:
    """CRC-32 of each piece of a file."""
    with path.open("rb") as file:
        return [zlib.crc32(piece) for piece in iter(lambda: file.read(_PIECE), b"")]


def _load(folder: Path, accepts: Accepts, *, verify: bool = False) -> Index:
    """Open an index; raises _Unusable if there is none that can be used.

    Args:
        verify: compare every byte with the checksums; else only files of up to ``SMALL`` bytes.
    """
    manifest = _read_json(folder / MANIFEST)
    if manifest["accepts"] != str(accepts):
        raise _Unusable("was built with other channels, value range or size limit")
    try:
        for name, (size, checksums) in manifest["files"].items():
            if (folder / name).stat().st_size != size:
                raise _Unusable(f"is damaged: the size of {name}")
            if (verify or size <= SMALL) and _checksums(folder / name) != checksums:
                raise _Unusable(f"is damaged: {name}")
        table = _open_table(folder)
    except (OSError, ValueError) as error:
        raise _Unusable(f"is damaged: {error}") from error
    return replace(_index(manifest, table), folder=folder, verdicts=_read_verdicts(folder))


def _open_table(folder: Path) -> Table:
    return Table((folder / _ROWS).open("rb"), (folder / _NAMES).open("rb"))


def _index(manifest: dict[str, Any], table: Table) -> Index:
    """An index that is not kept."""
    return Index(
        table,
        dict(manifest["reasons"]),
        manifest["content"],
        manifest["classes"],
        manifest["shards"],
        frozenset(map(Format, manifest["formats"])),
        frozenset(manifest["modes"]),
        manifest["source"],
    )
