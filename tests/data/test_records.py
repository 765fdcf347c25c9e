"""Map-style data sets, Hugging Face's and Parquet files: the same images as from files, by number."""

from __future__ import annotations

import sys
from functools import partial
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from loading import KINDS, assert_equal, image_file, noise, rotated, take
from PIL import Image

from fastmae.data import DataError, errors, open_once, records
from fastmae.data.decode import UndecodableImage, decode
from fastmae.data.records import ParquetRecords, RecordSource, TorchRecords, as_records, source_at

COUNT = 12
FILES = [image_file(("JPEG", "PNG", "WEBP")[i % 3], noise(30 + i, 40, i)) for i in range(COUNT)]
LABELS = [i % 3 for i in range(COUNT)]


class Plain:
    """The narrow protocol."""

    fingerprint, classes = "1", ["ant", "bee", "cat"]

    def __init__(self):
        self.files = list(FILES)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, i: int) -> bytes:
        if isinstance(self.files[i], Exception):
            raise self.files[i]
        return self.files[i]

    def label(self, i: int) -> int:
        return LABELS[i]


@pytest.fixture
def hugging_face():
    features = datasets.Features(
        {"id": datasets.Value("int32"), "label": datasets.ClassLabel(names=Plain.classes), "image": datasets.Image()}
    )
    images = [{"bytes": data, "path": None} for data in FILES]
    columns = {"id": list(range(COUNT)), "label": LABELS, "image": images}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def parquet(hugging_face, tmp_path) -> Path:
    """Two files, of row groups of three rows and of one."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    for i in range(2):
        part = hugging_face.select(range(6 * i, 6 * i + 6))
        part.to_parquet(folder / f"train-{i:05}-of-00002.parquet", batch_size=3)
    return folder


def rows(source: RecordSource) -> list[tuple]:
    """What an index would hold."""
    parts = list(source.parts(None, 2, None))
    names = b"".join(part.names for part in parts)
    assert names == b"".join(b"%d" % i for i in range(len(source)))
    return [row[1:] for part in parts for row in part.rows.tolist()]  # the name's place counts from its part


def test_every_kind_gives_the_same_rows_and_bytes(hugging_face, parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_PART", 5)
    hugging_face.save_to_disk(tmp_path / "saved")
    found = {path: source_at(path) for path in (tmp_path / "saved", parquet, parquet / "train-*.parquet")}
    sources = [RecordSource(as_records(source)) for source in (Plain(), hugging_face)] + list(found.values())
    expected = rows(sources[0])
    for source in sources:
        assert rows(source) == expected
        assert source.classes == Plain.classes
        storage = source.storage(COUNT)
        for i in (5, 11, 0, 7):
            assert storage.read(str(i), 0, len(FILES[i]), i).tobytes() == FILES[i]
        with pytest.raises(UndecodableImage, match="changed since it was indexed: expected 7 bytes"):
            storage.read("2", 0, 7, 2)
    numbered = as_records(hugging_face.cast_column("label", datasets.Value("int64")))
    assert (numbered.label(5), numbered.classes) == (2, [])
    for path, source in found.items():
        assert source.storage(COUNT).path("3") == f"{path}[3]"
        assert source_at(path).fingerprint() == source.fingerprint()
        assert source_at(path).fingerprint(1) != source.fingerprint()


def test_pixels_of_a_torch_data_set_pass_unchanged():
    colour, grey = noise(20, 30), noise(20, 30)[..., 0]
    wide, floats = grey.astype(np.uint16) * 257, colour.astype(np.float32) / 255
    turned = Image.open(BytesIO(image_file("PNG", colour, exif=rotated(6))))
    images = [
        (Image.fromarray(colour), colour), (Image.fromarray(colour).convert("RGBA"), colour),
        (Image.fromarray(grey), grey), (Image.fromarray(wide), wide), (colour, colour), (floats, floats),
        (torch.from_numpy(colour).permute(2, 0, 1), colour), (torch.from_numpy(grey), grey),
        (turned, np.rot90(colour, -1)),
    ]  # fmt: skip
    source = RecordSource(as_records([(image, label) for (image, _), label in zip(images, LABELS, strict=False)]))
    assert [part.rows["label"].tolist() for part in source.parts(None, 1, None)] == [LABELS[: len(images)]]
    for i, (_, expected) in enumerate(images):
        stored = np.load(BytesIO(source.records.read(i)))
        assert stored.dtype == expected.dtype
        assert np.array_equal(stored, expected)
    assert np.array_equal(decode(np.frombuffer(source.records.read(0), np.uint8)), colour)
    encoded = TorchRecords([FILES[0], (FILES[1], "a caption")], fingerprint="1")  # files already, without classes
    assert (encoded.read(0), encoded.label(0), encoded.label(1), encoded.fingerprint) == (FILES[0], -1, -1, "1")
    assert TorchRecords([]).fingerprint != TorchRecords([]).fingerprint


def test_bad_records_are_flagged_and_errors_of_reading_retried(monkeypatch):
    monkeypatch.setattr(errors, "PAUSES", (0.0,))
    source = Plain()
    source.files[3:6] = [b"", ValueError("no image here"), b"GIF89a" + bytes(40)]
    part = next(RecordSource(source).parts(None, 1, None))
    assert sorted(part.bad) == [3, 4, 5]
    assert part.bad[4] == "cannot be read: ValueError('no image here')"
    assert part.rows["bad"].nonzero()[0].tolist() == [3, 4, 5]
    source.files[8] = OSError("the disk is away")
    for read in (
        lambda: list(RecordSource(source, Path("x")).parts(None, 1, None)),
        lambda: RecordSource(source, Path("x")).read("8", 0, 9, 8),
    ):
        with pytest.raises(DataError, match=r"x\[8\]: cannot be read after 2 tries: the disk is away"):
            read()


def test_a_length_that_changes_is_refused():
    source = Plain()
    indexed = RecordSource(source, Path("x"))
    source.files.append(FILES[0])
    for read in (lambda: list(indexed.parts(None, 1, None)), lambda: indexed.read("0", 0, len(FILES[0]), 0)):
        with pytest.raises(DataError, match=r"x: had 12 images and now has 13"):
            read()


def test_what_is_no_map_style_data_set_is_refused(hugging_face, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield FILES[0]

    for source in (Stream(), hugging_face.to_iterable_dataset(), iter(FILES), {"a": 1}):
        with pytest.raises(DataError, match="expected a map-style data set"):
            as_records(source)
    splits = datasets.DatasetDict({"train": hugging_face, "test": hugging_face})
    with pytest.raises(DataError, match="expected one split, got train, test"):
        as_records(splits)
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"expected one split of it: .*/splits/test, .*/splits/train"):
        source_at(tmp_path / "splits")
    with pytest.raises(DataError, match="expected a column of images, found id"):
        as_records(hugging_face.select_columns("id"))


def test_parquet_files_that_cannot_be_used_are_refused(hugging_face, parquet):
    path = parquet / "train-00001-of-00002.parquet"
    hugging_face.select_columns(["id", "label"]).to_parquet(path)
    for named in (parquet, path):
        with pytest.raises(DataError, match=r"00001-of-00002\.parquet: expected a column of images.*found id, label"):
            source_at(named)
    hugging_face.remove_columns("label").to_parquet(path)
    with pytest.raises(DataError, match="expected the columns and class names of"):
        source_at(parquet)
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"00001-of-00002\.parquet: expected a Parquet file"):
        source_at(parquet)
    path.rename(parquet / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"holds several splits; expected one, such as .*/test-\*\.parquet"):
        source_at(parquet)


def test_row_groups_are_read_once_while_they_fit_and_in_windows_beyond(parquet, monkeypatch):
    files, loads = sorted(parquet.iterdir()), []
    read_group = ParquetRecords._read_group
    monkeypatch.setattr(ParquetRecords, "_read_group", lambda self, n: loads.append(n) or read_group(self, n))
    everything, metadata = ParquetRecords(files), [pq.read_metadata(file) for file in files]
    largest = max(found.row_group(g).total_byte_size for found in metadata for g in range(2))
    assert list(everything.blocks.values()) == [3] * 4
    for found, expected in ((everything, [0, 1, 2, 3]), (ParquetRecords(files, 2 * largest), [0, 1, 2, 3] * 2)):
        loads.clear()
        for _ in range(2):
            list(RecordSource(found).parts(None, 1, None))
        assert sorted(loads) == sorted(expected)
        assert found.window == (None if found is everything else 1)
    loads.clear()
    for group in (0, 1, 0, 2, 0):  # the group used last stays
        found.read(3 * group)
    assert loads == [0, 1, 2]
    with pytest.raises(DataError, match=r"-of-00002\.parquet row group \d: .*expected at most .*row_group_size"):
        ParquetRecords(files, largest // 2)


def test_a_package_that_is_missing_is_named(parquet, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'fastmae\[datasets\]'"):
        source_at(parquet)


@pytest.mark.parametrize("kind", KINDS)
def test_both_loaders_give_the_batches_of_files(hugging_face, parquet, open_, tmp_path, kind):
    (tmp_path / "files").mkdir()
    for i, data in enumerate(FILES):
        (tmp_path / "files" / f"{i:02}").write_bytes(data)
    expected = take(open_(tmp_path / "files"), kind, 3, cache_bytes=0)
    for source in (Plain(), hugging_face, parquet):
        dataset = open_(source)
        assert dataset.labels(np.arange(COUNT)).tolist() == LABELS
        assert_equal(take(dataset, kind, 3, cache_bytes=0), expected)
    assert dataset.order(0).ids(np.arange(COUNT))[0].tolist() != dataset.order(1).ids(np.arange(COUNT))[0].tolist()
    windows = open_(parquet, window=1).order(0).ids(np.arange(COUNT))[0].reshape(4, 3)
    assert sorted(np.sort(windows).tolist()) == np.arange(COUNT).reshape(4, 3).tolist()  # a row group at a time


def test_an_index_that_is_kept_is_used_and_one_of_other_records_refused(parquet, open_, tmp_path, monkeypatch):
    first = open_(parquet, index=tmp_path / "index")
    monkeypatch.setattr(RecordSource, "parts", lambda *_: pytest.fail("read again"))
    assert open_(parquet, index=tmp_path / "index").hash == first.hash
    (parquet / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"parquet: has 6 images, its index 12"):
        open_(parquet, index=tmp_path / "index")


def test_other_ranks_open_the_index_that_the_first_has_published(open_, monkeypatch):
    first, second = (partial(open_, [(noise(20, 30, i), i) for i in range(COUNT)]) for _ in range(2))
    published = open_once(first, lambda lead: lead())
    monkeypatch.setattr(RecordSource, "parts", lambda *_: pytest.fail("read again"))
    other = open_once(second, lambda lead: (published.index.folder, published.hash))
    assert other.hash == published.hash
    assert other.read(5).tobytes() == published.read(5).tobytes()
