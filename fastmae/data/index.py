"""The index of a data set: built once, published under its checksum, mapped by every rank.

An index lies in a *home*: beside the data, where ``--data.index`` says, or in the cache. There
``index-<key>-<checksum>`` is a complete index, never changed but for the verdicts of ``fastmae data verify``, and
``current-<key>.json`` names the newest. The key stands for the path and for which images are good. ``writing-<key>`` is
being built, or its builder was killed: the next build takes over its rows, and those of the newest index, for files of
the same name, size and time.

Bad images stay in the index, flagged, so that the numbers of all images do not depend on when a bad one was found.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastmae.data.errors import DataError
from fastmae.data.formats import COLOR_16, MODES, READY_MODES, Format
from fastmae.data.sources import INDEX_MARK, LIST_SUFFIXES, Known, Progress, Source
from fastmae.data.storage import as_url
from fastmae.data.table import ENTRY, NAMES, SMALL, TIMES, Column, Part, Table, npy_header

logger = logging.getLogger(__name__)
VERSION = 3
_HASHED_VERSION = 2
"""What the hash begins with. It has not changed with the files, so that data keep the hash that a checkpoint stores."""
_MOST_CHANNELS = np.iinfo(ENTRY["channels"]).max
_FEW = 64
"""An array whose first axis is shorter than this and than its last is more likely to have its channels there."""
_KEPT_SECONDS = 30 * 86400
"""How long an index stays after another has replaced it: a run, on another machine even, may be reading it."""
_COLUMNS = {"rows.npy": ENTRY, "names.npy": NAMES, "times.npy": TIMES}
_ROWS, _NAMES, _TIMES = _COLUMNS
_BAD, _VERDICTS, MANIFEST = "bad.json", "verdicts.json", "manifest.json"
_FILES = (*_COLUMNS, _BAD)
BESIDE = ".fastmae"
"""The home beside the data, a hidden folder in theirs."""
_PIECE = 4 << 20
"""Bytes per checksum. CRC-32 finds any flipped bit and reads 2.4 GB/s on one core, three times as fast as BLAKE2."""
_REMEMBERED = 1 << 20
"""Names of an earlier index that are held while a list file is compared with it, about 250 MB."""


@dataclass(frozen=True)
class Accepts:
    """What images a data set is for; anything else is bad.

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

    @property
    def layout(self) -> tuple[str, ...]:
        """Part of the index's hash only where it is not the usual one."""
        return ("channels first",) if self.channels_first else ()

    def describe(self) -> str:
        """All of it, in words."""
        return repr((self, *self.layout))


class _Unusable(Exception):
    """Why the files of an index cannot be used."""


class _CannotWrite(Exception):
    """An index cannot be written where it should be. Kept apart from errors of reading the data."""


