"""Map-style data sets: PyTorch's, Hugging Face's, Parquet files, and any object that reads an image by its number.

Each becomes a :class:`Records`. ``RecordSource`` builds its index, which reads every image once; from then on it is a
data set like any other.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import operator
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from fastmae.data.errors import DataError, UndecodableImage, with_retries
from fastmae.data.formats import BadImage, parse_header, reader_over
from fastmae.data.sources import IN_MEMORY, Source, find_source
from fastmae.data.storage import CHANGED, as_url
from fastmae.data.table import Part, PartBuilder
from fastmae.data.threads import in_order

_PART = 256
_ROW_GROUP_BYTES = 4 << 30
"""Size of the row groups of Parquet files that are kept in memory, uncompressed."""
_ROW_GROUP = " row group "
_WINDOW, _READS = 256, 8
"""Most row groups that are shuffled together, and that are read at a time."""
_LARGEST_LABEL = 2**31 - 1
_ARRAY_MODES = ("L", "RGB", "I;16", "I", "F")


class Records(Protocol):
    """A map-style data set of encoded images; any thread may call it.

    Optional: ``label(i) -> int``, -1 for none, and ``classes``, the names of the labels.

    Attributes:
        fingerprint: changes when the images do.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """The bytes of an image file: JPEG, PNG, WebP, TIFF or ``.npy``."""


def as_records(source: Any) -> Records:
    """A map-style data set as :class:`Records`.

    Args:
        source: that already, a ``datasets.Dataset`` with a column of images, or what :class:`TorchRecords` takes.

    Raises:
        DataError: it is something else, such as an iterable-style data set.
    """
    if hasattr(source, "read") and hasattr(source, "__len__"):
        if not isinstance(getattr(source, "fingerprint", None), str):
            raise DataError(f"{type(source).__name__}: expected a fingerprint, a string that changes with the images")
        return source
    kind, is_hugging_face = type(source).__name__, type(source).__module__.startswith("datasets.")
    if is_hugging_face and isinstance(source, dict):
        raise DataError(f"{kind}: expected one split, got {', '.join(source)}")
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, dict):
        return HuggingFaceRecords(source) if is_hugging_face else TorchRecords(source)
    raise DataError(
        f"{kind}: expected a map-style data set, with a length and read(i) or [i]. Iterable data sets are not read, "
        "because the order of training needs random access: save the images as files or shards"
    )


def source_at(path: Path, workers: int | None = None, progress: Callable[[int], None] | None = None) -> Any:
    """What lies at a path or URL, whatever it is: see :func:`fastmae.data.sources.find_source`."""
    found = find_records(path)
    if found is None and path.is_dir():
        with os.scandir(path) as files:
            found = _parquet(path, [path / file.name for file in files if file.name.endswith(".parquet")])
    return find_source(path, workers, progress) if found is None else found


def find_records(path: Any) -> RecordSource | None:
    """The source of what :func:`as_records` takes, of a Parquet file or pattern, or of a ``save_to_disk`` folder.

    Never lists a folder, so a folder of Parquet files is left to :func:`source_at`; None for it and for other paths.

    Raises:
        DataError: the data set cannot be used.
    """
    if not isinstance(path, str | os.PathLike):
        return RecordSource(as_records(path))
    path = Path(path).expanduser()
    if (path / "dataset_dict.json").is_file():
        splits = sorted(str(child) for child in path.iterdir() if child.is_dir())
        raise DataError(f"{path}: expected one split of it: {', '.join(splits)}")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return RecordSource(HuggingFaceRecords(_import("datasets", path).load_from_disk(path)), path)
    if path.suffix == ".parquet" and not path.is_dir():
        return _parquet(path, [path] if path.is_file() else list(path.parent.glob(path.name)))
    return None


def is_parquet(shards: Sequence[str]) -> bool:
    """Whether the shards of an index are row groups of Parquet files."""
    return _ROW_GROUP in "".join(shards[:1])


def _parquet(path: Path, files: list[Path]) -> RecordSource | None:
    # Hugging Face's image folders have a metadata.parquet beside the images.
    files = sorted(file for file in files if file.stem != "metadata")
    splits = {match[1] for file in files if (match := re.match(r"(train|test|val|validation)\b", file.name))}
    if len(splits) > 1:
        one = files[0].parent / f"{min(splits)}-*.parquet"
        raise DataError(f"{path}: holds several splits; expected one, such as {one}")
    return RecordSource(ParquetRecords(files), path) if files else None


