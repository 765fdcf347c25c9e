"""The index of a data set: built once, published, hashed, read by position.

An image is one row of fixed size plus its name; opening an index reads neither, and a row is looked up by its number.
So what a run holds does not grow with the number of images. Building holds the names of one folder at a time.

An index lies in a *home*: beside the data, where ``--data.index`` says, or in the cache. There ``index-<key>-<hash>``
is a complete index, never changed but for the verdicts of ``fastmae data verify``, and ``current-<key>.json`` names the
newest. The key stands for the path and for which images are good. ``writing-<key>`` is one that is being built, or
whose builder was killed: the next build takes over its rows, and those of the newest index, of all files that have the
same name, size and time of change.

Bad images stay in the index, flagged: their numbers, and with them the order of all samples, are the same whenever it
was found out that they are bad.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastmae.data.errors import DataError, with_retries
from fastmae.data.formats import COLOR_16, MODES, READY_MODES, BadImage, Format, Header, read_header
from fastmae.data.sources import ListedFile, Source
from fastmae.data.table import ENTRY, Bytes, Part, PartBuilder, Table
from fastmae.data.tar import shard_part
from fastmae.data.threads import batched, in_order

logger = logging.getLogger(__name__)
VERSION = 2
_MOST_CHANNELS = np.iinfo(ENTRY["channels"]).max
_FEW = 64
"""An array whose first axis is shorter than this and than its last is more likely to have its channels there."""
_KEPT_SECONDS = 30 * 86400
"""How long an index stays after another has replaced it: a run, on another machine even, may be reading it."""
_ROWS, _NAMES, _TIMES, _BAD, _VERDICTS = "rows.bin", "names.bin", "times.bin", "bad.jsonl", "verdicts.jsonl"
_EARLIER = "earlier"
MANIFEST = "manifest.json"
BESIDE = ".fastmae"
"""The home beside the data, a hidden folder in theirs."""
_FILES = 64


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


@dataclass(frozen=True)
class Index:
    """An index, open.

    Attributes:
        table: rows and names.
        bad: reasons by number, in the order of the numbers.
        hash: hex digest of all that the order and the pixels of the samples hang on: equal on two machines if and only
            if the data sets are.
        classes: names of the labels, empty if unknown.
        shards: relative paths of the tar files; empty if each image is a file of its own.
        formats: those of the good images.
        modes: of all images whose header can be read, by ``header.MODES``.
        folder: where it is kept; None if it is not.
        source: what it was built from; empty if it is not kept.
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

    @property
    def keeps_verdicts(self) -> bool:
        """Whether what is found to be bad later is remembered."""
        return self.folder is not None and os.access(self.folder, os.W_OK)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows by number, ``ENTRY`` (n,); ``bad`` is what is known now."""
        rows = self.table.rows(ids)
        if self.bad:
            rows["bad"] = [int(i in self.bad) for i in ids.tolist()]
        return rows

    def with_verdicts(self, verdicts: Mapping[int, str]) -> Index:
        """The index with more images known to be bad; stored with it for the next time, if it can be."""
        verdicts = {int(i): reason for i, reason in verdicts.items() if int(i) not in self.bad}
        if self.keeps_verdicts:
            verdicts = _read_reasons(self.folder / _VERDICTS) | verdicts
            _write_reasons(self.folder / _VERDICTS, verdicts)
        return _judged(self, verdicts)


def _judged(index: Index, verdicts: Mapping[int, str]) -> Index:
    if not verdicts:
        return index
    digest = hashlib.blake2b(index.hash.encode(), digest_size=16)
    digest.update(np.array(sorted(verdicts), "<i8").tobytes())
    return replace(index, bad=dict(sorted((index.bad | dict(verdicts)).items())), hash=digest.hexdigest())


def build_index(
    source: Source,
    accepts: Accepts,
    folder: Path | None = None,
    num_threads: int | None = None,
    *,
    known: Callable[[ListedFile], Header | None] = lambda file: None,
    progress: Callable[[int], None] | None = None,
) -> Index:
    """Read every image's header and write the index.

    Args:
        source: where the images are.
        accepts: which of them are good.
        folder: where to write; None keeps the index in a temporary file.
        num_threads: that read; None chooses.
        known: headers that need not be read again.
        progress: called with a number of files that are being read.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="fastmae-index-") as temporary:
            # The files are gone with the folder, for everybody but this process, which has them open.
            index = build_index(source, accepts, Path(temporary), num_threads, known=known, progress=progress)
            return replace(index, folder=None)
    shards = [file.path for file in source.files] if source.kind == "shards" else []
    digest = hashlib.blake2b(repr((VERSION, accepts, source.classes, shards, *accepts.layout)).encode(), digest_size=16)
    bad: dict[int, str] = {}
    formats: set[int] = set()
    modes: set[int] = set()
    parts = _parts(source, num_threads, known, progress)
    with ExitStack() as stack:
        rows_file, names_file, times_file = (
            stack.enter_context((folder / name).open("wb")) for name in (_ROWS, _NAMES, _TIMES)
        )
        for rows, names, times, reasons in _joined(parts, source.kind == "shards", accepts):
            bad |= reasons
            formats |= set(np.unique(rows["format"][rows["bad"] == 0]).tolist())
            modes |= set(np.unique(rows["mode"]).tolist())
            _append(rows_file, rows.tobytes(), digest)
            _append(names_file, names, digest)
            times_file.write(times.tobytes())  # no part of the hash: a copy of the data is the same data
    index = Index(
        Table(Bytes(folder / _ROWS), Bytes(folder / _NAMES)),
        bad,
        digest.hexdigest(),
        source.classes,
        shards,
        frozenset(Format(number) for number in formats if number),
        folder,
        frozenset(MODES[number] for number in modes if number),
    )
    _write_reasons(folder / _BAD, bad)
    manifest = {
        "version": VERSION,
        "count": len(index.table),
        "name_bytes": (folder / _NAMES).stat().st_size,
        "hash": index.hash,
        "classes": index.classes,
        "shards": index.shards,
        "formats": sorted(int(format_) for format_ in index.formats),
        "modes": sorted(index.modes),
        "accepts": accepts.describe(),
        "source": str(source.root.resolve()),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return index


def _append(file: BinaryIO, data: bytes, digest) -> None:
    file.write(data)
    digest.update(data)


def _parts(
    source: Source,
    num_threads: int | None,
    known: Callable[[ListedFile], Header | None],
    progress: Callable[[int], None] | None,
) -> Iterator[Part]:
    if source.kind == "shards":
        yield from in_order(lambda file: shard_part(source.root / file.path), source.files, num_threads)
        return

    def counted() -> Iterator[ListedFile]:
        for some in batched(source.files, 256):
            yield from some
            if progress is not None:
                progress(len(some))

    options = {"listed": source.listed, "known": known, "num_threads": num_threads}
    yield from image_parts(source.root, counted(), **options)


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
    ready = np.isin(rows["mode"], [MODES.index(mode) for mode in READY_MODES])
    wide = arrays & ~ready & (accepts.value_range is None)
    good = rows["bad"] == 0
    reasons: dict[int, str] = {}
    for i in np.flatnonzero(good & (pixels > accepts.max_pixels)).tolist():
        size = f"{rows['height'][i]} x {rows['width'][i]} pixels"
        reasons[i] = f"huge: {size}, more than --data.max-pixels {accepts.max_pixels}"
    for i in np.flatnonzero(good & wide).tolist():
        mode = MODES[rows["mode"][i]]
        reasons.setdefault(i, f"{mode} pixels: expected uint8, or --data.value-range that they are mapped from")
    colour = np.isin(rows["mode"], [MODES.index(mode) for mode in COLOR_16]) & (accepts.value_range is not None)
    for i in np.flatnonzero(good & colour).tolist():
        reasons.setdefault(i, "16-bit colour PNG: expected 8 bits or grey with --data.value-range; convert it to TIFF")
    for i in np.flatnonzero(good & ~fits).tolist():
        found, first = int(rows["channels"][i]), int(rows["height"][i])
        hint = f"--model.in-chans {found}"
        if rows["format"][i] == Format.NPY and not accepts.channels_first and first < min(_FEW, found):
            hint = f"shape ({first}, {rows['width'][i]}, {found}) looks channels-first: --data.channels-first"
            hint += "" if first == accepts.channels else f" --model.in-chans {first}"
        reasons.setdefault(i, f"{found} channels: expected {accepts.channels} ({hint})")
    return reasons


def trusted_index(place: Path, path: Path, accepts: Accepts) -> Index | None:
    """The index that a home names as the newest for a path, or the one in this very folder; the data are not looked at.

    Returns:
        None if there is none.

    Raises:
        DataError: the folder is an index, but a damaged one or one for other images.
    """
    if not (place / MANIFEST).is_file():
        index = _current(place, _key(path, accepts), accepts)
    elif (index := _load(place, accepts)) is None:
        raise DataError(
            f"--data.index {place}: is damaged, or was built with other channels, value range or size limit; build it "
            "with fastmae data index and the same options"
        )
    root = _root(path).resolve()
    if index is not None and index.source != str(root):
        logger.warning("The index %s is used for %s; it was built from %s", index.folder, root, index.source)
    return index


def publish_index(
    source: Source,
    path: Path,
    accepts: Accepts,
    *,
    home: Path | None = None,
    cache_dir: Path | None = None,
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Index:
    """The index of a source as it is now: as it was kept if the listing has not changed since, else built and kept.

    Args:
        source: what lies at the path.
        path: as given by the user.
        accepts: which images are good.
        home: where to keep it. None: beside the data, else in the cache, else, with a line in the log, nowhere.
        cache_dir: keep it only there, for any number of data sets.
        num_threads, progress: as for :func:`build_index`.

    Raises:
        DataError: ``home`` cannot be written.
    """
    fingerprint = source.fingerprint(VERSION, accepts, *accepts.layout)
    homes = [(home, _key(path, accepts))] if home else list(_homes(path, accepts, cache_dir))
    for place, key in homes:
        index = _current(place, key, accepts, fingerprint)
        if index is not None:
            return index
    logger.info("Reading the headers of the images in %s (%d files)", path, len(source.files))
    options = {"num_threads": num_threads, "progress": progress}
    problem: object = "no home folder"
    for place, key in homes:
        try:
            return _build_in(place, key, fingerprint, source, accepts, options)
        except OSError as error:
            problem = error
            logger.info("The index of %s is not kept in %s: %s", path, place, error)
    if home is not None:
        raise DataError(f"--data.index {home}: cannot be written: {problem}")
    logger.warning("The index of %s is not cached: %s", path, problem)
    return build_index(source, accepts, **options)


def _homes(path: Path, accepts: Accepts, cache_dir: Path | None) -> Iterator[tuple[Path, str]]:
    """Where an index may be kept, and its key there; the cache has those of many places."""
    if cache_dir is None:
        yield _root(path) / BESIDE, _key(path, accepts)
    with suppress(RuntimeError):  # no home
        yield cache_dir or Path.home() / ".cache" / "fastmae", _key(path, accepts, os.fsencode(path.resolve()))


def _key(path: Path, accepts: Accepts, place: bytes = b"") -> str:
    """Names an index in its home. A home of one data set may move with it, so the folder's own name is no part."""
    name = place if place or path.is_dir() else os.fsencode(path.name)
    return hashlib.blake2b(name + b"\0" + accepts.describe().encode(), digest_size=8).hexdigest()


def _root(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _pointer(home: Path, key: str) -> Path:
    return home / f"current-{key}.json"


def _current(home: Path, key: str, accepts: Accepts, fingerprint: str | None = None) -> Index | None:
    """The newest index under a key; None if there is none, or one of another listing than ``fingerprint``."""
    try:
        pointer = json.loads(_pointer(home, key).read_text())
        same = fingerprint is None or pointer["fingerprint"] == fingerprint
        return _load(home / pointer["folder"], accepts) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build_in(home: Path, key: str, fingerprint: str, source: Source, accepts: Accepts, options: dict) -> Index:
    """Build an index in a home, with the rows of a build that was killed and of the index before."""
    home.mkdir(parents=True, exist_ok=True)
    writing, before = home / f"writing-{key}", _current(home, key, accepts)
    writing.mkdir(exist_ok=True)
    lock = os.open(home / f"writing-{key}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another run is building it, or a file system without locks
            writing = home / f"writing-{key}-{uuid.uuid4().hex[:8]}"
            writing.mkdir()
        earlier = writing / _EARLIER
        if _size(writing / _ROWS) > _size(earlier / _ROWS):  # the kill came before all rows of the last one were copied
            shutil.rmtree(earlier, ignore_errors=True)
            earlier.mkdir()
            for name in (_ROWS, _NAMES, _TIMES):
                with suppress(FileNotFoundError):
                    (writing / name).rename(earlier / name)
        folders = [earlier, *([before.folder] if before else [])]
        tables = [table for folder in folders if (table := _KnownRows.open(folder, ordered=not source.listed))]

        def known(file: ListedFile) -> Header | None:
            return next((header for header in [table.find(file) for table in tables] if header), None)

        try:
            digest = build_index(source, accepts, writing, known=known, **options).hash
            shutil.rmtree(earlier, ignore_errors=True)
            folder = home / f"index-{key}-{digest}"
            _publish(writing, folder, _pointer(home, key), fingerprint, accepts)
        except OSError:  # a full disk should not stay full
            shutil.rmtree(writing, ignore_errors=True)
            raise
    finally:
        os.close(lock)
    index = _load(folder, accepts)
    if index is None:
        raise OSError(f"{folder}: was written and cannot be read")
    if before is not None and before.folder != folder:
        with suppress(OSError):
            os.utime(before.folder)  # from now on its time is running out
    for old in (*home.glob(f"index-{key}-*"), *home.glob(f"writing-{key}-*")):
        with suppress(OSError):
            if old != folder and old.stat().st_mtime < time.time() - _KEPT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    return index


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _publish(writing: Path, folder: Path, pointer: Path, fingerprint: str, accepts: Accepts) -> None:
    """Written beside, then renamed: a reader sees the whole index or none."""
    for name in (_ROWS, _NAMES, _TIMES, _BAD, MANIFEST):
        with (writing / name).open("rb") as file:
            os.fsync(file.fileno())
    if _load(folder, accepts) is None:  # not there, or damaged
        shutil.rmtree(folder, ignore_errors=True)
    try:
        writing.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        (writing / _TIMES).replace(folder / _TIMES)  # the same images, touched or copied; or another process was faster
        shutil.rmtree(writing, ignore_errors=True)
    temporary = pointer.with_name(f"{pointer.name}.{uuid.uuid4().hex[:8]}")
    temporary.write_text(json.dumps({"folder": folder.name, "fingerprint": fingerprint}))
    temporary.replace(pointer)


class _KnownRows:
    """Rows of an earlier index, perhaps of half of one, by name.

    Args:
        ordered: names are asked for in their order, so that none has to be held.
    """

    def __init__(self, rows: Bytes, names: Bytes, times: Bytes, ordered: bool):
        self._table, self._names, self._times = Table(rows, names), names, times
        self._rows = self._scan()
        self._by_name = None if ordered else dict(self._rows)
        self._next = next(self._rows, None)

    @classmethod
    def open(cls, folder: Path, ordered: bool) -> _KnownRows | None:
        try:
            return cls(*(Bytes(folder / name) for name in (_ROWS, _NAMES, _TIMES)), ordered)
        except OSError:
            return None

    def find(self, file: ListedFile) -> Header | None:
        """The header of a good file that has not changed since."""
        if self._by_name is None:
            while self._next and self._next[0] < file.path:
                self._next = next(self._rows, None)
            found = self._next[1] if self._next and self._next[0] == file.path else None
        else:
            found = self._by_name.get(file.path)
        return found[1] if found and found[0] == (file.size, file.mtime) else None

    def _scan(self) -> Iterator[tuple[str, tuple[tuple[int, int], Header | None]]]:
        number = 0
        for rows in self._table.scan():
            size = min(len(rows), self._times.size // 8 - number)
            times = np.frombuffer(self._times.read(8 * number, 8 * max(size, 0)), "<i8").tolist()
            start, end = int(rows["name"][0]), int(rows["name"][-1]) + int(rows["name_size"][-1])
            names = self._names.read(start, max(min(end, self._names.size) - start, 0))
            for row, mtime in zip(rows.tolist(), times, strict=False):
                found = dict(zip(ENTRY.names, row, strict=True))
                at = found["name"] - start
                name = names[at : at + found["name_size"]]
                if len(name) < found["name_size"]:  # not written before the kill
                    return
                header = None
                if not found["bad"]:
                    sides = found["height"], found["width"], found["orientation"], found["channels"]
                    with suppress(ValueError, IndexError):  # noise after a power cut
                        header = Header(Format(found["format"]), *sides, MODES[found["mode"]])
                yield os.fsdecode(name), ((found["size"], mtime), header)
            number += len(rows)


def _load(folder: Path, accepts: Accepts) -> Index | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        table = Table(Bytes(folder / _ROWS), rows_names := Bytes(folder / _NAMES))
        if manifest["version"] != VERSION or manifest["accepts"] != accepts.describe():
            return None
        sizes = rows_names.size, (folder / _ROWS).stat().st_size
        if sizes != (manifest["name_bytes"], manifest["count"] * ENTRY.itemsize):
            return None
        bad = _read_reasons(folder / _BAD)
        formats = frozenset(Format(number) for number in manifest["formats"])
        named = manifest["hash"], manifest["classes"], manifest["shards"]
        index = Index(table, bad, *named, formats, folder, frozenset(manifest["modes"]), manifest["source"])
        return _judged(index, _read_reasons(folder / _VERDICTS))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, of another version or damaged: all the same, it is built again


def _read_reasons(path: Path) -> dict[int, str]:
    if not path.is_file():
        return {}
    pairs = (json.loads(line) for line in path.read_text().splitlines())
    return {int(number): str(reason) for number, reason in pairs}


def _write_reasons(path: Path, reasons: Mapping[int, str]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps([i, reason]) + "\n" for i, reason in sorted(reasons.items())))
    temporary.replace(path)


def image_parts(
    root: Path,
    files: Iterable[ListedFile],
    *,
    listed: bool,
    known: Callable[[ListedFile], Header | None] = lambda file: None,
    num_threads: int | None = None,
) -> Iterator[Part]:
    """Reads the header of each file that is not known, in parallel threads.

    Files that are no images are left aside, unless ``listed``.
    """

    def inspect(some: list[tuple[ListedFile, Header | None]]) -> Part:
        builder = PartBuilder()
        for file, header in some:
            fresh = header is None
            if fresh:
                header = _inspect(os.path.join(root, file.path), file)  # noqa: PTH118 - a million times
            if header is None and listed:
                header = "not an image"
            if header is not None:
                builder.add_file(file, header, fresh=fresh)
        return builder.build()

    # The hash of an index depends on how many files make a part.
    yield from in_order(inspect, batched(((file, known(file)) for file in files), _FILES), num_threads)


def _inspect(path: str, file: ListedFile) -> Header | str | None:
    """A header, None for a file of another kind, or the reason why the file is bad."""
    if file.size < 0:
        return "dangling link" if os.path.islink(path) else "no such file"  # noqa: PTH114
    try:
        return with_retries(lambda: read_header(path), path, give_up_on=(BadImage, PermissionError))
    except BadImage as error:
        return str(error)
    except PermissionError:
        return "no permission to read it"
