"""Storage reads what the index says and nothing else, whatever has happened to the files since."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from loading import KINDS, assert_equal, take, write_source
from object_store import ObjectStore, serve

from fastmae.data import DataError, errors, open_dataset
from fastmae.data.decode import UndecodableImage
from fastmae.data.sources import find_source
from fastmae.data.storage import Files, Shards, as_url, open_reader
from fastmae.data.tar import parse_shard, shard_part, write_shard_index

TERABYTE = 1 << 40


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(errors, "PAUSES", (0.0,))


@pytest.fixture
def content(tmp_path) -> bytes:
    """Of the file ``a``."""
    data = np.random.default_rng(0).bytes(5000)
    (tmp_path / "a").write_bytes(data)
    return data


def test_files_and_shards_read_by_relative_and_absolute_name(tmp_path, content):
    for name in ("a", str(tmp_path / "a")):
        for storage in (Files(tmp_path), Shards(tmp_path)):
            assert storage.path(name) == str(tmp_path / "a")
        assert Files(tmp_path).read(name, 0, 5000, 0).tobytes() == content
        assert Shards(tmp_path).read(name, 7, 100, 0).tobytes() == content[7:107]


def test_a_file_that_has_changed_since_is_named_and_not_read(tmp_path, content):
    """A terabyte would be a MemoryError, a FIFO would hang."""
    for size in (TERABYTE, 4999, 0):
        os.truncate(tmp_path / "a", size)
        with pytest.raises(UndecodableImage, match=rf"changed since it was indexed: expected 5000 bytes, got {size}"):
            Files(tmp_path).read("a", 0, 5000, 0)
    (tmp_path / "a").unlink()
    with pytest.raises(DataError, match=r"/a: cannot be read after 2 tries.*No such file"):
        Files(tmp_path).read("a", 0, 5000, 0)
    os.mkfifo(tmp_path / "a")
    with pytest.raises(UndecodableImage, match="not a regular file"):
        Files(tmp_path).read("a", 0, 5000, 0)


def test_a_shard_that_has_changed_since_is_named_and_only_the_image_is_read(tmp_path, content):
    shards = Shards(tmp_path)
    os.truncate(tmp_path / "a", TERABYTE)
    assert shards.read("a", 4000, 1500, 0).tobytes() == content[4000:] + bytes(500)
    os.truncate(tmp_path / "a", 4100)
    with pytest.raises(DataError, match=r"/a: cannot be read after 2 tries: changed.*ends 900 bytes before the image"):
        shards.read("a", 4000, 1000, 0)
    (tmp_path / "b").write_bytes(content)
    (tmp_path / "b").replace(tmp_path / "a")  # another file of this name: it is opened anew once the old one has failed
    assert shards.read("a", 4000, 1000, 0).tobytes() == content[4000:]
    (tmp_path / "a").unlink()
    os.mkfifo(tmp_path / "a")
    with pytest.raises(DataError, match=r"/a: cannot be read after 2 tries"):
        Shards(tmp_path).read("a", 0, 10, 0)


def test_few_shards_stay_open_while_many_threads_read(tmp_path, monkeypatch):
    monkeypatch.setattr("fastmae.data.storage._OPEN_SHARDS", 2)
    for i in range(6):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 100)
    shards, ids = Shards(tmp_path), np.random.default_rng(0).integers(0, 6, 800).tolist()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda i: shards.read(f"{i}", 10, 50, i).tobytes(), ids))
    assert read == [bytes([i]) * 50 for i in ids]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


# Object stores


@pytest.fixture
def store(tmp_path, content) -> Iterator[ObjectStore]:
    with serve(tmp_path) as server:
        yield server


@pytest.mark.parametrize("fault", [503, 429, "reset", "short"])
def test_what_may_pass_is_retried(store, content, fault):
    store.faults.extend([fault] * 2)
    with pytest.raises(DataError, match=f"{store.url}/a: cannot be read after 2 tries"):
        Shards(store.url).read("a", 1000, 3000, 0)
    store.faults.append(fault)
    assert Shards(store.url).read("a", 1000, 3000, 0).tobytes() == content[1000:4000]
    assert not store.faults


@pytest.mark.parametrize(
    ("fault", "message"), [(403, "403"), (404, "no such object"), (416, "416"), ("whole", "the server ignores ranges")]
)
def test_what_will_not_pass_is_named_at_once(store, fault, message):
    store.faults.extend([fault, 200])
    with pytest.raises(DataError, match=f"{store.url}/a: .*{message}"):
        Shards(store.url).read("a", 1000, 3000, 0)
    assert list(store.faults) == [200]


def test_a_server_without_ranges_is_refused_before_a_body_has_come(store, tmp_path):
    os.truncate(tmp_path / "a", 1 << 26)
    store.always = "whole"
    with pytest.raises(DataError, match=f"{store.url}/a: .*support range requests"), open_reader(f"{store.url}/a"):
        pass
    assert store.sent < 1 << 26


def test_many_threads_share_connections_and_ask_for_the_image_alone(store, content):
    shards = Shards(store.url)
    places = [(7 * i, 50 + i) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda place: shards.read("a", *place, 0).tobytes(), places))
    assert read == [content[start : start + size] for start, size in places]
    assert sorted(store.requests) == [("a", start, size) for start, size in places]
    assert store.connections <= 8


def test_a_protocol_that_cannot_be_used_is_refused(monkeypatch):
    with pytest.raises(DataError, match=r"s4://bucket/a: .*Protocol not known.*pip install 'fastmae\[s3,gcs,http\]'"):
        Shards("s4://bucket").read("a", 0, 1, 0)
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(DataError, match=r"abfs://bucket/a: .*adlfs"):
        Shards("abfs://bucket").read("a", 0, 1, 0)


def test_urls_survive_being_paths():
    assert as_url(Path("s3://bucket/train")) == as_url("s3://bucket/train") == "s3://bucket/train"
    assert as_url(Path("/data/train")) is None
    assert as_url("c:/train") is None


@pytest.fixture
def packed(tmp_path) -> Path:
    """Three shards in folders, the second with its index beside it."""
    root = write_source("shards", tmp_path)
    (root / "more").mkdir()
    for path, name in zip(sorted(root.glob("*.tar")), ("a.tar", "b.tar", "more/c.tar"), strict=True):
        path.rename(root / name)
    write_shard_index(root / "b.tar")
    (root / "classes.txt").write_text("ant\nbee\n")
    return root


def test_shards_of_a_store_are_those_of_the_folder(packed, store, monkeypatch):
    """As a folder, as a list of names, as a local list of URLs, and one alone. Indexes beside them are used."""
    parsed = []
    monkeypatch.setattr("fastmae.data.tar.parse_shard", lambda place: parsed.append(place) or parse_shard(place))
    names = ["a.tar", "b.tar", "more/c.tar"]
    url = f"{store.url}/shards"
    (packed / "names.txt").write_text("# comment\n" + "\n".join(names))
    (packed / "urls.txt").write_text("\n".join(f"{url}/{name}" for name in names))
    expected = [shard_part(packed / name) for name in names]
    folder = find_source(url)
    assert (folder.root, folder.shards, folder.classes) == (url, names, ["ant", "bee"])
    for source in (folder, find_source(f"{url}/names.txt"), find_source(packed / "urls.txt")):
        parsed.clear()
        for found, part in zip(source.parts(None, 2, None), expected, strict=True):
            assert np.array_equal(found.rows, part.rows)
            assert (found.names, found.bad) == (part.names, part.bad)
        assert sorted(parsed) == [f"{url}/a.tar", f"{url}/more/c.tar"]
    assert find_source(f"{url}/more/c.tar").shards == ["c.tar"]
    store.faults.append(403)  # how stores that may not be listed say that there is none
    assert find_source(url).classes == []
    before = folder.fingerprint()
    assert find_source(url).fingerprint() == before
    os.utime(packed / "a.tar")
    assert find_source(url).fingerprint() != before


def test_indexing_survives_failures_and_reports_a_shard_that_is_none(packed, store, monkeypatch):
    monkeypatch.setattr("fastmae.data.storage._AHEAD", 1)  # a request per header
    store.faults.extend([503, None, "reset", None, "short", None] * 3)
    assert [len(part.rows) for part in find_source(f"{store.url}/shards").parts(None, 1, None)] == [4, 4, 3]
    os.truncate(packed / "a.tar", 3000)
    with pytest.raises(DataError, match=f"{store.url}/shards/a.tar: expected a whole, plain tar file"):
        list(find_source(f"{store.url}/shards").parts(None, 1, None))


def test_what_is_no_shard_in_a_store_is_refused(store, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"images: expected .tar shards, found 1 other objects, such as a.jpg.*data shard"
    ):
        find_source(f"{store.url}/images")
    with pytest.raises(DataError, match=r"memory://nothing: expected \.tar shards, found nothing"):
        find_source("memory://nothing")
    for names, message in (
        ("s3://bucket/a.tar\ns3://bucket/b.jpg\n", r"1 images \(s3://bucket/b.jpg, ...\) and 1 .tar files"),
        ("s3://bucket/b.jpg\n", r"expected .tar shards, found s3://bucket/b.jpg.*data shard"),
    ):
        (tmp_path / "list.txt").write_text(names)
        with pytest.raises(DataError, match=message):
            find_source(tmp_path / "list.txt")
    with pytest.raises(DataError, match=r"list.txt: expected a list of .tar shards, found s3://bucket/b.jpg in it"):
        find_source(f"{store.url}/list.txt")


@pytest.mark.parametrize("kind", KINDS)
def test_both_loaders_give_the_batches_of_local_shards(packed, store, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    local, remote = open_dataset(packed), open_dataset(f"{store.url}/shards")
    assert (remote.hash, remote.name, remote.classes) == (local.hash, "shards", ["ant", "bee"])
    assert remote.path(9) == f"{store.url}/shards/more/c.tar::09.jpg"
    expected = take(local, kind, 3, cache_bytes=0)
    store.requests.clear()
    trusted = open_dataset(f"{store.url}/shards", index=remote.index.folder)
    assert store.requests == []
    assert_equal(take(trusted, kind, 3, cache_bytes=0), expected)
    assert sorted(tmp_path.glob("http*")) == []  # nothing takes the URL for a path