@contextmanager
def _writing(where: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _CannotWrite(f"{where or tempfile.gettempdir()}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Index:
    """An index, open.

    Attributes:
        table: rows and names.
        bad: reasons by number, in the order of the numbers.
        hash: hex digest of everything that the order and the pixels of the samples depend on: equal on two machines if
            and only if the data sets are.
        classes: names of the labels, empty if unknown.
        shards: relative paths of the tar files; empty if each image is a file of its own.
        formats: those of the good images.
        modes: of all images whose header can be read, by ``formats.MODES``.
        folder: where it is kept; None if it is not.
        source: what it was built from; empty if it is not kept.
        verdicts: the numbers that ``fastmae data verify`` found to be bad, sorted.
    """

    table: Table
    bad: dict[int, str]
    hash: str
    classes: list[str]
    shards: list[str]
    formats: frozenset[Format]
    folder: Path | None = None
    modes: frozenset[str] = frozenset()
    source: str = ""
    verdicts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def keeps_verdicts(self) -> bool:
        """Whether what is found to be bad later is remembered."""
        return self.folder is not None and os.access(self.folder, os.W_OK)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows by number, ``ENTRY`` (n,); ``bad`` is what is known now."""
        rows = self.table.rows(ids)
        if len(self.verdicts):
            places = np.searchsorted(self.verdicts[:-1], ids)
            rows["bad"] |= self.verdicts[places] == ids
        return rows

    def with_verdicts(self, verdicts: Mapping[int, str]) -> Index:
        """The index with more images known to be bad; stored with it for the next time, if it can be."""
        verdicts = {int(i): reason for i, reason in verdicts.items() if int(i) not in self.bad}
        if self.keeps_verdicts and verdicts:
            known = {i: self.bad[i] for i in self.verdicts.tolist()}
            try:
                _write_verdicts(self.folder / _VERDICTS, known | verdicts)
            except OSError as error:
                logger.warning("%s: cannot remember which images are bad: %s", self.folder, error)
        return _judged(self, verdicts)


def _judged(index: Index, verdicts: Mapping[int, str]) -> Index:
    if not verdicts:
        return index
    numbers = np.array(sorted(verdicts), "<i8")
    digest = hashlib.blake2b(index.hash.encode(), digest_size=16)
    digest.update(numbers.tobytes())
    bad = dict(sorted((index.bad | dict(verdicts)).items()))
    return replace(index, bad=bad, hash=digest.hexdigest(), verdicts=np.union1d(index.verdicts, numbers))


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
    """Read every image's header and write the index.

    Args:
        source: where the images are.
        accepts: which of them are good.
        folder: where to write; None keeps the index in memory, or in a temporary file from a million images on.
        workers: processes that read; None for one per core.
        known: rows that need not be read again.
        progress: called with a number of files that have been read.

    Raises:
        OSError: the data cannot be read.
    """
    shards, classes = source.shards, source.classes
    digest = hashlib.blake2b(
        repr((_HASHED_VERSION, accepts, classes, shards, *accepts.layout)).encode(), digest_size=16
    )
    bad: dict[int, str] = {}
    formats: set[int] = set()
    modes: set[int] = set()
    sizes = [0] * len(_COLUMNS)
    with _writing(folder):
        files = [_create(folder, name, len(source)) for name in _COLUMNS]
        for file, dtype in zip(files, _COLUMNS.values(), strict=True):
            file.write(npy_header(dtype, 0))
    for rows, names, times, reasons in _joined(source.parts(known, workers, progress), bool(shards), accepts):
        bad |= reasons
        formats |= set(np.unique(rows["format"][rows["bad"] == 0]).tolist())
        modes |= set(np.unique(rows["mode"]).tolist())
        digest.update(rows.tobytes())
        digest.update(names)
        # Times are not hashed: a copy of the data is the same data.
        with _writing(folder):
            for i, values in enumerate((rows, names, times)):
                files[i].write(values)
                sizes[i] += len(values)
    with _writing(folder):
        for file, dtype, size in zip(files, _COLUMNS.values(), sizes, strict=True):
            file.seek(0)
            file.write(npy_header(dtype, size))
            file.flush()
    index = Index(
        Table(*files[:2]),
        bad,
        digest.hexdigest(),
        classes,
        shards,
        frozenset(Format(number) for number in formats if number),
        folder,
        frozenset(MODES[number] for number in modes if number),
        location(source.root),
    )
    if folder is not None:
        with _writing(folder):
            (folder / _BAD).write_text(json.dumps(list(bad.items())))
            _write_manifest(index, accepts)
    return index


def _create(folder: Path | None, name: str, count: int) -> BinaryIO:
    if folder is not None:
        return (folder / name).open("w+b")
    if count < 1 << 20 and hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create(f"fastmae-{name}"), "w+b")
    return tempfile.TemporaryFile(prefix="fastmae-index-")


def _joined(
    parts: Iterable[Part], shards: bool, accepts: Accepts
) -> Iterator[tuple[np.ndarray, bytes, np.ndarray, dict[int, str]]]:
    """Parts as pieces of one index: names, shards and numbers count from its beginning."""
    count = name_bytes = 0
    for number, part in enumerate(parts):
        rows = part.rows.copy()
        if accepts.channels_first:
            _turn_arrays(rows, part.fresh)
        reasons = part.bad | judge(rows, accepts)
        rows["name"] += name_bytes
        rows["shard"] = number if shards else 0
        rows["bad"][list(reasons)] = 1
        yield rows, part.names, part.times, {count + i: reason for i, reason in sorted(reasons.items())}
        count += len(rows)
        name_bytes += len(part.names)


def _turn_arrays(rows: np.ndarray, fresh: np.ndarray | bool) -> None:
    """Shapes of arrays (C, height, width), which headers read as (height, width, C); two axes are one channel."""
    arrays = fresh & (rows["format"] == Format.NPY) & (rows["channels"] != 1)
    channels, height, width = (rows[name][arrays] for name in ("height", "width", "channels"))
    rows["height"][arrays], rows["width"][arrays] = height, width
    rows["channels"][arrays] = np.minimum(channels, _MOST_CHANNELS)


def judge(rows: np.ndarray, accepts: Accepts) -> dict[int, str]:
    """Why images whose headers are good are not what the data set is for: reason by number."""
    pixels = rows["height"].astype(np.int64) * rows["width"]
    arrays = (rows["format"] == Format.TIFF) | (rows["format"] == Format.NPY)
    grey = rows["channels"] == 1
    fits = (rows["channels"] == accepts.channels) | ((grey | ~arrays) & (accepts.channels == 3))
    huge = pixels > accepts.max_pixels
    ready = np.isin(rows["mode"], [MODES.index(mode) for mode in READY_MODES])
    wide = arrays & ~ready & (accepts.value_range is None)
    colour = np.isin(rows["mode"], [MODES.index(mode) for mode in COLOR_16]) & (accepts.value_range is not None)
    reasons: dict[int, str] = {}
    for i in np.flatnonzero((rows["bad"] == 0) & (huge | wide | colour | ~fits)).tolist():
        height, width, channels = (int(rows[name][i]) for name in ("height", "width", "channels"))
        if huge[i]:
            reason = f"huge: {height} x {width} pixels, more than --data.max-pixels {accepts.max_pixels}"
        elif wide[i]:
            reason = f"{MODES[rows['mode'][i]]} pixels: expected uint8, or --data.value-range that they are mapped from"
        elif colour[i]:
            reason = "16-bit colour PNG: expected 8 bits or grey with --data.value-range; convert it to TIFF"
        else:
            hint = f"--model.in-chans {channels}"
            if rows["format"][i] == Format.NPY and not accepts.channels_first and height < min(_FEW, channels):
                hint = f"shape ({height}, {width}, {channels}) looks channels-first: --data.channels-first"
                hint += "" if height == accepts.channels else f" --model.in-chans {height}"
            reason = f"{channels} channels: expected {accepts.channels} ({hint})"
        reasons[i] = reason
    return reasons


class _KnownRows:
    """Rows of earlier indexes by name, perhaps of half of one. A window moves over each, so that memory is bounded; a
    name that the window does not hold is read again from its file.

    Args:
        folders: of the indexes, the one to prefer first.
    """

    def __init__(self, folders: Iterable[Path]):
        self._windows: list[tuple[Iterator, OrderedDict[bytes, tuple[bytes, int]]]] = []
        for folder in folders:
            with suppress(OSError, ValueError):
                table, times = _open_table(folder), Column((folder / _TIMES).open("rb"), TIMES)
                self._windows.append((_rows_by_name(table, times), OrderedDict()))

    def find(self, names: list[bytes], ordered: bool) -> tuple[np.ndarray, np.ndarray]:
        """What :data:`fastmae.data.sources.Known` says."""
        found = [(bytes(ENTRY.itemsize), 0)] * len(names)
        missing = {name: i for i, name in enumerate(names)}
        for rows, window in self._windows:
            while len(window) < _REMEMBERED and not (ordered and window and next(reversed(window)) >= names[-1]):
                before = len(window)
                window.update(islice(rows, len(names)))
                if len(window) == before:
                    break
            for name in [name for name in missing if name in window]:
                found[missing.pop(name)] = window.pop(name)
            passed = len(missing) if len(window) >= _REMEMBERED else 0
            while window and (next(iter(window)) <= names[-1] if ordered else passed > 0):
                window.popitem(last=False)
                passed -= 1
        times = np.array([when for _, when in found], np.int64)
        return np.frombuffer(b"".join(row for row, _ in found), ENTRY), times


def _rows_by_name(table: Table, times: Column) -> Iterator[tuple[bytes, tuple[bytes, int]]]:
    """The rows of good images and their times."""
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


@dataclass(frozen=True)
class _Home:
    """Where the indexes of a data set lie, and the key that tells them from others there."""

    folder: Path
    key: str
    accepts: Accepts

    @property
    def pointer(self) -> Path:
        return self.folder / f"current-{self.key}.json"

    def current(self, fingerprint: str | None = None, *, verify: bool = False) -> Index | None:
        """The newest index; None if there is none, it cannot be used, or is of another listing than ``fingerprint``."""
        try:
            pointer = json.loads(self.pointer.read_text())
            folder = self.folder / pointer["folder"]
            if fingerprint is not None and pointer["fingerprint"] != fingerprint:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        try:
            return _load(folder, self.accepts, verify=verify)
        except _Unusable as error:
            if fingerprint is None:  # else it is looked at once more before it is built again
                logger.warning("The index %s cannot be used, and is built again: it %s", folder, error)
            return None

    def build(self, fingerprint: str, source: Source, **options) -> Index:
        """Build an index here, with the rows of a build that was killed and of the index before.

        Raises:
            _CannotWrite: there is no room, or no permission.
        """
        writing = self.folder / f"writing-{self.key}"
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / INDEX_MARK).touch()
            lock = os.open(f"{writing}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("Another process is building the index in %s; waiting for it", self.folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (index := self.current(fingerprint)) is not None:
                    return index
            except OSError:  # a file system without locks
                writing = self.folder / f"writing-{self.key}-{uuid.uuid4().hex[:8]}"
            before = self.current(verify=True)
            try:
                with _writing(self.folder):
                    earlier = _set_aside(writing)
                known = _KnownRows([earlier, *([before.folder] if before else [])])
                index = build_index(source, self.accepts, writing, known=known.find, **options)
                with _writing(self.folder):
                    shutil.rmtree(earlier, ignore_errors=True)
                    folder = self._publish(writing, fingerprint, before, index)
            except _CannotWrite:  # a full disk should not stay full
                shutil.rmtree(writing, ignore_errors=True)
                raise
        finally:
            os.close(lock)
        for old in (*self.folder.glob(f"index-{self.key}-*"), *self.folder.glob(f"writing-{self.key}-*")):
            with suppress(OSError):
                if before is not None and old == before.folder != folder:
                    os.utime(old)  # from now on its time is running out
                elif old != folder and old.stat().st_mtime < time.time() - _KEPT_SECONDS:
                    shutil.rmtree(old, ignore_errors=True)
        return _load(folder, self.accepts)

    def _publish(self, writing: Path, fingerprint: str, before: Index | None, index: Index) -> Path:
        """Give a finished index its name; a reader sees the whole index or none. Returns its folder."""
        for name in (*_FILES, MANIFEST):
            with (writing / name).open("rb") as file:
                os.fsync(file.fileno())
        folder = self.folder / f"index-{self.key}-{json.loads((writing / MANIFEST).read_text())['checksum']}"
        verdicts = _carried(before, index) if before is not None and before.folder != folder else {}
        verdicts |= _read_verdicts(folder / _VERDICTS)
        if verdicts:
            _write_verdicts(writing / _VERDICTS, verdicts)
        try:
            writing.rename(folder)
        except OSError:  # it is there already, and perhaps is damaged
            if not folder.is_dir():
                raise
            for path in list(writing.iterdir()):
                path.replace(folder / path.name)
            writing.rmdir()
        temporary = self.folder / f"current-{self.key}.{uuid.uuid4().hex[:8]}"
        temporary.write_text(json.dumps({"folder": folder.name, "fingerprint": fingerprint}))
        temporary.replace(self.pointer)
        return folder


def _set_aside(writing: Path) -> Path:
    """Move the rows of a build that was killed to where the next one does not overwrite them."""
    earlier = writing / "earlier"
    writing.mkdir(exist_ok=True)
    (writing / _VERDICTS).unlink(missing_ok=True)

    def size(folder: Path) -> int:
        return (folder / _ROWS).stat().st_size if (folder / _ROWS).is_file() else 0

    if size(writing) > size(earlier):  # else the kill came before all rows of an earlier one were copied
        shutil.rmtree(earlier, ignore_errors=True)
        earlier.mkdir()
        for name in _COLUMNS:
            with suppress(FileNotFoundError):
                (writing / name).rename(earlier / name)
    return earlier


def _home(folder: Path, path: Path, accepts: Accepts, place: bytes = b"") -> _Home:
    """A home of one data set may move with it, so the data's folder is no part of the key there."""
    name = place if place or path.is_dir() else os.fsencode(path.name)
    digest = hashlib.blake2b(name + b"\0" + accepts.describe().encode(), digest_size=8)
    return _Home(folder, digest.hexdigest(), accepts)


def root_of(path: Path) -> Path:
    """The folder that the names in an index of ``path`` start from."""
    is_file = path.suffix in (".tar", *LIST_SUFFIXES) if as_url(path) else not path.is_dir()
    return path.parent if is_file else path


def location(path: Path | str) -> str:
    """A path from anywhere on this machine, or a URL."""
    return as_url(path) or str(Path(path).resolve())


def trusted_index(place: Path, path: Path, accepts: Accepts) -> Index | None:
    """The index that a home names as the newest for a path, or the one in this very folder; the data are not looked at.

    Returns:
        None if there is none.

    Raises:
        DataError: the folder is an index, but a damaged one or one for other images.
    """
    if (place / MANIFEST).is_file():
        try:
            index = _load(place, accepts)
        except _Unusable as error:
            raise DataError(
                f"--data.index {place}: {error}; build it with fastmae data index and the same options"
            ) from error
    else:
        index = _home(place, path, accepts).current()
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
        source: what lies at the path.
        path: as given by the user.
        accepts: which images are good.
        home: where to keep it. None: beside the data, else in the cache, else, with a line in the log, nowhere.
        cache_dir: keep it only there, for any number of data sets.
        verify: compare all of a kept index with its checksums, however large it is.
        options: ``workers`` and ``progress`` of :func:`build_index`.

    Raises:
        DataError: ``home`` cannot be written, or there is no room anywhere.
        OSError: the data cannot be read.
    """
    if home and home.resolve() == root_of(path).resolve():
        raise DataError(f"--data.index {home}: expected a folder other than that of the images")
    fingerprint = source.fingerprint(VERSION, accepts, *accepts.layout)
    homes = [_home(home, path, accepts)] if home else []
    if home is None and cache_dir is None and as_url(path) is None:
        homes.append(_home(root_of(path) / BESIDE, path, accepts))
    if home is None:
        with suppress(RuntimeError):  # the user has no home
            cache_dir = cache_dir or Path.home() / ".cache" / "fastmae"
            homes.append(_home(cache_dir, path, accepts, os.fsencode(location(path))))
    for place in homes:
        index = place.current(fingerprint, verify=verify)
        if index is not None:
            return index
    logger.info("Reading the headers of the images in %s (%d files)", path, len(source))
    problem: object = "no home folder"
    for place in homes:
        try:
            return place.build(fingerprint, source, **options)
        except _CannotWrite as error:
            problem = error
            logger.info("The index of %s is not kept: %s", path, error)
    if home is not None:
        raise DataError(f"--data.index {home}: cannot be written: {problem}")
    logger.warning("The index of %s is not cached, and the next run builds it again: %s", path, problem)
    try:
        return build_index(source, accepts, **options)
    except _CannotWrite as error:
        raise DataError(f"the index of {path} cannot be written anywhere ({error}); give --data.index PATH") from error


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts of fastmae data verify


def _carried(before: Index, index: Index) -> dict[int, str]:
    """The verdicts of an earlier index on images that have not changed, by their numbers in the new one."""
    if not len(before.verdicts):
        return {}
    wanted = {identity: before.bad[number] for number, identity in _identities(before, before.verdicts)}
    names, carried, start = {name for name, *_ in wanted}, {}, 0
    for rows, found in index.table.scan_names():
        numbers = np.array([start + i for i, name in enumerate(found) if name in names], np.int64)
        for number, identity in _identities(index, numbers):
            if identity in wanted:
                carried[number] = wanted[identity]
        start += len(rows)
    return carried


def _identities(index: Index, numbers: np.ndarray) -> Iterator[tuple[int, tuple]]:
    """Images by what tells whether they have changed: name, size and time; in a shard, place and header instead."""
    rows = index.table.rows(numbers)
    if index.shards:
        inside = rows[["shard", "offset", "size", "height", "width"]].tolist()
        places = [(index.shards[shard], *place) for shard, *place in inside]
    else:
        times = Column((index.folder / _TIMES).open("rb"), TIMES).take(numbers)
        places = zip(rows["size"].tolist(), times.tolist(), strict=True)
    for number, name, place in zip(numbers.tolist(), index.table.names(rows), places, strict=True):
        yield number, (name, *place)


def _read_verdicts(path: Path) -> dict[int, str]:
    if not path.is_file():
        return {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(path.read_text())
        if stored["checksum"] == _checksum(stored["reasons"]):
            return dict(stored["reasons"])
    logger.warning("%s is damaged: run fastmae data verify again", path)
    return {}


def _write_verdicts(path: Path, verdicts: Mapping[int, str]) -> None:
    reasons = [[i, reason] for i, reason in sorted(verdicts.items())]
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"checksum": _checksum(reasons), "reasons": reasons}))
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _checksum(content: dict | list) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _checksums(path: Path) -> list[int]:
    """CRC-32 of each piece of a file."""
    with path.open("rb") as file:
        return [zlib.crc32(piece) for piece in iter(lambda: file.read(_PIECE), b"")]


def _write_manifest(index: Index, accepts: Accepts) -> None:
    manifest = {
        "version": VERSION,
        "count": len(index.table),
        "hash": index.hash,
        "classes": index.classes,
        "shards": index.shards,
        "formats": sorted(int(format_) for format_ in index.formats),
        "modes": sorted(index.modes),
        "accepts": accepts.describe(),
        "source": index.source,
        "files": {name: [(index.folder / name).stat().st_size, _checksums(index.folder / name)] for name in _FILES},
    }
    (index.folder / MANIFEST).write_text(json.dumps(manifest | {"checksum": _checksum(manifest)}))


def _load(folder: Path, accepts: Accepts, *, verify: bool = False) -> Index:
    """Open an index.

    Args:
        folder: where it lies.
        accepts: which images it has to be for.
        verify: compare every byte with the checksums; else only files of up to ``SMALL`` bytes.

    Raises:
        _Unusable: there is none, or it is damaged or of another version.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] != VERSION:
            raise _Unusable(f"was written by another version of fastmae (format {manifest['version']}, not {VERSION})")
        if manifest.pop("checksum") != _checksum(manifest):
            raise _Unusable(f"is damaged: {MANIFEST}")
        if manifest["accepts"] != accepts.describe():
            raise _Unusable("was built with other channels, value range or size limit")
        for name, (size, checksums) in manifest["files"].items():
            if (folder / name).stat().st_size != size:
                raise _Unusable(f"is damaged: the size of {name}")
            if (verify or size <= SMALL) and _checksums(folder / name) != checksums:
                raise _Unusable(f"is damaged: {name}")
        index = Index(
            _open_table(folder),
            dict(json.loads((folder / _BAD).read_text())),
            manifest["hash"],
            manifest["classes"],
            manifest["shards"],
            frozenset(Format(number) for number in manifest["formats"]),
            folder,
            frozenset(manifest["modes"]),
            manifest["source"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Unusable(f"is damaged: {error}") from error
    return _judged(index, _read_verdicts(folder / _VERDICTS))


def _open_table(folder: Path) -> Table:
    return Table((folder / _ROWS).open("rb"), (folder / _NAMES).open("rb"))