class RecordSource(Source):
    """A map-style data set, at a path or in memory: the source of its index, and the storage that reads its images.

    Attributes:
        shards: names of the row groups of Parquet files, which windows of the order keep together; otherwise empty.
        window: the default number of row groups in a window; None to choose as for tar shards.
    """

    def __init__(self, records: Records, path: Path | None = None):
        digest = hashlib.blake2b(records.fingerprint.encode(), digest_size=4).hexdigest()
        root = path or Path(IN_MEMORY + getattr(records, "name", f"{type(records).__name__}-{digest}"))
        blocks, self.window = getattr(records, "blocks", {}), getattr(records, "window", None)
        super().__init__(root, blocks, getattr(records, "classes", []))
        self.records, self._count, self._name = records, len(records), as_url(root) or root
        self._digest = repr((records.fingerprint, self._count)).encode()
        ends = list(accumulate(blocks.values())) or [*range(_PART, self._count, _PART), self._count]
        self._parts = [range(*limits) for limits in pairwise([0, *ends])]

    def storage(self, indexed: int) -> RecordSource:
        """The storage for an index of ``indexed`` images; DataError if there are more or fewer."""
        if indexed != self._count:
            raise DataError(f"{self.root}: has {self._count} images, its index {indexed}; refresh the index")
        return self

    def path(self, name: str) -> str:
        return f"{self._name}[{name}]"

    def read(self, name: str, offset: int, size: int, sample_id: int) -> np.ndarray:
        self._check_length()
        data = self._read(sample_id)
        if len(data) != size:
            raise UndecodableImage(f"{CHANGED}: expected {size} bytes, got {len(data)}")
        return data

    def _counted_parts(self, known: object, workers: int | None) -> Iterator[tuple[int, list[Part]]]:
        # Threads, because a data set may not be picklable.
        return ((len(part.rows), [part]) for part in in_order(self._part, self._parts, workers))

    def _part(self, numbers: range) -> Part:
        builder, label_of = PartBuilder(), getattr(self.records, "label", lambda i: -1)
        for i in numbers:
            data, label = b"", -1
            try:
                data = self._read(i)
                label = label_of(i)
                header = parse_header(reader_over(data, "x.npy"))  # .npy and TIFF are images by their suffix only
            except (UndecodableImage, BadImage) as error:
                header = str(error)
            builder.add(b"%d" % i, header, size=len(data), label=label if 0 <= label <= _LARGEST_LABEL else -1)
        self._check_length()
        return builder.build()

    def _read(self, i: int) -> np.ndarray:
        def read() -> np.ndarray:
            try:
                return np.frombuffer(self.records.read(i), np.uint8)
            except (OSError, DataError):
                raise
            except Exception as error:  # the data set's own
                raise UndecodableImage(f"cannot be read: {error!r}") from error

        return with_retries(read, self.path(str(i)))

    def _check_length(self) -> None:
        if len(self.records) != self._count:
            raise DataError(f"{self._name}: had {self._count} images and now has {len(self.records)}")


def _import(name: str, path: Path | str) -> ModuleType:
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise DataError(f"{path}: reading it needs the package datasets: pip install 'fastmae[datasets]'") from error


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


class TorchRecords:
    """A map-style data set of PyTorch as :class:`Records`.

    Items are images or (image, label, ...). An image is a PIL image, an array (height, width[, C]), a tensor
    ([C, ]height, width), or the bytes of an image file. Pixels are passed on losslessly, as ``.npy`` in memory. They
    must be the same each time: leave random crops and flips to the loader.

    Args:
        dataset: read by several threads at a time.
        fingerprint: a string that you change with the images; the index is kept under it. None: the index is built at
            each start.
    """

    def __init__(self, dataset: Any, fingerprint: str | None = None):
        self.dataset, self.fingerprint = dataset, fingerprint or uuid.uuid4().hex
        self.name = "-".join(filter(None, (type(dataset).__name__, fingerprint)))
        self.classes = [str(name) for name in getattr(dataset, "classes", None) or []]
        self._last = threading.local()  # the label of the item read last, since label(i) follows read(i)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> bytes:
        item = self.dataset[i]
        image, *rest = item if isinstance(item, tuple | list) else (item,)
        self._last.label = i, _number(rest[0]) if rest else -1
        return _image_file(image)

    def label(self, i: int) -> int:
        if getattr(self._last, "label", (None,))[0] != i:
            self.read(i)
        return self._last.label[1]


def _number(label: Any) -> int:
    """A class number; -1 for other targets, such as captions."""
    try:
        return operator.index(label)
    except (TypeError, ValueError):
        return -1


