"""Packing that is stopped, killed, repeated or given a bad disk: what is there is whole, and comes out the same."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
from pathlib import Path

import pytest
from distributed import start_process
from loading import png, smooth
from PIL import Image
from sharding import contents, write_source

from fastmae.data import DataError, open_dataset, shard_file
from fastmae.data.shard import ShardOptions, write_shards
from fastmae.data.shard_folder import ShardFolder
from fastmae.data.shard_image import StoredImage

OPTIONS = ShardOptions(short_side=50, images_per_shard=5)


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


class Stop(Exception):
    pass


def stop_after(images: int):
    def progress(more: int, size: int) -> None:
        nonlocal images
        images -= more
        if images < 0:
            raise Stop

    return progress


def test_a_stopped_run_resumes_and_damage_in_the_folder_is_repaired(source, open_, tmp_path):
    options, out = OPTIONS, tmp_path / "out"
    write_shards(open_(source), tmp_path / "undisturbed", options)
    with pytest.raises(Stop):
        write_shards(open_(source), out, options, progress=stop_after(12))
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["shard-000000.tar", "shard-000001.tar"]
    assert not list(out.glob(".*.partial"))
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    seen = []
    write_shards(open_(source), out, options, progress=lambda images, size: seen.append(images))
    assert seen[:2] == [5, 5]
    assert sum(seen) == 20
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert before == {name: (out / name).stat().st_mtime_ns for name in before}
    os.truncate(out / "shard-000001.tar", 5000)
    (out / "shard-000002.tar.index.npz").unlink()
    (out / "shard-000003.tar").unlink()
    for leftover in (".shard-000003.tar.partial", ".shards.json.partial", ".writing-abc.index.npz"):
        (out / leftover).touch()
    write_shards(open_(source), out, options)
    assert contents(out) == contents(tmp_path / "undisturbed")


def pack_and_die(source: Path, out: Path, cache: Path, moment: int | str) -> None:
    """Pack, and be killed after a number of images or within a step of the packing."""

    def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_after(images: int, size: int) -> None:
        nonlocal moment
        moment -= images
        if moment < 0:
            die()

    def die_in_a_record(self, record):
        with (self.path / ".progress.jsonl").open("a") as file:
            file.write('{"name": "shard-0000')
            file.flush()
            die()

    if moment == "index":
        shard_file.write_shard_index = die
    elif moment == "record":
        ShardFolder.add = die_in_a_record
    elif moment == "finish":
        ShardFolder.finish = die
    progress = die_after if isinstance(moment, int) else None
    write_shards(open_dataset(source, cache_dir=cache), out, OPTIONS, progress=progress)


def test_sigkill_at_any_moment(source, open_, tmp_path):
    out = tmp_path / "out"
    for moment, shards in [(3, 0), (8, 1), ("index", 2), ("record", 2), (17, 3), ("finish", 4)]:
        process = start_process(pack_and_die, source, out, tmp_path / "cache", moment)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert len(list(out.glob("*.tar"))) == shards
    write_shards(open_(source), out, OPTIONS)
    write_shards(open_(source), tmp_path / "undisturbed", OPTIONS)
    assert contents(out) == contents(tmp_path / "undisturbed")


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
    with ShardFolder(tmp_path / "locked", {}), pytest.raises(DataError, match="another process"):
        write_shards(open_(source), tmp_path / "locked")

    def flock(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fastmae.data.shard_folder.fcntl.flock", flock)
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
    with pytest.raises(DataError, match=r"cats/10.jpg: changed while it was being packed"):
        write_shards(dataset, tmp_path / "changed")
    assert not list((tmp_path / "changed").glob("*.tar"))


def test_a_full_disk_leaves_no_half_shard(source, open_, tmp_path):
    """A limit on the size of files stands in for it."""
    dataset, options, out = open_(source), ShardOptions(images_per_shard=10), tmp_path / "out"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limit[1]))
    try:
        with pytest.raises(DataError, match=r"out: cannot be written: .*the same command goes on from there"):
            write_shards(dataset, out, options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(contents(out)) == [".progress.jsonl", "shards.json"]
    write_shards(dataset, out, options)
    write_shards(dataset, tmp_path / "undisturbed", options)
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("offset", [700, 12], ids=["data", "name"])
def test_a_disk_that_gives_back_something_else(source, open_, tmp_path, monkeypatch, offset):
    real = os.fsync

    def flip(descriptor: int) -> None:
        real(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == ".shard-000000.tar.partial":
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(b"!")

    monkeypatch.setattr(shard_file.os, "fsync", flip)
    with pytest.raises(DataError, match="reads back otherwise than it was written"):
        write_shards(open_(source), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_what_does_not_read_as_it_was_meant(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(smooth(20, 30, 0)).save(buffer, "JPEG")
    image = StoredImage("0.jpg", buffer.getvalue(), 3, 20, 30, False)
    shard_file.write_shard(tmp_path / "good.tar", [image])
    for number, change in enumerate(({"height": 21}, {"data": b"no image"}, {"label": 10**40})):
        with pytest.raises(DataError, match="1 images were written, 1 read back; first other one: Written"):
            shard_file.write_shard(tmp_path / f"{number}.tar", [image._replace(**change)])
    assert sorted(contents(tmp_path)) == ["good.tar", "good.tar.index.npz"]
