"""Tar shards and list files: what is read, by whom it is labelled, and that nothing of a tar becomes a path."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from loading import image_file, noise

from fastmae.data import DataError, errors, open_dataset
from fastmae.data.tar import parse_shard, read_shard_index, split_key, write_shard_index


def jpeg(seed: int = 0, size: tuple[int, int] = (20, 30)) -> bytes:
    return image_file("JPEG", noise(*size, seed))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path) -> Path:
    root = tmp_path / "shards"
    root.mkdir()
    for shard in range(2):
        members: dict[str, bytes] = {}
        for i in range(3):
            members[f"train/{shard}{i}.jpg"] = jpeg(10 * shard + i, size=(20 + i, 30 + shard))
            members[f"train/{shard}{i}.cls"] = b"%d\n" % i
            members[f"train/{shard}{i}.json"] = b"{}"
        write_tar(root / f"train-{shard:06}.tar", members)
    return root


def test_shards_are_read_by_position_and_indexed_ones_open_unread(shards, cache, monkeypatch):
    plain = open_dataset(shards, cache_dir=cache / "plain")
    for path in sorted(shards.glob("*.tar")):
        assert write_shard_index(path) == path.with_name(path.name + ".index.npz")
    monkeypatch.setattr("fastmae.data.tar.parse_shard", lambda path: pytest.fail(f"{path} was parsed"))
    indexed = open_dataset(shards, cache_dir=cache / "indexed")
    assert indexed.hash == plain.hash
    for dataset in (plain, indexed):
        assert (len(dataset), dataset.name) == (6, "shards")
        assert dataset.path(4) == f"{shards}/train-000001.tar::train/11.jpg"
        assert dataset.labels(np.arange(6)).tolist() == [0, 1, 2] * 2
        assert [dataset.shape(i) for i in (0, 5)] == [(20, 30), (22, 31)]
        for shard in range(2):
            for i in range(3):
                assert dataset.read(3 * shard + i).tobytes() == jpeg(10 * shard + i, size=(20 + i, 30 + shard))
        assert dataset.decode(5).shape == (22, 31, 3)


def test_an_index_of_another_shard_is_not_used(shards, cache):
    path = shards / "train-000000.tar"
    index = write_shard_index(path)
    assert read_shard_index(path) is not None
    content = path.read_bytes()
    write_tar(path, {"other/00.jpg": jpeg(7), "x.txt": b""})
    os.truncate(path, len(content))  # of the same size
    assert read_shard_index(path) is None
    assert open_dataset(shards, cache_dir=cache).path(0).endswith("::other/00.jpg")
    path.write_bytes(content)
    assert read_shard_index(path) is not None
    for damaged in (b"", index.read_bytes()[:200], index.read_bytes()[:-3], b"x" * 300):
        index.write_bytes(damaged)
        assert read_shard_index(path) is None


def test_a_single_tar_class_names_and_a_list_of_shards(shards, cache):
    (shards / "classes.txt").write_text("ant\nbee\ncat\n")
    (shards / "half.txt").write_text("train-000001.tar\n")
    for name in ("train-000001.tar", "half.txt"):
        dataset = open_dataset(shards / name, cache_dir=cache)
        assert len(dataset) == 3
        assert dataset.path(0) == f"{shards}/train-000001.tar::train/10.jpg"
        if name.endswith(".tar"):
            assert dataset.classes == ["ant", "bee", "cat"]
    (shards / "half.txt").write_text("train-000001.tar\ntrain-000009.tar\n")
    with pytest.raises(DataError, match="train-000009"):
        open_dataset(shards / "half.txt", cache_dir=cache)


def test_bad_members_are_flagged(tmp_path, cache):
    members = {"good.jpg": jpeg(0), "cut.jpg": jpeg(1)[:-200], "empty.png": b"", "text.png": b"hello",
               "movie.gif": b"GIF89a" + bytes(40), "seg.mask.png": jpeg(2), "notes.txt": b"text"}  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    write_shard_index(path)
    for cache_dir in (cache / "1", cache / "2"):
        dataset = open_dataset(path, max_bad_fraction=0.9, cache_dir=cache_dir)
        assert [bad.reason.split(":")[0].split(" is ")[0] for bad in dataset.bad] == [
            "truncated", "empty file", "not a JPEG, PNG, WebP, TIFF or NumPy (.npy) file", "GIF"
        ]  # fmt: skip
        assert len(dataset) == 5  # what goes with an image, as a mask or a text, is none
        path.with_name("a.tar.index.npz").unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"(?s)4 of 5 images.*a\.tar::cut\.jpg: truncated"):
        open_dataset(path, cache_dir=cache)


def test_what_is_no_whole_plain_tar_is_refused(shards, cache, tmp_path):
    path = shards / "train-000001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        second = tar.getmembers()[3]
    cuts = [whole[:size] for size in (second.offset + 100, second.offset_data + 100, second.offset)]
    for content in (b"", b"no tar at all" * 100, *cuts):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train-000001\.tar: expected a whole, plain tar file"):
            open_dataset(shards, cache_dir=cache)
    path.write_bytes(whole)
    (shards / "preview.jpg").write_bytes(jpeg())
    with pytest.raises(DataError, match=r"1 images \(preview\.jpg.*2 \.tar files"):
        open_dataset(shards, cache_dir=cache)
    only = tmp_path / "compressed"
    only.mkdir()
    with tarfile.open(only / "a.tar.gz", "w:gz") as tar:
        tar.add(shards / "train-000000.tar", "x.jpg")
    for compressed in (only, only / "a.tar.gz"):
        with pytest.raises(DataError, match="compressed"):
            open_dataset(compressed, cache_dir=cache)


def test_a_shard_that_shrinks_is_a_clear_error(shards, cache, monkeypatch):
    monkeypatch.setattr(errors, "PAUSES", (0.0,))
    dataset = open_dataset(shards, cache_dir=cache)
    path = shards / "train-000001.tar"
    os.truncate(path, 1000)
    with pytest.raises(DataError, match=r"train-000001\.tar.*after 2 tries.*before the image does"):
        dataset.read(5)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        dataset.read(3)


def test_reading_from_many_threads_with_few_shards_open(shards, cache, monkeypatch):
    monkeypatch.setattr("fastmae.data.tar._OPEN_SHARDS", 1)
    dataset = open_dataset(shards, cache_dir=cache)
    expected, wrong = [dataset.read(i).tobytes() for i in range(6)], []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 6, 100).tolist():
            if dataset.read(i).tobytes() != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_keys_and_label_members(tmp_path):
    assert split_key("a/b.c/0001.seg.PNG") == ("a/b.c/0001", ".seg.png")
    assert split_key("noext") == ("noext", "")
    members = {"a.jpg": jpeg(), "a.cls": b"7", "b.jpg": jpeg(), "b.cls": b"seven", "c.jpg": jpeg()}
    part = parse_shard(write_tar(tmp_path / "a.tar", members))
    assert part.rows["label"].tolist() == [7, -1, -1]


def test_a_list_file(tmp_path, cache):
    (tmp_path / "images" / "b").mkdir(parents=True)
    for name in ("a.jpg", "b/c d.jpg"):
        (tmp_path / "images" / name).write_bytes(jpeg())
    (tmp_path / "elsewhere.jpg").write_bytes(jpeg(1))
    path = tmp_path / "images" / "list.tsv"
    path.write_text(f"# a comment\na.jpg\tdog\n\nb/c d.jpg\tcat\n{tmp_path / 'elsewhere.jpg'}\na.jpg\tdog\n")
    dataset = open_dataset(path, cache_dir=cache)
    assert [dataset.path(i) for i in range(4)] == [
        str(tmp_path / "images" / "a.jpg"),
        str(tmp_path / "images" / "b" / "c d.jpg"),
        str(tmp_path / "elsewhere.jpg"),
        str(tmp_path / "images" / "a.jpg"),
    ]
    assert dataset.classes == ["cat", "dog"]
    assert dataset.labels(np.arange(4)).tolist() == [1, 0, -1, 1]
    assert dataset.read(2).tobytes() == jpeg(1)
    path.write_text("a.jpg\t3\nb/c d.jpg\t12\n")
    assert open_dataset(path, cache_dir=cache).labels(np.arange(2)).tolist() == [3, 12]


def test_a_list_of_what_is_not_there_or_no_image(tmp_path, cache):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "notes.md").write_text("hello")
    (tmp_path / "list.txt").write_text("a.jpg\ngone.jpg\nnotes.md\n")
    dataset = open_dataset(tmp_path / "list.txt", max_bad_fraction=0.7, cache_dir=cache)
    assert [bad.reason for bad in dataset.bad] == ["no such file", "not an image"]
    (tmp_path / "list.txt").write_text("\n# nothing\n")
    with pytest.raises(DataError, match="a path a line, found none"):
        open_dataset(tmp_path / "list.txt", cache_dir=cache)
