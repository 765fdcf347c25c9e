"""Packing into shards: what they hold; equal sources give equal bytes, also after kills and on a bad disk."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import resource
import signal
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from distributed import start_process
from loading import needs_dali, noise, png, rotated, save_16_bit, smooth
from PIL import Image
from sharding import by_source, contents, members, write_source

from fastmae.data import DataError, open_dataset, processes
from fastmae.data import shards as shards_module
from fastmae.data.inspect import measure
from fastmae.data.processes import Workers
from fastmae.data.shards import MANIFEST, ShardOptions, store_image, write_shards
from fastmae.data.tar import read_shard_index

OPTIONS = ShardOptions(short_side=50, images_per_shard=5)


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


def test_bytes_labels_and_classes_survive_in_plain_tars_with_an_index_and_a_manifest(source, open_, tmp_path):
    dataset, out = open_(source), tmp_path / "out"
    packed = write_shards(dataset, out, ShardOptions(images_per_shard=9))
    assert (packed.shards, packed.images, packed.encoded, packed.bad) == (3, 20, 0, 0)
    assert packed.source_bytes == sum(path.stat().st_size for path in source.rglob("*.jpg"))
    assert packed.bytes == sum(path.stat().st_size for path in out.glob("*.tar"))
    shards = open_(out)
    assert shards.classes == ["cats", "dogs"]
    for i in range(20):
        number = int(shards.path(i).rpartition("::")[2][:9])
        assert shards.read(i).tobytes() == dataset.read(number).tobytes()
        assert shards.labels(np.array([i])) == dataset.labels(np.array([number]))
        assert shards.shape(i) == dataset.shape(number)
    found = members(out)
    assert sorted(by_source(out)) == list(range(20))
    assert (len(found), found["000000010-dogs_01.cls"]) == (40, b"1")
    manifest = json.loads((out / "shards.json").read_text())
    assert [shard["images"] for shard in manifest["shards"]] == [6, 7, 7]
    for shard in manifest["shards"]:
        path = out / shard["name"]
        assert len(read_shard_index(path).rows) == shard["images"]
        assert path.stat().st_size == shard["bytes"]
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                assert (member.uid, member.gid, member.mtime, member.mode, member.isreg()) == (0, 0, 0, 0o644, True)
                assert (member.offset_data % 512, member.pax_headers) == (0, {})
    assert not [name for name in contents(out) if name.startswith(".")]
    write_shards(shards, tmp_path / "again", ShardOptions(images_per_shard=3))  # shards are a source too
    again = open_(tmp_path / "again")
    assert sorted(again.read(i).tobytes() for i in range(20)) == sorted(shards.read(i).tobytes() for i in range(20))
    assert again.classes == shards.classes
    assert sorted(again.labels(np.arange(20))) == [0] * 10 + [1] * 10


@needs_dali
def test_a_webdataset_reader_of_others_finds_the_samples(source, open_, tmp_path):
    import nvidia.dali.fn as fn
    from nvidia.dali import pipeline_def

    write_shards(open_(source), tmp_path / "out", ShardOptions(images_per_shard=20))

    @pipeline_def(batch_size=20, num_threads=1, device_id=None)
    def read():
        images, labels = fn.readers.webdataset(paths=[str(tmp_path / "out/shard-000000.tar")], ext=["jpg", "cls"])
        return images, labels

    pipeline = read()
    pipeline.build()
    images, labels = ([bytes(np.asarray(batch.at(i))) for i in range(20)] for batch in pipeline.run())
    found = members(tmp_path / "out")
    assert images == [data for name, data in found.items() if name.endswith(".jpg")]
    assert labels == [data for name, data in found.items() if name.endswith(".cls")]


def test_equal_bytes_for_any_number_of_threads_and_another_order_for_another_seed(source, open_, tmp_path):
    def pack(name: str, num_workers: int, **options) -> Path:
        write_shards(open_(source), tmp_path / name, ShardOptions(short_side=48, **options), num_workers=num_workers)
        return tmp_path / name

    first = pack("first", 1)
    assert contents(first) == contents(pack("second", 5))
    other, sorted_ = pack("other", 2, shuffle_seed=1), pack("sorted", 2, shuffle_seed=None)
    orders = [list(by_source(folder)) for folder in (first, other, sorted_)]
    assert orders[2] == list(range(20))
    assert len(set(map(tuple, orders))) == 3
    assert members(first) == members(other) == members(sorted_)
    assert list(members(sorted_))[:3] == ["000000000-cats_00.jpg", "000000000-cats_00.cls", "000000001-cats_02.jpg"]


def test_photographs_are_shrunk_upright_and_nothing_else_is(open_, tmp_path):
    root = tmp_path / "mixed"
    root.mkdir()
    wide = Image.fromarray(smooth(120, 200, 0))
    wide.save(root / "a_wide.jpg", quality=95, exif=rotated(6), icc_profile=b"profile")
    wide.convert("L").save(root / "b_grey.png")
    wide.convert("CMYK").save(root / "c_cmyk.jpg")
    wide.convert("RGBA").save(root / "d_alpha.png")
    wide.save(root / "e_lossy.webp")
    save_16_bit(root / "f_grey16.png", smooth(120, 200, 2)[..., 0])
    Image.fromarray(smooth(120, 200, 0)).save(root / "g_array.tif")
    np.save(root / "h_array.npy", smooth(120, 200, 0))
    Image.fromarray(smooth(50, 300, 1)).save(root / "i_low.png")
    dataset = open_(root)
    assert dataset.bad == []
    packed = write_shards(dataset, tmp_path / "out", ShardOptions(short_side=64))
    assert (packed.images, packed.encoded) == (9, 5)
    stored = by_source(tmp_path / "out")
    suffixes = [stored[i][0] for i in range(9)]
    assert suffixes == [".jpg"] * 5 + [".png", ".tif", ".npy", ".png"]
    for i in range(5, 9):
        assert stored[i][1] == dataset.read(i).tobytes()
    for i in range(5):
        image = Image.open(io.BytesIO(stored[i][1]))
        assert image.size == ((64, 107) if i == 0 else (107, 64))
        assert image.mode == ("L" if i == 1 else "RGB")
        assert not image.getexif()
        assert "icc_profile" not in image.info
        pixels = Image.fromarray(np.ascontiguousarray(dataset.decode(i)))
        expected = np.asarray(pixels.resize(image.size, Image.Resampling.BICUBIC), np.float32)
        assert np.abs(np.asarray(image.convert("RGB"), np.float32) - expected).mean() < 3
    assert measure(open_(tmp_path / "out")).rotated == 0


def test_reencode_encodes_all_that_fits_into_a_jpeg(source, open_, tmp_path):
    for quality in (60, 95):
        options = ShardOptions(short_side=1000, reencode=True, quality=quality)
        packed = write_shards(open_(source), tmp_path / str(quality), options)
        assert packed.encoded == 20
        first = int(next(iter(members(tmp_path / str(quality))))[:9])
        assert open_(tmp_path / str(quality)).shape(0) == open_(source).shape(first)
    small, large = (sum(len(data) for data in members(tmp_path / name).values()) for name in ("60", "95"))
    assert small < 0.7 * large
    (tmp_path / "odd").mkdir()
    Image.new("RGB", (65_501, 4)).save(tmp_path / "odd" / "too long.png")
    Image.new("RGB", (65_500, 4)).save(tmp_path / "odd" / "long.png")
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "odd" / "noise.png")  # takes more bytes than it has pixels
    packed = write_shards(open_(tmp_path / "odd"), tmp_path / "out", ShardOptions(reencode=True, quality=100))
    assert (packed.images, packed.encoded) == (3, 2)
    assert packed.bytes > 300 * 300


def test_names_are_harmless_and_tell_everything_apart(open_, tmp_path):
    root = tmp_path / "source"
    names = ["a.jpg", "a.png", "-rf *.jpg", "d/a.jpg", "d/a.b.c.jpg", "new\nline.jpg", "\x1b[31mred.jpg", "图.jpg"]
    names += ["x" * 200 + ".jpg"]
    (root / "d").mkdir(parents=True)
    for name in names:
        Image.fromarray(smooth(9, 9, len(name))).save(root / name, "PNG" if name.endswith("png") else "JPEG")
    (root / "wrong.png").write_bytes((root / "a.jpg").read_bytes())
    write_shards(open_(root), tmp_path / "out")
    found = [name for name in members(tmp_path / "out") if not name.endswith(".cls")]
    assert all(re.fullmatch(r"[0-9]{9}-[A-Za-z0-9_-]{1,64}\.(jpg|png)", name) for name in found)
    assert len({name.partition(".")[0] for name in found}) == len(names) + 1
    assert next(name for name in found if "wrong" in name).endswith(".jpg")


def test_sizes_of_shards(source, open_, tmp_path):
    total = write_shards(open_(source), tmp_path / "one").bytes
    packed = write_shards(open_(source), tmp_path / "several", ShardOptions(shard_bytes=total // 4))
    assert 4 <= packed.shards <= 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_side": 0}, "short_side: expected at least 1, got 0"),
        ({"quality": 101}, "quality: expected 1 to 100, got 101"),
        ({"images_per_shard": -1}, "images_per_shard: expected at least 1, got -1"),
        ({"shard_bytes": 0}, "shard_bytes: expected at least 1, got 0"),
        ({"shuffle_seed": -1}, "shuffle_seed: expected 0 to 9223372036854775807, got -1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ShardOptions(**options)


# Several processes and machines


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, bytes]:
    """What packing the source leads to, whatever happens in between."""
    root = tmp_path_factory.mktemp("reference")
    write_shards(open_dataset(write_source(root / "source"), cache_dir=root / "cache"), root / "out", OPTIONS)
    return contents(root / "out")


def test_the_bytes_are_those_of_earlier_versions(open_, tmp_path):
    for i in range(12):
        path = tmp_path / "arrays" / "ab"[i % 2] / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.full((9 + i, 7, 3), i, np.uint8))
    write_shards(open_(tmp_path / "arrays"), tmp_path / "out", ShardOptions(images_per_shard=5))
    tars = b"".join(path.read_bytes() for path in sorted((tmp_path / "out").glob("*.tar")))
    assert hashlib.sha256(tars).hexdigest() == "89c4bd4b78f90d9cb71cb7234869d9a8c1f4bf9c690b5c90314c0b2f185efdde"


def test_processes_pack_the_same_shards_and_can_be_stopped(source, open_, tmp_path, monkeypatch, reference):
    out, seen = tmp_path / "out", []

    def stop(images: int) -> None:
        seen.append(images)
        if sum(seen) > 14:
            raise KeyboardInterrupt

    monkeypatch.setattr(shards_module, "_IMAGES_PER_PROCESS", 1)
    with pytest.raises(KeyboardInterrupt):
        write_shards(open_(source), out, OPTIONS, num_workers=2, progress=stop)
    in_memory = open_([(noise(20, 30, i), i) for i in range(6)])  # which no other process can open
    assert write_shards(in_memory, tmp_path / "memory", OPTIONS, num_workers=2).images == 6
    monkeypatch.undo()
    seen.clear()
    packed = write_shards(open_(source), out, OPTIONS, progress=seen.append)
    assert (packed.images, packed.missing) == (20, 0)
    assert (seen[0] >= 15, sum(seen)) == (True, 20)  # at least three shards were complete
    assert contents(out) == reference


def test_a_process_that_is_killed_is_an_error(source, open_, tmp_path, monkeypatch):
    """As the kernel does when memory runs out."""

    class Killed(Workers):
        def __init__(self, count: int):
            super().__init__(count)
            for process in self._all:
                process.kill()

    monkeypatch.setattr(shards_module, "_IMAGES_PER_PROCESS", 1)
    monkeypatch.setattr(processes, "Workers", Killed)
    with pytest.raises(DataError, match=r"ended with exit code -9\..*the same command resumes"):
        write_shards(open_(source), tmp_path / "out", OPTIONS, num_workers=2)


def test_parts_at_the_same_time_or_one_after_the_other(source, open_, tmp_path, reference):
    out = tmp_path / "out"
    parts = [write_shards(open_(source), out, OPTIONS, part=(i, 3)) for i in (3, 1)]
    assert [(packed.shards, packed.missing) for packed in parts] == [(1, 3), (2, 1)]
    assert sorted(path.name for path in out.glob("*.tar")) == [f"shard-00000{i}.tar" for i in (0, 2, 3)]
    with pytest.raises(DataError, match="short_side 50 there, 60 here"):
        write_shards(open_(source), out, dataclasses.replace(OPTIONS, short_side=60), part=(2, 3))
    packed = write_shards(open_(source), out, OPTIONS, part=(2, 3))
    assert (packed.shards, packed.images, packed.missing) == (4, 20, 0)
    assert contents(out) == reference
    assert write_shards(open_(source), out, OPTIONS, part=(1, 3)) == packed
    together = tmp_path / "together"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: write_shards(open_(source), together, OPTIONS, part=(i, 2)), (1, 2)))
    assert contents(together) == reference
    with pytest.raises(ValueError, match="part: expected i/n with 1 <= i <= n, got 3/2"):
        write_shards(open_(source), out, OPTIONS, part=(3, 2))


# Killed, repeated, or on a bad disk


def pack_and_die(source: Path, out: Path, cache: Path, moment: int | str) -> None:
    """Pack, and be killed after a number of images or where a file is about to be written."""
    write_index, write_whole = shards_module.write_shard_index, shards_module.write_whole

    def die_after(images: int) -> None:
        nonlocal moment
        if isinstance(moment, int):
            moment -= images
            if moment < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def die_at(write):
        def writing(path, content):
            if moment == path.name:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(path, content)

        return writing

    shards_module.write_shard_index, shards_module.write_whole = die_at(write_index), die_at(write_whole)
    write_shards(open_dataset(source, cache_dir=cache), out, OPTIONS, progress=die_after)


def test_sigkill_at_any_moment(source, tmp_path, open_, reference):
    out, index, record = tmp_path / "out", "shard-000001.tar", ".shard-000001.tar.json"
    for moment, shards in [(3, 0), (8, 1), (index, 2), (record, 2), (17, 3), (MANIFEST, 4)]:
        process = start_process(pack_and_die, source, out, tmp_path / "cache", moment)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert len(list(out.glob("*.tar"))) == shards
    seen = []
    write_shards(open_(source), out, OPTIONS, progress=seen.append)
    assert seen == [20]  # nothing was left to pack
    assert contents(out) == reference


def test_damage_in_the_folder_is_repaired_and_the_rest_stays(source, open_, tmp_path, reference):
    out = tmp_path / "out"
    out.mkdir()
    for name, content in reference.items():
        (out / name).write_bytes(content)
    before = (out / "shard-000000.tar").stat().st_mtime_ns
    os.truncate(out / "shard-000001.tar", 5000)
    (out / "shard-000002.tar.index.npz").unlink()
    (out / "shard-000003.tar").unlink()
    for name in (".shard-000003.tar.12345678.partial", ".shard-000000.tar.index.npz.12345678.partial"):
        (out / name).touch()
    write_shards(open_(source), out, OPTIONS)
    assert contents(out) == reference
    assert (out / "shard-000000.tar").stat().st_mtime_ns == before


def test_other_options_another_source_and_other_files_are_refused(source, open_, tmp_path):
    out = tmp_path / "out"
    write_shards(open_(source), out, ShardOptions(images_per_shard=10))
    before = contents(out)
    with pytest.raises(DataError, match=r"other options: short_side None there, 50 here"):
        write_shards(open_(source), out, ShardOptions(images_per_shard=10, short_side=50))
    (source / "dogs" / "01.jpg").unlink()
    with pytest.raises(DataError, match=r"another source or other options: source \w+ there, \w+ here"):
        write_shards(open_(source), out, ShardOptions(images_per_shard=10))
    assert contents(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").touch()
    with pytest.raises(DataError, match=r"new or empty folder.*found 'precious.txt'"):
        write_shards(open_(source), tmp_path / "full")
    (out / "shards.json").write_text("[")
    with pytest.raises(DataError, match=r"shards.json: is damaged"):
        write_shards(open_(source), out, ShardOptions(images_per_shard=10))


def test_one_process_at_a_time_where_the_file_system_has_locks(source, open_, tmp_path, monkeypatch):
    def pack_again(images: int) -> None:
        with pytest.raises(DataError, match="another process is packing part 1/1"):
            write_shards(open_(source), tmp_path / "locked", OPTIONS)

    write_shards(open_(source), tmp_path / "locked", OPTIONS, progress=pack_again)

    def flock(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fastmae.data.shards.fcntl.flock", flock)
    assert write_shards(open_(source), tmp_path / "out").images == 20


def test_bad_files_are_left_out_listed_and_limited(source, open_, tmp_path):
    (source / "dogs" / "19.jpg").unlink()
    (source / "dogs" / "19.png").write_bytes(png(damaged=True, size=(80, 90)))
    (source / "cats" / "00.jpg").write_bytes(b"")
    dataset = open_(source, max_bad_fraction=0.1)
    packed = write_shards(dataset, tmp_path / "out", ShardOptions(short_side=50, images_per_shard=6))
    assert (packed.images, packed.bad) == (18, 2)
    listed = [json.loads(line) for line in (tmp_path / "out/bad_files.jsonl").read_text().splitlines()]
    assert [Path(bad["path"]).name for bad in listed] == ["00.jpg", "19.png"]
    assert listed[0]["reason"] == "empty file"
    assert "does not decode" in listed[1]["reason"]
    before = contents(tmp_path / "out")
    assert write_shards(dataset, tmp_path / "out", ShardOptions(short_side=50, images_per_shard=6)) == packed
    assert contents(tmp_path / "out") == before
    with pytest.raises(DataError, match=r"2 of 20 images cannot be used"):
        write_shards(open_(source, max_bad_fraction=0.05), tmp_path / "strict", ShardOptions(short_side=50))
    Image.fromarray(smooth(44, 55, 9)).save(source / "cats" / "10.jpg")
    with pytest.raises(DataError, match=r"cats/10.jpg: changed since it was indexed"):
        write_shards(dataset, tmp_path / "changed")
    assert not list((tmp_path / "changed").glob("*.tar"))


def test_a_full_disk_leaves_no_half_shard(source, open_, tmp_path):
    """A limit on the size of files stands in for it."""
    dataset, options, out = open_(source), ShardOptions(images_per_shard=10), tmp_path / "out"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limit[1]))
    try:
        with pytest.raises(DataError, match=r"out: cannot be written: .*the same command resumes"):
            write_shards(dataset, out, options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [name for name in contents(out) if ".tar" in name] == []
    write_shards(dataset, out, options)
    write_shards(dataset, tmp_path / "undisturbed", options)
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("offset", [700, 12], ids=["data", "name"])
def test_a_disk_that_gives_back_something_else(source, open_, tmp_path, monkeypatch, offset):
    real = os.fsync

    def flip(descriptor: int) -> None:
        real(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name.startswith(".shard-000000.tar."):
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(b"!")

    monkeypatch.setattr(shards_module.os, "fsync", flip)
    with pytest.raises(DataError, match="reads back otherwise than it was written"):
        write_shards(open_(source), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar*"))


@pytest.mark.parametrize("change", [{"data": b"no image"}, {"label": 10**40}], ids=str)
def test_what_does_not_read_as_it_was_meant(source, open_, tmp_path, monkeypatch, change):
    monkeypatch.setattr(shards_module, "store_image", lambda *call: store_image(*call)._replace(**change))
    with pytest.raises(DataError, match=r"wrote 20 images, read back 20; the first to differ"):
        write_shards(open_(source), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar*"))
