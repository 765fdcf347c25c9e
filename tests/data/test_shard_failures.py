"""Packing that is stopped, killed, repeated or given a bad disk: what is there is whole, and comes out the same."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from loading import smooth
from PIL import Image
from sharding import contents, write_source

from fastmae.data import DataError, open_dataset, shard_file
from fastmae.data.shard import ShardOptions, write_shards
from fastmae.data.shard_folder import ShardFolder
from fastmae.data.shard_image import StoredImage


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


@pytest.fixture
def open_(tmp_path):
    return lambda path, **options: open_dataset(path, cache_dir=tmp_path / "cache", **options)


class Stop(Exception):
    pass


def stop_after(images: int):
    def progress(more: int, size: int) -> None:
        nonlocal images
        images -= more
        if images < 0:
            raise Stop

    return progress


def test_a_stopped_run_goes_on_where_it_was(source, open_, tmp_path):
    options, out = ShardOptions(short_side=50, images_per_shard=5), tmp_path / "out"
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
    (out / "shard-000002.tar").unlink()
    write_shards(open_(source), out, options)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_what_is_damaged_in_the_folder_is_made_again(source, open_, tmp_path):
    options, out = ShardOptions(images_per_shard=5), tmp_path / "out"
    write_shards(open_(source), out, options)
    before = contents(out)
    os.truncate(out / "shard-000001.tar", 5000)
    (out / "shard-000002.tar.index.npz").unlink()
    for leftover in (".shard-000003.tar.partial", ".shards.json.partial", ".writing-abc.index.npz"):
        (out / leftover).touch()
    write_shards(open_(source), out, options)
    assert contents(out) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from fastmae.data import open_dataset, shard_file
from fastmae.data.shard import ShardOptions, write_shards
from fastmae.data.shard_folder import ShardFolder
from fastmae.data.shard_image import StoredImage

source, out, cache = map(Path, sys.argv[1:])

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def pack(**options):
    write_shards(open_dataset(source, cache_dir=cache), out, ShardOptions(short_side=50, images_per_shard=5), **options)

class DieAfter:
    def __init__(self, images):
        self.left = images
    def __call__(self, images, size):
        self.left -= images
        if self.left < 0:
            die()

def torn(self, record):  # half a line of what is remembered
    with (self.path / ".progress.jsonl").open("a") as file:
        file.write('{"name": "shard-0000')
        file.flush()
        die()

def attempts():
    yield lambda: pack(progress=DieAfter(3))
    yield lambda: pack(progress=DieAfter(8))
    shard_file.write_shard_index = die
    yield pack
    shard_file.write_shard_index = real_index
    ShardFolder.add = torn
    yield pack
    ShardFolder.add = real_add
    yield lambda: pack(progress=DieAfter(17))
    ShardFolder.finish = die
    yield pack

real_index, real_add = shard_file.write_shard_index, ShardFolder.add
for attempt in attempts():
    child = os.fork()
    if not child:
        attempt()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    print(len(list(out.glob("*.tar"))), flush=True)
"""


def test_sigkill_at_any_moment(source, open_, tmp_path):
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", KILLED, source, out, tmp_path / "cache"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["0", "1", "2", "2", "3", "4"], done.stderr
    options = ShardOptions(short_side=50, images_per_shard=5)
    write_shards(open_(source), out, options)
    write_shards(open_(source), tmp_path / "undisturbed", options)
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


def test_one_process_at_a_time(source, open_, tmp_path):
    with ShardFolder(tmp_path / "out", {}), pytest.raises(DataError, match="another process"):
        write_shards(open_(source), tmp_path / "out")


def test_a_file_system_without_locks(source, open_, tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fastmae.data.shard_folder.fcntl.flock", flock)
    assert write_shards(open_(source), tmp_path / "out").images == 20


def write_damaged_png(path: Path) -> None:
    """Header and end are good, pixels are not."""
    Image.fromarray(smooth(80, 90, 0)).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_bad_files_are_left_out_listed_and_limited(source, open_, tmp_path):
    (source / "dogs" / "19.jpg").unlink()
    write_damaged_png(source / "dogs" / "19.png")
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


def test_a_source_that_changes_meanwhile(source, open_, tmp_path):
    dataset = open_(source)
    Image.fromarray(smooth(44, 55, 9)).save(source / "cats" / "10.jpg")
    with pytest.raises(DataError, match=r"cats/10.jpg: changed while it was being packed"):
        write_shards(dataset, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


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


@pytest.mark.parametrize("part", ["data", "name"])
def test_a_disk_that_gives_back_something_else(source, open_, tmp_path, monkeypatch, part):
    real = os.fsync

    def flip(descriptor: int) -> None:
        real(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == ".shard-000000.tar.partial":
            with path.open("r+b") as file:
                file.seek(700 if part == "data" else 12)
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
