"""Both loaders where something goes wrong or ends: the same answer to files that do not decode, no thread left."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from loading import (
    KINDS,
    OPTIONS,
    assert_equal,
    image_file,
    needs_dali,
    picture_bytes,
    png,
    refused_by_dali_alone,
    smooth,
    take,
)

from fastmae.data import Augment, DataError, Dataset, choose_loader, create_loader, open_dataset


@pytest.fixture
def spoilt(tmp_path) -> Dataset:
    """Eight images, of which 2 and 5 are damaged in the middle, so that no check of header and end can tell."""
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(png(damaged=i in (2, 5), seed=i, size=(64, 64)))
    dataset = open_dataset(tmp_path, max_bad_fraction=0.5, cache_dir=tmp_path / ".cache")
    assert (len(dataset), dataset.bad) == (8, [])
    return dataset


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_found_bad_late_is_replaced(spoilt, kind):
    with create_loader(spoilt, loader=kind, **OPTIONS) as loader:
        batches = [next(loader) for _ in range(8)]
        assert [Path(bad.path).name for bad in loader.bad_files] == ["2.png", "5.png"]
        assert all("does not decode" in bad.reason for bad in loader.bad_files)
    for step, batch in enumerate(batches):  # the keys are those of the samples that stood there
        assert batch.epochs.tolist() == [(5 * step + j) // 8 for j in range(5)]
    assert sorted(torch.cat([batch.sample_ids for batch in batches])[:8].tolist()) == list(range(8))
    # A new loader does not know yet what is bad, and both loaders replace alike.
    assert_equal(take(spoilt, kind, 5, position=15, num_threads=3), batches[3:])
    assert_equal(take(spoilt, "torch", 8), batches)


def test_photographs_found_bad_late_spoil_none_of_those_decoded_with_them(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(picture_bytes(i))
    dataset = open_dataset(tmp_path, max_bad_fraction=0.5, cache_dir=tmp_path / ".cache")
    options = {"batch_size": 8, "num_threads": 1, "cache_bytes": 0}
    before = take(dataset, "torch", 3, **options)
    whole, smaller = picture_bytes(2), image_file("JPEG", smooth(32, 32, 5))
    (tmp_path / "2.jpg").write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\xff"))
    (tmp_path / "5.jpg").write_bytes(smaller.ljust(len(picture_bytes(5)), b"\0"))
    with create_loader(dataset, loader="torch", **OPTIONS | options) as loader:
        after = [next(loader) for _ in range(3)]
        reasons = {Path(path).name: reason for path, reason in loader.bad_files}
    assert list(reasons) == ["2.jpg", "5.jpg"]
    assert "does not decode" in reasons["2.jpg"]
    assert "decodes to (32, 32), its header said (64, 64)" in reasons["5.jpg"]
    for ours, earlier in zip(after, before, strict=True):
        good = ~torch.isin(ours.sample_ids, torch.tensor([2, 5]))
        assert torch.equal(ours.images[good], earlier.images[good])
        assert not torch.equal(ours.images, earlier.images)


@needs_dali
def test_what_only_dali_refuses_is_decoded_on_the_host(tmp_path, monkeypatch, caplog):
    """Nearly every batch holds such a file, and a third file is one that nothing decodes."""
    from fastmae.data.dali import DaliDecoder

    for i in range(8):
        encoded = refused_by_dali_alone(seed=i) if i in (2, 5) else picture_bytes(i)
        (tmp_path / f"{i}.jpg").write_bytes(encoded)
    dataset = open_dataset(tmp_path, max_bad_fraction=0.5, cache_dir=tmp_path / ".cache")
    assert dataset.bad == []
    content = picture_bytes(6)
    (tmp_path / "6.jpg").write_bytes(content[: len(content) * 9 // 10].ljust(len(content), b"\xff"))
    built, build = [], DaliDecoder._build
    monkeypatch.setattr(DaliDecoder, "_build", lambda *args: built.append(args) or build(*args))
    with create_loader(dataset, loader="dali", **OPTIONS) as loader:
        batches = [next(loader) for _ in range(10)]
        assert [Path(bad.path).name for bad in loader.bad_files] == ["6.jpg"]
    assert [caplog.text.count(f"{i}.jpg: ") for i in range(8)] == [0, 0, 1, 0, 0, 1, 2, 0]
    assert len(built) <= 8  # not one for each time that such a file comes
    decoded_twice = {"augment": Augment(crop="center")}  # whole images, so that DALI reads the damage of every file
    assert_equal(*(take(dataset, kind, 8, **decoded_twice) for kind in ("torch", "dali")))
    assert_equal(take(dataset, "dali", 7, position=15, num_threads=3), batches[3:])


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_files_found_bad_late_stop(spoilt, kind):
    spoilt.max_bad_fraction = 0.2
    with create_loader(spoilt, loader=kind, **OPTIONS) as loader:
        with pytest.raises(
            DataError, match=r"2 of 8 images(.|\n)*[25]\.png: does not decode(.|\n)*--data.max-bad-fraction"
        ):
            [next(loader) for _ in range(4)]
        with pytest.raises(DataError):
            next(loader)
    options = OPTIONS | {"known_bad": loader.late_bad[:1]}
    with create_loader(spoilt, loader=kind, **options) as loader, pytest.raises(DataError, match="2 of 8 images"):
        [next(loader) for _ in range(4)]
    with create_loader(spoilt, loader=kind, limit_bad=False, **options) as loader:  # somebody else judges
        [next(loader) for _ in range(4)]
        assert len(loader.late_bad) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_disappear_and_data_that_does_not_decode_at_all_stop(spoilt, tmp_path, kind, monkeypatch):
    from fastmae.data import errors

    monkeypatch.setattr(errors, "PAUSES", (0.0,))
    Path(spoilt.path(3)).unlink()
    with create_loader(spoilt, loader=kind, **OPTIONS) as loader, pytest.raises(DataError, match=r"3\.png: cannot be"):
        [next(loader) for _ in range(4)]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "2.png").write_bytes(Path(spoilt.path(2)).read_bytes())
    dataset = open_dataset(tmp_path / "one", cache_dir=tmp_path / ".cache")
    with create_loader(dataset, loader=kind, **OPTIONS) as loader, pytest.raises(DataError, match="1 of 1 images"):
        next(loader)


@needs_dali
def test_batches_that_dali_cannot_make_are_made_on_the_host(dataset, monkeypatch, caplog):
    from fastmae.data.dali import DaliDecoder

    failing = {2}

    def broken(self, plan, encoded):
        if plan.step in failing:
            raise RuntimeError("an error of DALI's own")
        return run(self, plan, encoded)

    expected, run = take(dataset, "dali", 5), DaliDecoder._run
    monkeypatch.setattr(DaliDecoder, "_run", broken)
    for ours, theirs in zip(take(dataset, "dali", 5), expected, strict=True):
        assert torch.equal(ours.sample_ids, theirs.sample_ids)
        assert (ours.images.int() - theirs.images.int()).abs().max() <= 2
    assert "decoded on the host" in caplog.text
    failing.update(range(100))
    with pytest.raises(DataError, match="in a row: an error of DALI's own"):
        take(dataset, "dali", 15)


# Beginning and end


def left_running(before: set[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("fastmae")]


@pytest.mark.parametrize("kind", KINDS)
def test_closing_or_forgetting_a_loader_ends_its_threads(dataset, kind):
    before = set(threading.enumerate())
    closed, forgotten = (create_loader(dataset, loader=kind, **OPTIONS) for _ in range(2))
    for loader in (closed, forgotten):
        next(loader)
    reference = weakref.ref(forgotten)
    del forgotten, loader
    deadline = time.monotonic() + 30
    while reference() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    assert reference() is None
    closed.close()
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        next(closed)
    while left_running(before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left_running(before)


def test_which_loader(dataset, monkeypatch):
    photographs = open_dataset(None)
    assert choose_loader(photographs) == "torch"
    monkeypatch.setattr("fastmae.data.open.has_dali", lambda: True)
    assert choose_loader(dataset) == "dali"
    assert choose_loader(photographs, "dali") == "dali"
    monkeypatch.setattr("fastmae.data.open.has_dali", lambda: False)
    assert choose_loader(dataset) == "torch"
    with pytest.raises(DataError, match=r"dali-cuda13.*dali-cuda12"):
        create_loader(dataset, loader="dali", **OPTIONS)


def test_arguments_out_of_range_are_refused(dataset):
    refused = {"loader": "pillow", "batch_size": 0, "img_size": (0, 32), "rank": 2, "world_size": 0, "position": -1}
    refused |= {"num_threads": 0, "seed": -1, "prefetch": 0, "timeout": 0, "hw_decoder_load": 1.5}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=name):
            create_loader(dataset, **({"loader": "torch"} | OPTIONS | {name: value}))
    with pytest.raises(ValueError, match="img_size"):
        create_loader(dataset, **(OPTIONS | {"img_size": lambda epoch: (0, 8)}))
