"""The index of a data set: built once, cached, hashed, read by position.

An image is one row of fixed size plus its name; opening a cached index reads neither, and a row is looked up by its
number. So what a run holds does not grow with the number of images. Building writes rows as they are found and holds
the listing only (some 300 bytes a file; shards are few). Opening walks a folder again, to notice that it changed.

Bad images stay in the index, flagged: their numbers, and with them the order of all samples, are the same whenever it
was found out that they are bad.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastmae.data.header import COLOR_16, MODES, READY_MODES, Format
from fastmae.data.parts import Part, image_parts, in_order
from fastmae.data.sources import Source
from fastmae.data.table import ENTRY, Bytes, Table
from fastmae.data.tar_shards import shard_part

logger = logging.getLogger(__name__)

VERSION = 2
_MOST_CHANNELS = np.iinfo(ENTRY["channels"]).max
_FEW = 64
"""An array whose first axis is shorter than this and than its last is more likely to have its channels there."""
_KEPT_SECONDS = 30 * 86400
"""How long the index of what a folder used to hold stays: another run, on another machine even, may be reading it."""
_ROWS, _NAMES, _BAD, _VERDICTS, _MANIFEST = "rows.bin", "names.bin", "bad.jsonl", "verdicts.jsonl", "manifest.json"


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
        folder: where it is cached; None if it is not.
    """

    table: Table
    bad: dict[int, str]
    hash: str
    classes: list[str]
    shards: list[str]
    formats: frozenset[Format]
    folder: Path | None = None
    modes: frozenset[str] = frozenset()

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows by number, ``ENTRY`` (n,); ``bad`` is what is known now."""
        rows = self.table.rows(ids)
        if self.bad:
            rows["bad"] = [int(i in self.bad) for i in ids.tolist()]
        return rows

    def with_verdicts(self, verdicts: Mapping[int, str]) -> Index:
        """The index with more images known to be bad; stored beside it for the next time, if it is cached."""
        verdicts = {int(i): reason for i, reason in verdicts.items() if int(i) not in self.bad}
        if self.folder is not None:
            verdicts = _read_reasons(self.folder / _VERDICTS) | verdicts
            _write_reasons(self.folder / _VERDICTS, verdicts)
        return _judged(self, verdicts)


def _judged(index: Index, verdicts: Mapping[int, str]) -> Index:
    if not verdicts:
        return index
    digest = hashlib.blake2b(index.hash.encode(), digest_size=16)
    digest.update(np.array(sorted(verdicts), "<i8").tobytes())
    return replace(index, bad=dict(sorted((index.bad | dict(verdicts)).items())), hash=digest.hexdigest())


def build_index(source: Source, accepts: Accepts, folder: Path | None = None, num_threads: int | None = None) -> Index:
    """Read every image's header and write the index.

    Args:
        source: where the images are.
        accepts: which of them are good.
        folder: an empty folder to write into; None keeps the index in a temporary file.
        num_threads: that read; None chooses.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="fastmae-index-") as temporary:
            # The files are gone with the folder, for everybody but this process, which has them open.
            return replace(build_index(source, accepts, Path(temporary), num_threads), folder=None)
    parts, shards = _parts(source, num_threads), []
    if source.kind == "shards":
        shards = [file.path for file in source.files]
    digest = hashlib.blake2b(repr((VERSION, accepts, source.classes, shards, *accepts.layout)).encode(), digest_size=16)
    bad: dict[int, str] = {}
    formats: set[int] = set()
    modes: set[int] = set()
    with (folder / _ROWS).open("wb") as rows_file, (folder / _NAMES).open("wb") as names_file:
        for rows, names, reasons in _joined(parts, source.kind == "shards", accepts):
            bad |= reasons
            formats |= set(np.unique(rows["format"][rows["bad"] == 0]).tolist())
            modes |= set(np.unique(rows["mode"]).tolist())
            _append(rows_file, rows.tobytes(), digest)
            _append(names_file, names, digest)
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
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest))
    return index


def _append(file: BinaryIO, data: bytes, digest) -> None:
    file.write(data)
    digest.update(data)


def _parts(source: Source, num_threads: int | None) -> Iterator[Part]:
    if source.kind == "images":
        return image_parts(source.root, source.files, source.labels, listed=source.listed, num_threads=num_threads)
    return in_order(lambda file: shard_part(source.root / file.path), source.files, num_threads)


def _joined(
    parts: Iterable[Part], shards: bool, accepts: Accepts
) -> Iterator[tuple[np.ndarray, bytes, dict[int, str]]]:
    """Parts as pieces of one index: names, shards and numbers count from its beginning."""
    count = name_bytes = 0
    for number, part in enumerate(parts):
        rows = part.rows.copy()
        if accepts.channels_first:
            _turn_arrays(rows)
        reasons = part.bad | judge(rows, accepts)
        rows["name"] += name_bytes
        rows["shard"] = number if shards else 0
        rows["bad"][list(reasons)] = 1
        yield rows, part.names, {count + i: reason for i, reason in sorted(reasons.items())}
        count += len(rows)
        name_bytes += len(part.names)


def _turn_arrays(rows: np.ndarray) -> None:
    """Shapes of arrays (C, height, width), which headers read as (height, width, C); two axes are one channel."""
    arrays = (rows["format"] == Format.NPY) & (rows["channels"] != 1)
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


def cached_index(source: Source, path: Path, accepts: Accepts, cache_dir: Path | None) -> Index:
    """The index of a source, from the cache if its listing has not changed since.

    Args:
        source: what lies at the path.
        path: names the index in the cache.
        accepts: which images are good.
        cache_dir: where indices are kept; None for ``~/.cache/fastmae``. If it cannot be written to, the index is built
            in a temporary file, and a log line says so.
    """
    name = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()
    try:
        cache_dir = cache_dir or Path.home() / ".cache" / "fastmae"
        folder = cache_dir / f"index-{name}-{source.fingerprint(VERSION, accepts, *accepts.layout)}"
        index = _load(folder)
        if index is not None:
            return index
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix="writing-", dir=folder.parent))
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        logger.warning("The index of %s is not cached: %s", path, error)
        return build_index(source, accepts)
    logger.info("Reading the headers of the images in %s (%d files)", path, len(source.files))
    try:
        build_index(source, accepts, temporary)
        _publish(temporary, folder, siblings=f"index-{name}-*")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    index = _load(folder)
    if index is None:
        raise OSError(f"{folder}: was written and cannot be read")
    return index


def _load(folder: Path) -> Index | None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        table = Table(Bytes(folder / _ROWS), rows_names := Bytes(folder / _NAMES))
        if manifest["version"] != VERSION or rows_names.size != manifest["name_bytes"]:
            return None
        if (folder / _ROWS).stat().st_size != manifest["count"] * ENTRY.itemsize:
            return None
        bad = _read_reasons(folder / _BAD)
        formats = frozenset(Format(number) for number in manifest["formats"])
        named = manifest["hash"], manifest["classes"], manifest["shards"]
        index = Index(table, bad, *named, formats, folder, frozenset(manifest["modes"]))
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


def _publish(temporary: Path, folder: Path, siblings: str) -> None:
    """Written beside, then renamed: a reader sees the whole index or none."""
    if _load(folder) is None:  # not there or damaged; else another process was faster
        shutil.rmtree(folder, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    for sibling in folder.parent.glob(siblings):
        if sibling != folder and sibling.stat().st_mtime < time.time() - _KEPT_SECONDS:
            shutil.rmtree(sibling, ignore_errors=True)
