"""The index: what is found, what is refused and why, and when a cached one is used."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from loading import image_file, noise, rotated
from PIL import Image
from test_decode import npy, tiff

from fastmae.data import DataError, errors, open_dataset
from fastmae.data import index as index_module
from fastmae.data import sources as sources_module
from fastmae.data.formats import BadImage, parse_header, stored_size
from fastmae.data.sources import find_source
from fastmae.data.table import PartBuilder


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


def names(dataset) -> list[str]:
    return [os.path.relpath(dataset.path(i), dataset.root) for i in range(len(dataset))]


def test_nested_folder(folder, cache):
    dataset = open_dataset(folder, cache_dir=cache)
    assert names(dataset) == ["a.jpg", "b/c.png", "b/deep/d.webp"]
    assert [dataset.shape(i) for i in range(3)] == [(20, 30), (40, 10), (15, 16)]
    assert dataset.bad == []
    assert (dataset.name, dataset.classes) == ("images", ["b"])  # the folders at the top
    assert dataset.labels(np.arange(3)).tolist() == [-1, 0, 0]
    assert bytes(dataset.read(0)) == (folder / "a.jpg").read_bytes()
    heights, widths = dataset.shapes(np.array([2, 0]))
    assert heights.tolist() == [15, 20]
    assert widths.tolist() == [16, 30]


def test_names_of_all_kinds(folder, cache):
    (folder / "wrong suffix.jpg").write_bytes(image_file("PNG", noise()))
    (folder / "no suffix").write_bytes(image_file("JPEG", noise()))
    (folder / "ünïcode 图.PNG").write_bytes(image_file("PNG", noise()))
    Path(os.fsdecode(os.fsencode(folder) + b"/latin\xe9.jpg")).write_bytes(image_file("JPEG", noise()))
    (folder / ".hidden.jpg").write_bytes(image_file("JPEG", noise()))
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.jpg").write_bytes(image_file("JPEG", noise()))
    (folder / "labels.csv").write_text("not an image, and not named like one")
    dataset = open_dataset(folder, cache_dir=cache)
    assert len(dataset) == 7
    assert dataset.bad == []
    for sample_id in range(len(dataset)):
        assert dataset.decode(sample_id).shape[:2] == dataset.shape(sample_id)


def test_orientation_turns_the_shape(tmp_path, cache):
    for format_ in ("JPEG", "PNG", "WEBP"):
        for orientation in range(1, 10):  # 9 is none
            content = image_file(format_, noise(20, 30), exif=rotated(orientation))
            (tmp_path / f"{format_}{orientation}.img").write_bytes(content)
    dataset = open_dataset(tmp_path, cache_dir=cache)
    assert [dataset.shape(i) for i in range(27)] == ([(20, 30)] * 4 + [(30, 20)] * 4 + [(20, 30)]) * 3


def thumbnailed(data: bytes) -> bytes:
    """A JPEG with another one, whole, in its header: an end marker that is not the image's."""
    segment = b"FAKE\0" + image_file("JPEG", noise(8, 8))
    return data[:2] + b"\xff\xe5" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]


