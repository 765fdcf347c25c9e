"""Tar shards and list files: what is read, by whom it is labelled, and that nothing of a tar becomes a path."""

from __future__ import annotations

import io
import itertools
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from loading import image_file, noise

from fastmae.data import DataError, open_dataset
from fastmae.data.tar import (
    DAMAGE,
    Member,
    Reader,
    members,
    parse_shard,
    read_shard_index,
    split_key,
    write_shard_index,
)


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
    for content in (b"", b"no tar at all" * 100, b"no tar at all" * 100 + bytes(1024), *cuts):
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


NAMES = ["a/b.jpg", "x" * 96 + ".jpg", "d" * 120 + "/" + "y" * 90 + ".jpg", "ü/图.png", "folder/", "z" * 300 + ".png",
         "undecodable\udcff.jpg", "q" * 5000 + ".jpg"]  # fmt: skip
SPECIAL = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]


def archive(format_: int) -> bytes:
    """Names and sizes of all kinds, as far as the format has them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_, errors="surrogateescape") as tar:
        for i, name in enumerate(NAMES if format_ != tarfile.USTAR_FORMAT else NAMES[:5]):
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            else:
                info.size = (0, 1, 511, 512, 513)[i % 5]
            tar.addfile(info, io.BytesIO(bytes(range(256)) * 3))
        for kind in (*SPECIAL, tarfile.CONTTYPE):
            info = tarfile.TarInfo("special.jpg")
            info.type, info.linkname = kind, "l" * 100
            tar.addfile(info)
        info = tarfile.TarInfo("last.jpg")
        info.size, info.pax_headers = 7, {"path": "renamed.jpg", "comment": "two\nlines"}
        tar.addfile(info, io.BytesIO(b"1234567"))
    return file.getvalue()


def read_members(content: bytes) -> list[Member]:
    """The members. Each byte is read a few times at most: the time depends on the size, not on what headers claim."""
    count = 0

    def read(offset: int, size: int) -> bytes:
        nonlocal count
        data = content[offset : offset + size]
        count += len(data)
        assert count <= 16 * len(content) + 65536
        return data

    return list(members(Reader("memory.tar", len(content), read)))


def signed(header: bytes) -> bytes:
    """A header with the checksum that it should have."""
    return header[:148] + b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:])) + header[156:]


def block(name: bytes, size: bytes | int = 0, kind: bytes = b"0") -> bytes:
    """The header of a member, whatever its size field holds."""
    size = b"%011o\0" % size if isinstance(size, int) else size
    return signed((name.ljust(124, b"\0") + size.ljust(32, b"\0") + kind).ljust(512, b"\0"))


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(format_):
    content = archive(format_)
    with tarfile.open(fileobj=io.BytesIO(content), errors="surrogateescape") as tar:
        expected = [(os.fsencode(info.name), info.offset_data, info.size) for info in tar if info.isreg()]
    found = read_members(content)
    assert [tuple(member[:3]) for member in found if not member.kind] == expected
    assert [member.kind for member in found if member.name == b"special.jpg"][:4] == [
        "symbolic link", "hard link", "pipe", "device"
    ]  # fmt: skip


def test_concatenated_archives_and_members_behind_damage_are_found(shards, cache):
    first, second = (path.read_bytes() for path in sorted(shards.glob("*.tar")))
    path = shards / "joined.tar"
    path.write_bytes(first + second)
    part = parse_shard(path)
    assert (len(part.rows), part.bad) == (6, {})
    with tarfile.open(path) as tar:
        lost, after = tar.getmembers()[3], tar.getmembers()[4]
    for size, what in itertools.product((512, 700), (b"\0", b"?")):
        content = bytearray(first + second)
        content[lost.offset : lost.offset + size] = what * size
        path.write_bytes(content)
        stretch = f"{path}::bytes {lost.offset} to {after.offset}"
        dataset = open_dataset(path, max_bad_fraction=0.2, cache_dir=cache)
        assert [dataset.path(i).rpartition("/")[2] for i in (0, 2, 5)] == ["00.jpg", "02.jpg", "12.jpg"]
        ((name, reason),) = dataset.bad
        assert name == stretch
        assert reason.startswith(f"damaged tar: {after.offset - lost.offset} bytes are not understood")
        with pytest.raises(DataError, match=f"1 of 6 images cannot be used:\n  {stretch}"):
            open_dataset(path, cache_dir=cache)


def test_metadata_that_make_no_sense_are_reported_or_refused():
    image = block(b"b.jpg", 3) + padded(b"abc")
    end = bytes(1024)
    for records in (b"14 size=-1536\n", b"9 size=x\n", b"0 a=b\n", b"-9 a=b\n", b"99999999 a=b\n", b"5 a=b\n",
                    b"x" * 600, b"40 size=%s\n" % (b"9" * 31), b"6 a=b\n7 ab=\n"):  # fmt: skip
        damaged = block(b"pax", len(records), b"x") + padded(records)
        found = read_members(image + damaged + image + end)
        assert [(member.name, member.kind) for member in found] == [
            (b"b.jpg", ""), (b"bytes 1024 to %d" % (1024 + len(damaged)), DAMAGE), (b"b.jpg", "")
        ]  # fmt: skip
    records = b"9 size=3\n14 path=a.png\n"
    content = block(b"pax", len(records), b"x") + padded(records) + block(b"b.jpg") + padded(b"abc") + end
    assert [member[::2] for member in read_members(content)] == [(b"a.png", 3)]
    for kind in (b"L", b"x", b"g"):
        content = image + block(b"long", 2 << 20, kind) + image + end
        assert [member.kind for member in read_members(content)] == ["", DAMAGE, ""]
    for size in (b"77777777777", b"\x80" + b"\xff" * 11, 1 << 20):
        for kind in (b"0", b"L", b"S"):
            if kind == b"0" or size == 1 << 20:
                with pytest.raises(DataError, match=r"memory\.tar: expected a whole, .* ends at byte"):
                    read_members(image + block(b"huge", size, kind) + image + end)
    damaged = block(b"long", 8, b"L") + padded(b"other.jpg")[:512] + b"?" * 512
    assert [member.name for member in read_members(damaged + image + end)] == [b"bytes 1024 to 1536", b"b.jpg"]
    folder = block(b"folder of an old tar/", 3, b"\0")
    assert [member.kind for member in read_members(folder + image + end)] == ["folder", ""]
    for content in (block(b"negative", b"\xff" * 12), bytes(512)):  # zeros: the header of an empty file
        assert [member.kind for member in read_members(image + content + image + end)] == ["", DAMAGE, ""]


def test_members_that_are_no_plain_files_are_skipped_by_name(tmp_path, caplog):
    path = tmp_path / "a.tar"
    records = b"22 GNU.sparse.major=1\n"
    pax = block(b"pax", len(records), b"x") + padded(records)
    links = b"".join(block(b"link.jpg", kind=kind) for kind in SPECIAL)
    image = padded(jpeg())
    good = block(b"good.jpg", len(jpeg())) + image
    sparse = block(b"old.jpg", 3, b"S") + padded(b"abc") + pax + block(b"new.jpg", 3) + padded(b"abc")
    path.write_bytes(sparse + links + good + bytes(1024))
    part = parse_shard(path)
    assert (part.names, part.bad) == (b"good.jpg", {})
    assert f"{path}: skipped 6 members that are no plain files, the first 'old.jpg' (sparse file)" in caplog.text


def test_whatever_is_damaged_ends_in_members_or_a_data_error():
    draw = random.Random(0)
    wholes = [archive(format_) for format_ in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    fields = [b"-1536", b"7" * 11, b"\x80" + b"\xff" * 11, b"\xff" * 12, *(bytes([kind]) for kind in b"SxLg9\0"), b""]
    outcomes = set()
    for _ in range(1000):
        content = bytearray(draw.choice(wholes))
        for _ in range(draw.choice([1, 1, 2, 20])):
            start = 512 * draw.randrange(len(content) // 512)
            match draw.randrange(6):
                case 0:
                    content[draw.randrange(len(content))] = draw.randrange(256)
                case 1:
                    content[start : start + 512] = draw.choice([bytes(512), draw.randbytes(512)])
                case 2 if len(content) > 4096:
                    del content[draw.randrange(1024, len(content)) :]
                case 3:
                    content[start:start] = content[512 * draw.randrange(len(content) // 512) :][:512]
                case _:  # a valid header, but of something else
                    field, at = draw.choice(fields), start + draw.choice([0, 124, 156, 345, 482])
                    content[at : at + len(field)] = field
                    content[start : start + 512] = signed(content[start : start + 512].ljust(512, b"\0"))
        try:
            found = read_members(bytes(content))
            assert all(0 <= member.offset <= member.offset + member.size <= len(content) for member in found)
            outcomes.add(any(member.kind == DAMAGE for member in found))
        except DataError as error:
            outcomes.add(type(error))
    assert outcomes == {True, False, DataError}
    assert len(read_members((block(b"a.txt") + b"?" * 512) * 4000 + bytes(1024))) == 8000
    assert len(read_members(block(b"pax", 1 << 20, b"x") * 8192 + bytes(4096))) == 4


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
    with pytest.raises(DataError, match="one path per line, found none"):
        open_dataset(tmp_path / "list.txt", cache_dir=cache)