def _image_file(image: Any) -> bytes:
    """The bytes of a file that holds an image losslessly."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if image.mode not in _ARRAY_MODES:  # converted as files are: alpha is dropped, palettes are looked up
            image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    elif hasattr(image, "movedim"):
        image = image.detach().cpu().movedim(0, -1) if image.ndim == 3 else image.detach().cpu()
    elif not isinstance(image, np.ndarray):
        raise TypeError(f"expected an image (PIL, array, tensor or bytes of a file), got {type(image).__name__}")
    file = BytesIO()
    np.save(file, np.ascontiguousarray(image), allow_pickle=False)
    return file.getvalue()


class HuggingFaceRecords:
    """A ``datasets.Dataset`` as :class:`Records`: the stored bytes of its first column of images.

    Labels come from its first ``ClassLabel`` column, which also names the classes, or from integers named ``label``.

    Raises:
        DataError: no column holds images.
    """

    def __init__(self, dataset: Any):
        datasets = _import("datasets", "a Hugging Face data set")
        features, plain = dataset.features, dataset.with_format(None)
        image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
        label = next((name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)), "label")
        if image is None:
            raise DataError(f"expected a column of images, found {_columns(features)}")
        self.fingerprint = dataset._fingerprint
        self.classes = list(getattr(features.get(label), "names", None) or [])
        self._images = plain.select_columns(image).cast_column(image, datasets.Image(decode=False))
        is_number = "int" in str(getattr(features.get(label), "dtype", ""))
        self._labels = plain.select_columns(label) if is_number else None
        self._image, self._label = image, label

    def __len__(self) -> int:
        return len(self._images)

    def read(self, i: int) -> bytes:
        image = self._images[i][self._image]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    def label(self, i: int) -> int:
        label = None if self._labels is None else self._labels[i][self._label]
        return -1 if label is None else label


class ParquetRecords:
    """Parquet files as :class:`Records`: images as Hugging Face writes them, or a binary column.

    Reading an image means reading its whole row group, so the row groups used last are kept. If they do not all fit
    into ``cache_bytes``, ``window`` makes the order of training go over windows of row groups that do.

    Args:
        files: with the same columns, in the order of the images.
        cache_bytes: bytes of row groups to keep, uncompressed.

    Raises:
        DataError: a file cannot be read, has no column of images, or a row group that does not fit.
    """

    def __init__(self, files: Sequence[Path], cache_bytes: int = _ROW_GROUP_BYTES):
        self._parquet, columns = _import("pyarrow.parquet", files[0]), None
        self._groups, self.blocks, sizes = [], {}, []
        for file in files:
            try:
                metadata = self._parquet.read_metadata(file)
            except (OSError, ValueError) as error:
                raise DataError(f"{file}: expected a Parquet file: {error}") from error
            found = _find_columns(file, metadata.schema.to_arrow_schema())
            columns = columns or found
            if found != columns:
                raise DataError(f"{file}: expected the columns and class names of {files[0]}, got others")
            for g in range(metadata.num_row_groups):
                self.blocks[f"{file.name}{_ROW_GROUP}{g}"] = metadata.row_group(g).num_rows
                sizes.append(metadata.row_group(g).total_byte_size)
                self._groups.append((file, metadata, g))
        self._image, self._label, self.classes = columns
        self._ends = list(accumulate(self.blocks.values()))
        self.fingerprint = repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
        largest = max(sizes, default=1)
        if largest > cache_bytes:
            raise DataError(
                f"{list(self.blocks)[sizes.index(largest)]}: expected at most {cache_bytes:,} bytes, got {largest:,}, "
                "all of which are read for an image. Rewrite the file with row_group_size=100"
            )
        fitting, self.window = len(sizes), None
        if sum(sizes) > cache_bytes:
            fitting = cache_bytes // largest
            self.window = max(1, min(fitting * 3 // 4, _WINDOW))
        threads = ThreadPoolExecutor(_READS, "fastmae-parquet")
        # Futures are kept, so that threads that want the same row group wait for one reading.
        self._cached = lru_cache(fitting)(lambda number: threads.submit(self._read_group, number))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, i: int) -> bytes:
        images, _, row = self._row(i)
        data = images[row].as_py()
        if data is None:
            raise ValueError("the row has no bytes")
        return data

    def label(self, i: int) -> int:
        _, labels, row = self._row(i)
        label = None if labels is None else labels[row].as_py()
        return -1 if label is None else label

    def _row(self, i: int) -> tuple[Any, Any, int]:
        """The columns of the row group that holds record ``i``, images and labels, and its row there."""
        number = bisect.bisect_right(self._ends, i)
        try:
            images, labels = self._cached(number).result()
        except BaseException:
            self._cached.cache_clear()  # of the failure, so that the next try reads again
            raise
        return images, labels, i - (self._ends[number - 1] if number else 0)

    def _read_group(self, number: int) -> tuple[Any, Any]:
        path, metadata, group = self._groups[number]
        columns = [self._image] + [self._label] * (self._label is not None)
        with self._parquet.ParquetFile(path, metadata=metadata) as file:
            table = file.read_row_group(group, columns=columns, use_threads=False).flatten()
        return table.column(self._image), table.column(self._label) if self._label is not None else None


def _find_columns(file: Path, schema: Any) -> tuple[str, str | None, list[str]]:
    """Names of the columns with images (dots between levels) and with labels, and the names of the classes."""
    children = {field.name: [field.type.field(i).name for i in range(field.type.num_fields)] for field in schema}
    nested = [f"{name}.bytes" for name in schema.names if "bytes" in children[name]]
    binary = [field.name for field in schema if str(field.type) in ("binary", "large_binary")]
    if not nested and len(binary) != 1:
        raise DataError(f"{file}: expected a column of images (struct with bytes), found {_columns(schema.names)}")
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    label = next((n for n in ("label", "labels") if n in schema.names and "int" in str(schema.field(n).type)), None)
    label = next((name for name, found in features.items() if found.get("_type") == "ClassLabel"), label)
    return (nested or binary)[0], label, features.get(label, {}).get("names", [])


def _columns(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"
