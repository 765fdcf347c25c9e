"""The index: what is found, when it is built again, what survives a kill, and that damage is never passed on."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections import UserList
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from loading import image_file, noise, write_shards
from torchvision.datasets import ImageFolder

from fastmae.data import DataError, errors, open_dataset
from fastmae.data import index as index_module
from fastmae.data import sources as sources_module
from fastmae.data.formats import parse_header
from fastmae.data.index import Accepts, build_index, publish_index, trusted_index
from fastmae.data.processes import in_processes
from fastmae.data.sources import FileSource, find_source
from fastmae.data.table import ENTRY, NAMES, Table, npy_header

JPEG = image_file("JPEG", noise())


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "images"
    (root / "b" / "deep").mkdir(parents=True)
    (root / "a.jpg").write_bytes(image_file("JPEG", noise(20, 30)))
    (root / "b" / "c.png").write_bytes(image_file("PNG", noise(40, 10)))
    (root / "b" / "deep" / "d.webp").write_bytes(image_file("WEBP", noise(15, 16)))
    return root


@pytest.fixture
def headers(monkeypatch) -> list[str]:
    """The names of the files whose headers are read."""
    read: list[str] = []

    def parse(file):
        read.append(Path(file.name).name)
        return parse_header(file)

    monkeypatch.setattr(sources_module, "parse_header", parse)
    return read


def names(dataset) -> list[str]:
    return [os.path.relpath(dataset.path(i), dataset.root) for i in range(len(dataset))]


# ---------------------------------------------------------------------------------------------------------------------
# What is found


def test_a_folder(folder, cache):
    dataset = open_dataset(folder, cache_dir=cache)
    assert names(dataset) == ["a.jpg", "b/c.png", "b/deep/d.webp"]
    assert [dataset.shape(i) for i in range(3)] == [(20, 30), (40, 10), (15, 16)]
    assert (dataset.name, dataset.classes) == ("images", ["b"])  # the folders at the top
    assert dataset.labels(np.arange(3)).tolist() == [-1, 0, 0]
    assert bytes(dataset.read(0)) == (folder / "a.jpg").read_bytes()


def test_names_of_all_kinds_in_the_order_of_whole_paths(tmp_path, cache):
    paths = ["a.jpg", "a/x.jpg", "a!/x.jpg", "a-/x.jpg", "ab/x.jpg", "a/b/c.jpg", "a/b.jpg", "é 图/x.JPG", "Z", "w.png"]
    for path in [*paths, ".hidden.jpg", ".hidden/x.jpg"]:
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / path).write_bytes(JPEG)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/images/a/latin\xe9.jpg")).write_bytes(JPEG)
    (tmp_path / "images" / "labels.csv").write_text("not an image, and not named like one")
    dataset = open_dataset(tmp_path / "images", cache_dir=cache)
    assert names(dataset) == sorted([*paths, "a/latin\udce9.jpg"])
    assert all(len(dataset.read(i)) == len(JPEG) for i in range(len(dataset)))


def test_links_are_followed_once_and_pipes_are_not_waited_for(folder, cache, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "e.jpg").write_bytes(JPEG)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (folder / "file.jpg").symlink_to(elsewhere / "e.jpg")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
    os.mkfifo(folder / "pipe.jpg")
    dataset = open_dataset(folder, max_bad_fraction=0.5, cache_dir=cache)
    bad = dataset.is_bad(np.arange(7))
    assert [name for name, is_bad in zip(names(dataset), bad, strict=True) if not is_bad] == [
        *("a.jpg", "b/c.png", "b/deep/d.webp", "file.jpg", "linked/e.jpg")
    ]
    assert [bad.reason for bad in dataset.bad] == ["dangling link"] * 2


BAD = {"empty.jpg": (b"", "empty"), "text.png": (b"hello", "not a JPEG"), "cut.jpg": (JPEG[:-20], "truncated")}


def test_bad_files_are_found_and_numbered_with_the_others(folder, cache):
    for name, (content, _) in BAD.items():
        (folder / name).write_bytes(content)
    for _ in range(2):  # the second time from the cache
        dataset = open_dataset(folder, max_bad_fraction=0.5, cache_dir=cache)
        ids = np.arange(len(dataset))
        assert [bad.path for bad in dataset.bad] == [str(folder / name) for name in sorted(BAD)]
        assert all(BAD[Path(bad.path).name][1] in bad.reason for bad in dataset.bad)
        assert [dataset.path(int(i)) for i in dataset.bad_ids] == [bad.path for bad in dataset.bad]
        assert np.flatnonzero(dataset.is_bad(ids)).tolist() == dataset.bad_ids.tolist() == [3, 4, 5]
    with pytest.raises(DataError, match=r"(?s)3 of 6 images.*text.png.*--data.max-bad-fraction"):
        open_dataset(folder, max_bad_fraction=0.4, cache_dir=cache)


def test_files_that_vanish_or_are_replaced_between_listing_and_reading_are_named(folder):
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(JPEG)
    source = find_source(folder)
    listed = list(source._files)
    (folder / "0.jpg").unlink()
    (folder / "1.jpg").unlink()
    os.mkfifo(folder / "1.jpg")
    (folder / "2.jpg").unlink()
    (folder / "2.jpg").mkdir()
    (folder / "3.jpg").write_bytes(image_file("JPEG", noise(50, 60)))
    source._files = listed
    index = build_index(source, Accepts())
    assert index.bad == {0: "no such file", 1: "not a file", 2: "not a file"}
    row = index.table.rows(np.array([3]))[0]  # of the file that is there now
    assert (row["height"], row["width"], row["size"]) == (50, 60, (folder / "3.jpg").stat().st_size)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "no such folder or file"),
        ("a.jpg", "is a file"),
        ("empty", "no image"),
        ("text", "no image"),
        ("bad", "(?s)only 1 unusable.*empty file"),
    ],
)
def test_what_holds_no_images_is_a_clear_error(tmp_path, cache, path, message):
    for file, content in {"a.jpg": JPEG, "empty/.hidden.jpg": JPEG, "text/a.txt": b"hello", "bad/a.jpg": b""}.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(tmp_path / path, cache_dir=cache)
    assert str(tmp_path / path) in str(caught.value)
    assert "expected a folder" in str(caught.value)


REFUSED = {
    "max_bad_fraction": [1.5],
    "channels": [0],
    "max_pixels": [0, 1 << 30],
    "value_range": [(2, 1), (0, 1, 2), (0, 1, 0, 1), (0, float("inf"))],
}


@pytest.mark.parametrize(("option", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_options_out_of_range(folder, cache, option, value):
    with pytest.raises(ValueError, match=option):
        open_dataset(folder, cache_dir=cache, **{option: value})


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (["3", "", "0"], [], [3, -1, 0]),
        (["cat", "10", ""], ["10", "cat"], [1, 0, -1]),
        (["4294967296", "1", ""], ["1", "4294967296"], [1, 0, -1]),  # more than a row holds
    ],
)
def test_labels_of_a_list_are_numbers_or_names(tmp_path, cache, labels, classes, expected):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "list.txt").write_text("".join(f"a.jpg\t{label}\n" for label in labels))
    dataset = open_dataset(tmp_path / "list.txt", cache_dir=cache)
    assert (dataset.classes, dataset.labels(np.arange(3)).tolist()) == (classes, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Building


def test_the_hash_is_of_the_content_and_is_that_of_version_0_1_0(folder, cache, tmp_path):
    arrays = tmp_path / "arrays"
    for i in range(150):
        (arrays / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        np.save(arrays / "ab"[i % 2] / f"{i}.npy", np.zeros((4 + i, 5, 3), np.uint8))
    (arrays / "notes.txt").touch()
    dataset = open_dataset(arrays, cache_dir=cache)
    assert dataset.hash == "be675a21d8d85d28e2ab7314cb6f0b26"
    moved = tmp_path / "moved"
    arrays.rename(moved)
    (moved / "notes.txt").touch()
    assert open_dataset(moved, cache_dir=cache).hash == dataset.hash
    (moved / "a" / "0.npy").rename(moved / "a" / "00.npy")
    assert open_dataset(moved, cache_dir=cache).hash != dataset.hash


@pytest.mark.parametrize("listed", [False, True])
def test_processes_build_what_threads_build_and_a_listing_is_never_held(folder, monkeypatch, listed):
    class Lines:
        read = 0

        def __iter__(self):
            for i in range(2000):
                self.read = i
                yield ("a.jpg", "b/c.png", "gone.jpg")[i % 3] if i < 300 else "a.jpg", ""

    monkeypatch.setattr(sources_module, "_AT_ONCE", 64)
    monkeypatch.setattr(sources_module, "_READ_ALONE", 1)
    lines, done, ahead = Lines(), 0, []

    def progress(count: int) -> None:
        nonlocal done
        ahead.append(lines.read - done)
        done += count

    source = FileSource(folder, lines, listed=listed)
    two = build_index(source, Accepts(), workers=2, progress=progress)
    assert (done, max(ahead) < 1000) == (2000, True)
    one = build_index(source, Accepts(), workers=1)
    assert len(one.bad) == 100
    assert (one.hash, one.bad) == (two.hash, two.bad)


def test_workers_pass_on_errors_and_one_that_dies_is_reported():
    assert list(in_processes(math.sqrt, [1, 4, 9, 16], 2)) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(in_processes(math.sqrt, [1, -1, 2], 2))
    with pytest.raises(RuntimeError, match=r"a worker process ended with exit code 3"):
        list(in_processes(os._exit, [3, 3], 2))


def test_workers_load_no_pytorch_and_do_not_run_an_unguarded_script_again(folder, tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys; from fastmae.data import sources\n"
        "sources._READ_ALONE = sources._LISTED_ALONE = 0\n"
        f"source = sources.find_source(sources.Path({str(folder)!r}), 2)\n"
        "print(sum(len(part.rows) for part in source.parts(None, 2, None)), 'torch' in sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.returncode) == ("3 False\n", 0), done.stderr


@pytest.mark.parametrize("listed", [False, True])
def test_only_new_and_changed_files_are_read_again(tmp_path, cache, headers, listed):
    root = tmp_path / "bands"
    for i in range(5):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        np.save(root / "ab"[i % 2] / f"{i}.npy", np.zeros((4, 20 + i, 30), np.uint8))
    (root / "bad.npy").write_bytes(b"")

    def opened(cache_dir):
        (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(root.rglob("*.npy"), reverse=True)))
        options = {"channels": 4, "channels_first": True, "max_bad_fraction": 0.5, "cache_dir": cache_dir}
        return open_dataset(tmp_path / "list.txt" if listed else root, **options)

    opened(cache)
    assert len(headers) == 6
    headers.clear()
    opened(cache)
    assert headers == []
    np.save(root / "a" / "4.npy", np.zeros((4, 50, 60), np.uint8))
    (root / "0").mkdir()  # another class, and so other labels
    np.save(root / "0" / "new.npy", np.zeros((4, 70, 80), np.uint8))
    again = opened(cache)
    assert sorted(headers) == ["4.npy", "bad.npy", "new.npy"]
    anew = opened(tmp_path / "anew")
    ids = np.arange(7)
    assert again.hash == anew.hash
    assert np.array_equal(again.rows(ids), anew.rows(ids))
    assert again.bad == anew.bad != []


def test_a_build_that_was_killed_is_continued(tmp_path, cache, headers, monkeypatch):
    monkeypatch.setattr(sources_module, "_AT_ONCE", 32)
    root = tmp_path / "many"
    root.mkdir()
    for i in range(350):
        (root / f"{i:03}.jpg").write_bytes(JPEG)
    source, tracebacks = find_source(root), []
    expected = build_index(source, Accepts())

    def publish(progress=None):
        return publish_index(source, root, Accepts(), cache_dir=cache, workers=1, progress=progress)

    def kill(*_):
        raise KeyboardInterrupt

    def killed_at_250(file):
        return kill() if file.name.endswith("250.jpg") else parse_header(file)

    def assert_killed(progress=None):
        with pytest.raises(KeyboardInterrupt) as raised:
            publish(progress)
        tracebacks.append(raised)  # keeps the files open, as a process does that is killed at once
        assert not list(cache.glob("index-*"))
        for path in cache.glob("writing-*/names.npy"):
            os.truncate(path, path.stat().st_size - 3)  # a kill leaves any part of what was being written

    with monkeypatch.context() as patch:
        patch.setattr(sources_module, "parse_header", killed_at_250)
        assert_killed()
    assert_killed(kill)  # while the rows of the first build are copied
    headers.clear()
    assert publish().hash == expected.hash
    # A set, since threads of the builds that were stopped may still be reading.
    assert 126 <= len(set(headers)) < 160
    assert not list(cache.glob("writing-*/*"))


def test_of_two_processes_that_build_one_waits_for_the_other(folder, cache, headers):
    sources = [find_source(folder), find_source(folder)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda source: publish_index(source, folder, Accepts(), cache_dir=cache), sources)
    assert sorted(headers) == ["a.jpg", "c.png", "d.webp"]
    assert first.folder == second.folder


# ---------------------------------------------------------------------------------------------------------------------
# Publishing


def test_replaced_indexes_stay_for_a_month(folder, cache):
    for _ in range(2):
        open_dataset(folder, cache_dir=cache)
        (folder / "a.jpg").touch()
    open_dataset(folder, cache_dir=cache)
    assert len(list(cache.glob("index-*"))) == 3  # other runs may be reading the first two
    for old in cache.glob("index-*"):
        os.utime(old, (1, 1))
    (folder / "y.jpg").write_bytes(JPEG)
    assert len(open_dataset(folder, cache_dir=cache)) == 4
    assert len(list(cache.glob("index-*"))) == 2  # the one before counts from today
    assert not [path for path in cache.glob("writing-*") if path.is_dir()]


def test_the_index_lies_beside_the_data_or_else_in_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    beside = open_dataset(folder).index
    assert beside.folder.parent == tmp_path / ".fastmae" / "images"
    assert trusted_index(beside.folder, folder, Accepts()).hash == beside.hash
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path == folder)  # what lies beside it may be another machine's
        assert open_dataset(folder).index.folder.parent == folder / ".fastmae"
        assert open_dataset(folder).hash == beside.hash
    shutil.rmtree(tmp_path / ".fastmae")
    (tmp_path / ".fastmae").write_text("a file in the way: nothing can be written there")
    assert open_dataset(folder).index.folder.parent == tmp_path / "home" / ".cache" / "fastmae"
    # A home among the images is no part of them: opening it again finds the same three.
    for _ in range(2):
        assert len(open_dataset(folder, index=folder / "home").index.table) == 3


@pytest.mark.parametrize("has_classes", [True, False])
def test_other_libraries_find_the_same_classes_afterwards(tmp_path, monkeypatch, has_classes):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = tmp_path / "images"
    for name in ("a", "b") if has_classes else (".",):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "0.jpg").write_bytes(JPEG)
    beside = open_dataset(root).index.folder.parent
    if has_classes:
        assert ImageFolder(root).classes == ["a", "b"]
    else:
        assert beside == root / ".fastmae"  # no library takes the folder for one of classes


def test_a_named_index_is_trusted_and_refused_where_it_cannot_be(folder, tmp_path, caplog):
    home = tmp_path / "home"
    first = open_dataset(folder, index=home)
    (folder / "new.jpg").write_bytes(JPEG)
    assert len(open_dataset(folder, index=home)) == 3  # nothing is listed
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert open_dataset(moved, index=home).hash == first.hash
    assert f"it was built from {folder}" in caplog.text
    with pytest.raises(DataError, match=r"--data.index .*was built with other channels"):
        open_dataset(moved, index=first.index.folder, channels=1)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"--data.index .*file/index: cannot be written"):
        open_dataset(moved, index=tmp_path / "file" / "index")
    with pytest.raises(DataError, match=r"--data.index .*: expected a folder other than that of the images"):
        open_dataset(moved, index=moved)


def test_verdicts_follow_unchanged_images_into_a_new_index(folder, cache):
    def opened():
        return open_dataset(folder, max_bad_fraction=0.9, cache_dir=cache)

    dataset = opened()
    marked = dataset.mark_bad({0: "does not decode", 1: "nor does this"})
    assert [bad.reason for bad in marked.bad] == ["does not decode", "nor does this"]
    assert (dataset.bad, dataset.hash != marked.hash) == ([], True)
    assert marked.rows(np.arange(3))["bad"].tolist() == [1, 1, 0]
    assert (opened().bad, opened().hash) == (marked.bad, marked.hash)
    assert opened().mark_bad({1: "something else"}).bad == marked.bad
    assert dataset.mark_bad({1: "first"}).mark_bad({0: "then"}).hash == marked.hash  # in whatever order
    marked = opened()
    (folder / "0.jpg").write_bytes(JPEG)  # moves the others by one
    assert opened().bad == marked.bad
    os.utime(folder / "a.jpg", (1, 1))  # may have been repaired
    assert opened().bad == marked.bad[1:]
    with pytest.raises(DataError, match="1 of 4 images"):
        open_dataset(folder, max_bad_fraction=0.2, cache_dir=cache)


def test_verdicts_follow_images_in_shards_that_are_joined_by_others(folder, cache, tmp_path):
    files = [folder / "a.jpg", folder / "b" / "c.png"]
    shards = write_shards(tmp_path / "shards", files, per_shard=1)
    marked = open_dataset(shards, cache_dir=cache, max_bad_fraction=0.5).mark_bad({1: "does not decode"})
    shutil.copy(shards / "part-000000.tar", shards / "a.tar")  # comes first
    again = open_dataset(shards, cache_dir=cache, max_bad_fraction=0.5)
    assert (len(again), again.bad) == (3, marked.bad)
    assert again.bad_ids.tolist() == [2]


def test_records_keep_their_verdicts_when_their_version_changes_and_may_not_be_empty(cache):
    class Images(UserList):
        name, fingerprint = "images", "1"

        def read(self, i):
            return self[i]

    images, options = Images([JPEG] * 3), {"cache_dir": cache, "max_bad_fraction": 0.5}
    marked = open_dataset(images, **options).mark_bad({1: "does not decode"})
    images.fingerprint = "2"
    assert open_dataset(images, **options).bad == marked.bad != []
    with pytest.raises(DataError, match="found no image at all"):
        open_dataset(Images(), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Damage, full disks


def test_any_flipped_bit_is_found(folder, cache, caplog):
    """In every file of the index: it is refused, or its verdicts are reported to be damaged."""
    for i in range(40):
        (folder / f"{i}.jpg").write_bytes(JPEG if i else b"")
    dataset = open_dataset(folder, max_bad_fraction=0.5, cache_dir=cache).mark_bad({3: "does not decode"})
    root, random = dataset.index.folder, np.random.default_rng(0)
    files = sorted(root.iterdir())
    assert len(files) == 5
    sizes = np.array([path.stat().st_size for path in files], float)
    for path in [*files, *random.choice(np.array(files), 95, p=sizes / sizes.sum())]:
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[random.integers(len(content))] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        caplog.clear()
        try:
            trusted_index(root, folder, Accepts())
        except DataError:
            pass
        else:
            assert (path.name, "is damaged" in caplog.text) == ("verdicts.json", True)
        path.write_bytes(content)
    assert trusted_index(root, folder, Accepts()).bad == dataset.index.bad


def test_damage_is_repaired_or_named_and_not_taken_over(folder, cache, tmp_path, monkeypatch, caplog):
    first, ids = open_dataset(folder, index=tmp_path / "home"), np.arange(3)
    expected = first.rows(ids)

    def damage():
        [path] = (tmp_path / "home").glob("index-*/rows.npy")
        content = bytearray(path.read_bytes())
        content[-20] ^= 1  # of a width
        path.write_bytes(content)

    damage()
    with pytest.raises(DataError, match=r"is damaged: rows.npy; build it with fastmae data index"):
        open_dataset(folder, index=first.index.folder)
    assert open_dataset(folder, index=tmp_path / "home").hash == first.hash
    assert "is damaged: rows.npy" in caplog.text
    # A large index is not read when it is opened, but when it is refreshed, and before its rows are taken over.
    monkeypatch.setattr(index_module, "SMALL", 0)
    damage()
    arguments = find_source(folder), folder, Accepts()
    repaired = publish_index(*arguments, home=tmp_path / "home", verify=True)
    assert np.array_equal(repaired.table.rows(ids), expected)


def test_an_index_of_another_version_is_said_to_be_one_and_built_again(folder, cache, caplog):
    first = open_dataset(folder, cache_dir=cache)
    path = first.index.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    assert open_dataset(folder, cache_dir=cache).hash == first.hash
    assert "was written by another version of fastmae (format 2, not 4)" in caplog.text


@pytest.mark.parametrize("at", ["create", "write"])
def test_a_full_disk_is_not_taken_for_unreadable_data(folder, cache, tmp_path, monkeypatch, caplog, at):
    real = index_module._create

    def full(where: Path | None, *arguments):
        if where is None:  # in memory
            return real(where, *arguments)
        if at == "create":
            raise OSError(errno.ENOSPC, "No space left on device")
        return Path("/dev/full").open("w+b", buffering=0)

    monkeypatch.setattr(index_module, "_create", full)
    assert len(open_dataset(folder, cache_dir=cache)) == 3
    assert "is not cached, and the next run builds it again" in caplog.text
    assert "No space left" in caplog.text
    assert not list(cache.glob("index-*"))
    with pytest.raises(DataError, match=r"--data.index .*home: cannot be written: .*No space left"):
        open_dataset(folder, index=tmp_path / "home")


def test_a_file_system_that_fails_while_headers_are_read_is_retried_and_named(folder, cache, monkeypatch):
    monkeypatch.setattr(errors, "PAUSES", (0.0, 0.0))
    failures = [OSError(5, "Input/output error")] * 2

    def flaky(*call):
        if failures:
            raise failures.pop()
        return parse_header(*call)

    monkeypatch.setattr(sources_module, "parse_header", flaky)
    assert open_dataset(folder, cache_dir=cache).bad == []
    failures += [OSError(5, "Input/output error")] * 9
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read after 3 tries|\.(png|webp): cannot be read"):
        open_dataset(folder, cache_dir=cache / "other")


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_numpy_opens_the_table(folder, cache):
    index = open_dataset(folder, cache_dir=cache).index
    rows, heap, times = (np.load(index.folder / f"{name}.npy", mmap_mode="r") for name in ("rows", "names", "times"))
    assert np.array_equal(rows, index.table.rows(np.arange(3)))
    first = rows[1]
    assert bytes(heap[first["name"] : first["name"] + first["name_size"]]) == b"b/c.png"
    assert times[0] == (folder / "a.jpg").stat().st_mtime_ns


def test_a_hundred_million_rows_are_neither_held_nor_walked(tmp_path):
    count, ids = 100_000_000, np.random.default_rng(0).integers(0, 100_000_000, 1024)
    row = np.zeros(1, ENTRY)
    row["name_size"] = 24
    for name, dtype, size in (("rows", ENTRY, ENTRY.itemsize), ("names", NAMES, 24)):
        with (tmp_path / name).open("wb") as file:
            start = file.write(npy_header(dtype, count * size // dtype.itemsize))
            file.truncate(start + count * size)  # takes no room on the disk
            for i in ids.tolist():
                row["name"], row["size"] = 24 * i, i
                os.pwrite(file.fileno(), row.tobytes() if name == "rows" else b"%024d" % i, start + i * size)
    table = Table((tmp_path / "rows").open("rb"), (tmp_path / "names").open("rb"))
    anonymous = held()
    rows = table.rows(ids)
    assert rows["size"].tolist() == ids.tolist()
    assert list(map(int, table.names(rows))) == ids.tolist()
    assert held() - anonymous < 5_000  # kilobytes that are this process's own
    with pytest.raises(IndexError):
        table.rows(np.array([count]))


def held() -> int:
    return int(
        next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
    )
