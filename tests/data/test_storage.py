"""Storage reads what the index says and nothing else, whatever has happened to the files since."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from fastmae.data import DataError, errors
from fastmae.data.decode import UndecodableImage
from fastmae.data.storage import Files, Shards

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
        with pytest.raises(UndecodableImage, match=rf"changed since it was indexed: {size} bytes, 5000 expected"):
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
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    (tmp_path / "b").replace(tmp_path / "a")  # another file of this name: it is opened anew once the old one has failed
    assert shards.read("a", 4000, 1000, 0).tobytes() == content[4000:]
    (tmp_path / "a").unlink()
    os.mkfifo(tmp_path / "a")
    with pytest.raises(DataError, match=r"/a: .*not a regular file"):
        Shards(tmp_path).read("a", 0, 10, 0)


def test_few_shards_stay_open_while_many_threads_read(tmp_path, monkeypatch):
    monkeypatch.setattr("fastmae.data.storage._OPEN_SHARDS", 2)
    for i in range(6):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 100)
    shards, wrong = Shards(tmp_path), []
    before = len(list(Path("/proc/self/fd").iterdir()))

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 6, 200).tolist():
            if shards.read(f"{i}", 10, 50, i).tobytes() != bytes([i]) * 50:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