GIF, AVIF = b"GIF89a" + bytes(40), b"\0\0\0\x1cftypavif" + bytes(40)
JPEG, PNG, WEBP = image_file("JPEG", noise()), image_file("PNG", noise()), image_file("WEBP", noise())
NPY = npy(noise()).tobytes()
ANIMATION = image_file("WEBP", noise(), save_all=True, append_images=[Image.fromarray(noise(seed=1))])
WHOLE = {
    "film.jpg": thumbnailed(JPEG) + b"a film from a phone" * 1000,
    "padded.png": PNG + bytes(3000),
}
BAD = {
    "empty.jpg": (b"", "empty"),
    "truncated.jpg": (JPEG[: len(JPEG) * 2 // 3], "truncated"),
    "thumbnail.jpg": (thumbnailed(JPEG)[:-20], "truncated"),
    "truncated.png": (PNG[:-8], "truncated"),
    "truncated.webp": (WEBP[:-10], "truncated"),
    "header only.jpg": (JPEG[:10], "unreadable header"),
    "header only.png": (PNG[:12], "unreadable header"),
    "movie.gif": (GIF, "GIF is not supported"),
    "new.avif": (AVIF, "AVIF is not supported"),
    "text.png": (b"hello", "not a JPEG, PNG, WebP, TIFF or NumPy"),
    "animation.webp": (ANIMATION, "animation"),
    "negative.npy": (NPY.replace(b"(20, 30, 3)", b"(-5, 10, 3)"), r"an array of shape (-5, 10, 3)"),
}


def test_bad_files_are_found_before_training(folder, cache):
    for name, content in WHOLE.items():  # with something behind their ends
        (folder / name).write_bytes(content)
    for name, (content, _) in BAD.items():
        (folder / name).write_bytes(content)
    dataset = open_dataset(folder, max_bad_fraction=0.75, cache_dir=cache)
    ids = np.arange(len(dataset))
    assert len(ids) == len(BAD) + 5  # numbered with the others
    assert [bad.path for bad in dataset.bad] == [str(folder / name) for name in sorted(BAD)]
    for bad in dataset.bad:
        assert BAD[Path(bad.path).name][1] in bad.reason
    assert [dataset.path(int(i)) for i in dataset.bad_ids] == [bad.path for bad in dataset.bad]
    assert np.array_equal(np.flatnonzero(dataset.is_bad(ids)), dataset.bad_ids)
    assert np.array_equal(dataset.is_bad(ids), dataset.rows(ids)["bad"] != 0)
    assert open_dataset(folder, max_bad_fraction=0.75, cache_dir=cache).bad == dataset.bad  # from the cache
    with pytest.raises(DataError, match=r"(?s)12 of 17 images.*animation.webp.*--data.max-bad-fraction"):
        open_dataset(folder, max_bad_fraction=0.7, cache_dir=cache)


def header_files() -> dict[str, bytes]:
    """A file of each kind that headers are read of."""
    pixels, grey = noise(), noise()[..., 0]
    photographs = {
        "exif.jpg": image_file("JPEG", noise(), exif=rotated(6)),
        "cmyk.jpg": image_file("JPEG", Image.fromarray(noise()).convert("CMYK")),
        "progressive.jpg": image_file("JPEG", noise(), progressive=True),
        "exif.png": image_file("PNG", noise(), exif=rotated(6)),
        "exif.webp": image_file("WEBP", noise(), exif=rotated(6)),
        "lossless.webp": image_file("WEBP", noise(), lossless=True),
        "a.bmp": image_file("BMP", noise()),
        "a.jp2": image_file("JPEG2000", noise()),
    }
    arrays = {
        "plain.tif": tiff(pixels),
        "big.tif": tiff(pixels, bigtiff=True, compression="zlib"),
        "tiled.tif": tiff(pixels, byteorder=">", tile=(16, 16)),
        "planes.tif": tiff(np.stack([grey] * 4), planarconfig="separate", photometric="minisblack"),
        "a.npy": npy(pixels),
        "v2.npy": npy(pixels, (2, 0)),
        "columns.npy": npy(np.asfortranarray(pixels.astype(">f4"))),
    }
    return photographs | {name: array.tobytes() for name, array in arrays.items()}


ABSURD = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63)
NOT_SHAPES = (b"(-5, 20, 3)", b"(20, -5)", b"(1e9, 2)", b"(10000000000, 1)", b"(True, 7)", b"()", b"'|O'", b"((((((")


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Noise, an absurd number, a cut or a hole, mostly within the header."""
    data, at = bytearray(content), int(random.integers(min(len(content), random.choice([64, 400]))))
    size = int(random.choice([1, 2, 4, 8]))
    match random.integers(4):
        case 0:
            data[at : at + size] = random.bytes(size)
        case 1:
            number = int(random.choice(np.array(ABSURD, np.uint64))) % 256**size
            data[at : at + size] = number.to_bytes(size, random.choice(["little", "big"]))
        case 2:
            del data[random.integers(len(content)) :]
        case 3:
            del data[at : at + random.integers(1, len(content))]
    return bytes(data)


class Asked(io.BytesIO):
    """Remembers the largest read that it was asked for: a file on a disk would make room for it first."""

    most = 0

    def read(self, size=-1):
        self.most = max(self.most, size or 0)
        return super().read(size)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_header_is_read_or_refused_whatever_its_bytes(monkeypatch):
    """Nothing but BadImage, and what is accepted fits into a row of the index."""
    monkeypatch.setattr(logging.getLogger("tifffile"), "disabled", True)
    random, refused, accepted = np.random.default_rng(0), 0, 0
    huge = b"\x93NUMPY\x02\0\xff\xff\xff\xff{'descr': '|u1', 'fortran_order': False, 'shape': (4, 4), }"
    trials = [("huge.npy", huge), *(("shape.npy", NPY.replace(b"(20, 30, 3)", words)) for words in NOT_SHAPES)]
    trials += [(name, damaged(content, random)) for name, content in header_files().items() for _ in range(100)]
    for name, content in trials:
        file = Asked(content)
        try:
            header = parse_header(file, name)
        except BadImage:
            refused += 1
            continue
        finally:
            assert file.most <= 1 << 20
        if header is not None:
            rows = PartBuilder()
            rows.add(b"name", header, size=len(content))
            [row] = rows.build().rows
            assert min(row["height"], row["width"], row["channels"]) > 0
            accepted += 1
    assert min(refused, accepted) > 200


STORED = {
    "jpeg": {"format_": "JPEG"},
    "progressive": {"format_": "JPEG", "progressive": True},
    "with-profile": {"format_": "JPEG", "icc_profile": bytes(150_000)},
    "with-exif": {"format_": "JPEG", "exif": rotated(6)},
    "png": {"format_": "PNG"},
    "lossy-webp": {"format_": "WEBP", "quality": 50},
    "lossless-webp": {"format_": "WEBP", "lossless": True},
    "extended-webp": {"format_": "WEBP", "icc_profile": b"profile"},
}


def stored(kind: str, height: int, width: int) -> np.ndarray:
    return np.frombuffer(image_file(image=noise(height, width), **STORED[kind]), np.uint8)


@pytest.mark.parametrize("kind", STORED)
def test_it_is_what_the_file_was_made_with_and_damage_never_raises(kind):
    for size in [(1, 300), (257, 3), (40, 60)]:
        assert stored_size(stored(kind, *size)) == size
    encoded = stored(kind, 40, 60)
    for damaged in (encoded[:0], encoded[:1], encoded[:3], encoded[:13], np.zeros_like(encoded), encoded[1:]):
        assert stored_size(damaged) is None
    erased = encoded.copy()
    erased[2:30] = 0
    assert stored_size(erased) != (40, 60)
    generator = np.random.default_rng(1)
    for _ in range(50):
        stored_size(generator.permutation(encoded[:200]))
        changed = encoded[: int(generator.integers(1, len(encoded)))].copy()
        changed[generator.integers(0, len(changed), 20)] = generator.integers(0, 256, 20)
        stored_size(changed)


def test_a_frame_without_an_end_to_the_segments_before_it():
    assert stored_size(np.frombuffer(b"\xff\xd8\xff\xe0\xff\xff" + bytes(64), np.uint8)) is None
    assert stored_size(np.frombuffer(b"\xff\xd8" + b"\xff" * 64, np.uint8)) is None


def test_links(folder, cache, tmp_path):
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
    good = [name for name, bad in zip(names(dataset), dataset.is_bad(np.arange(7)), strict=True) if not bad]
    assert good == ["a.jpg", "b/c.png", "b/deep/d.webp", "file.jpg", "linked/e.jpg"]
    assert [bad.reason for bad in dataset.bad] == ["dangling link"] * 2


def test_cache_is_used_until_the_folder_changes(folder, cache, monkeypatch):
    first = open_dataset(folder, cache_dir=cache)
    built = []
    build = index_module.build_index
    monkeypatch.setattr(index_module, "build_index", lambda *a, **k: built.append(1) or build(*a, **k))
    again = open_dataset(folder, cache_dir=cache)
    assert not built
    assert names(again) == names(first)
    assert again.hash == first.hash

    (folder / "z.jpg").write_bytes(image_file("JPEG", noise()))
    assert len(open_dataset(folder, cache_dir=cache)) == 4
    os.utime(folder / "z.jpg", (1, 1))
    assert len(open_dataset(folder, cache_dir=cache)) == 4
    assert len(built) == 2
    open_dataset(folder, cache_dir=cache)
    assert len(built) == 2
    assert not [path for path in cache.glob("writing-*") if path.is_dir()]

    assert len(list(cache.glob("index-*"))) == 3  # other runs may be reading the old ones
    for old in cache.glob("index-*"):
        os.utime(old, (1, 1))
    (folder / "z.jpg").unlink()
    (folder / "y.jpg").write_bytes(image_file("JPEG", noise()))
    replaced = open_dataset(folder, cache_dir=cache)
    assert len(list(cache.glob("index-*"))) == 2  # the one before counts from today
    assert replaced.index.folder in cache.glob("index-*")


@pytest.fixture
def headers(monkeypatch) -> list[str]:
    """The names of the files whose headers are read."""
    read: list[str] = []

    def parse(file, name):
        read.append(Path(name).name)
        return parse_header(file, name)

    monkeypatch.setattr(sources_module, "parse_header", parse)
    return read


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
    np.save(root / "a" / "4.npy", np.zeros((4, 50, 60), np.uint8))
    (root / "0").mkdir()  # another class, and so other labels
    np.save(root / "0" / "new.npy", np.zeros((4, 70, 80), np.uint8))
    again = opened(cache)
    assert sorted(headers) == ["4.npy", "bad.npy", "new.npy"]
    anew = opened(tmp_path / "anew")
    assert again.hash == anew.hash
    ids = np.arange(7)
    assert np.array_equal(again.rows(ids), anew.rows(ids))
    assert again.bad == anew.bad != []


def test_a_build_that_was_killed_is_continued(tmp_path, cache, headers, monkeypatch):
    root = tmp_path / "many"
    root.mkdir()
    content = image_file("JPEG", noise())
    for i in range(700):
        (root / f"{i:03}.jpg").write_bytes(content)
    source, accepts = find_source(root, workers=1), index_module.Accepts()
    monkeypatch.setattr(sources_module, "_AT_ONCE", 64)
    expected, read = index_module.build_index(source, accepts), sources_module.parse_header

    def publish(progress=None):
        options = {"cache_dir": cache, "workers": 1, "progress": progress}
        return index_module.publish_index(source, root, accepts, **options)

    def kill(*_):
        raise KeyboardInterrupt

    def assert_killed(progress=None):
        with pytest.raises(KeyboardInterrupt):
            publish(progress)
        assert not list(cache.glob("index-*"))
        [names] = cache.glob("writing-*/names.npy")
        os.truncate(names, names.stat().st_size - 3)  # a kill leaves any part of what was being written

    headers.clear()
    with monkeypatch.context() as patch:
        patch.setattr(sources_module, "parse_header", lambda *call: read(*call) if len(headers) < 500 else kill())
        assert_killed()
    assert_killed(kill)  # while the rows of the first build are copied
    headers.clear()
    index = publish()
    assert 0 < len(headers) < 400
    assert index.hash == expected.hash
    assert not list(cache.glob("writing-*/*"))


def test_the_order_is_that_of_whole_paths(tmp_path, cache):
    paths = ["a.jpg", "a/x.jpg", "a!/x.jpg", "a-/x.jpg", "ab/x.jpg", "a/b/c.jpg", "a/b.jpg", "é/x.jpg", "Z.jpg"]
    for path in paths:
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / path).write_bytes(JPEG)
    dataset = open_dataset(tmp_path / "images", cache_dir=cache)
    assert names(dataset) == sorted(paths)
    assert dataset.classes == ["a", "a!", "a-", "ab", "é"]
    labels = [path.partition("/")[0] for path in sorted(paths)]
    found = dataset.labels(np.arange(9)).tolist()
    assert [dataset.classes[n] if n >= 0 else path for n, path in zip(found, labels, strict=True)] == labels


def test_the_index_lies_beside_the_data_or_else_in_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    dataset = open_dataset(folder)
    assert dataset.index.folder.parent == folder / ".fastmae"
    assert not (tmp_path / "home").exists()
    assert open_dataset(folder).index.folder == dataset.index.folder
    (folder / "list.txt").write_text("a.jpg\n")
    assert len(open_dataset(folder / "list.txt")) == 1
    (folder / "list.txt").unlink()
    moved = tmp_path / "moved"
    folder.rename(moved)
    monkeypatch.setattr(index_module, "build_index", lambda *_, **__: pytest.fail("built"))
    assert open_dataset(moved).hash == dataset.hash
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".fastmae").touch()  # no folder can be made here
    (tmp_path / "other" / "a.jpg").write_bytes(JPEG)
    assert open_dataset(tmp_path / "other").index.folder.parent == tmp_path / "home/.cache/fastmae"


def test_an_index_that_is_named_is_trusted_and_refused_where_it_cannot_be(folder, tmp_path, monkeypatch, caplog):
    home = tmp_path / "index"
    first = open_dataset(folder, index=home)
    (folder / "z.jpg").write_bytes(JPEG)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda path: pytest.fail(f"{path} was listed"))
        for place in (home, first.index.folder):
            assert open_dataset(folder, index=place).hash == first.hash
    assert not caplog.records
    assert len(open_dataset(folder, index=home, max_pixels=10**6)) == 4  # of other options: none yet
    with pytest.raises(DataError, match=r"--data\.index .*built with other channels"):
        open_dataset(folder, index=first.index.folder, channels=1)
    with pytest.raises(DataError, match="no such folder"):
        open_dataset(tmp_path / "missing", index=home)
    staged = tmp_path / "staged"
    folder.rename(staged)
    assert open_dataset(staged, index=home).path(0) == str(staged / "a.jpg")
    assert f"built from {folder}" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"--data\.index .*file/index: cannot be written"):
        open_dataset(staged, index=tmp_path / "file" / "index")


def test_verdicts_of_a_full_decode_are_remembered(folder, cache):
    dataset = open_dataset(folder, max_bad_fraction=0.5, cache_dir=cache)
    marked = dataset.mark_bad({1: "does not decode"})
    assert marked.bad == [(str(folder / "b" / "c.png"), "does not decode")]
    assert marked.hash != dataset.hash
    assert dataset.bad == []
    again = open_dataset(folder, max_bad_fraction=0.5, cache_dir=cache)
    assert again.bad == marked.bad
    assert again.hash == marked.hash
    assert again.mark_bad({1: "something else"}).bad == marked.bad
    assert len(again.mark_bad({0: "also"}).bad) == 2
    with pytest.raises(DataError, match="2 of 3 images"):
        open_dataset(folder, max_bad_fraction=0.5, cache_dir=cache)


def test_a_damaged_cache_is_rebuilt_and_none_is_no_error(folder, cache, tmp_path, caplog):
    first = open_dataset(folder, cache_dir=cache)
    expected = names(first), first.hash
    for damage in ("manifest.json", "rows.npy", "names.npy"):
        [file] = cache.glob(f"index-*/{damage}")
        file.write_bytes(file.read_bytes()[:-9])
        again = open_dataset(folder, cache_dir=cache)
        assert (names(again), again.hash) == expected
    (tmp_path / "file").touch()
    again = open_dataset(folder, cache_dir=tmp_path / "file" / "cache")
    assert (names(again), again.hash) == expected
    assert "not cached" in caplog.text


def test_hash_is_of_the_content_not_of_the_place_or_of_threads(folder, cache, tmp_path):
    for i in range(40):
        (folder / f"{i}.png").write_bytes(image_file("PNG", noise(3 + i, 5)))
    source, accepts = find_source(folder), index_module.Accepts()
    one, many = (index_module.build_index(source, accepts, workers=n) for n in (1, 8))
    assert one.hash == many.hash
    assert np.array_equal(one.rows(np.arange(43)), many.rows(np.arange(43)))
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert open_dataset(moved, cache_dir=cache).hash == one.hash
    (moved / "a.jpg").rename(moved / "aa.jpg")
    assert open_dataset(moved, cache_dir=cache).hash != one.hash


def test_unusable_folders_are_clear_errors(tmp_path, cache):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    for name in ("empty", "text", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "readme.txt").write_text("hello")
    (tmp_path / "bad" / "empty.jpg").touch()
    for name, message in {
        "missing": "no such folder or file",
        "a.jpg": "is a file",
        "empty": "no image",
        "text": "no image",
        "bad": "(?s)only 1 unusable.*empty file",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            open_dataset(tmp_path / name, cache_dir=cache)
        assert str(tmp_path / name) in str(caught.value)
        assert "expected a folder" in str(caught.value)


def test_options_out_of_range(folder, cache):
    refused = {
        "max_bad_fraction": [1.5],
        "channels": [0],
        "max_pixels": [0, 1 << 30],
        "value_range": [(2, 1), (0, 1, 2), (0, 1, 0, 1), (0, float("inf"))],
    }
    for option, values in refused.items():
        for value in values:
            with pytest.raises(ValueError, match=option):
                open_dataset(folder, cache_dir=cache, **{option: value})


def test_a_file_system_that_fails_for_a_moment(folder, cache, monkeypatch):
    monkeypatch.setattr(errors, "PAUSES", (0.0, 0.0))
    dataset = open_dataset(folder, cache_dir=cache)
    failures = [OSError(5, "Input/output error")] * 2

    def flaky(*args, real=np.fromfile):
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(np, "fromfile", flaky)
    assert bytes(dataset.read(0)) == (folder / "a.jpg").read_bytes()
    failures += [OSError(5, "Input/output error")] * 3
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read after 3 tries"):
        dataset.read(0)
