"""Both loaders where something goes wrong or ends: the same answer to files that do not decode, no thread left."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from loading import KINDS, OPTIONS, assert_equal, picture_bytes, refused_by_dali_alone, smooth, take, write_mixed
from PIL import Image

from fastmae.data import Augment, DataError, Dataset, create, create_loader, open_dataset
from fastmae.data import loader as loader_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_mixed(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def dataset(folder, tmp_path_factory) -> Dataset:
    return open_dataset(folder, max_bad_fraction=0, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def spoilt(tmp_path) -> Dataset:
    """Eight images, of which 2 and 5 are damaged in the middle, so that no check of header and end can tell."""
    for i in range(8):
        Image.fromarray(smooth(64, 64, i)).save(tmp_path / f"{i}.png")
    for i in (2, 5):
        content = bytearray((tmp_path / f"{i}.png").read_bytes())
        middle = len(content) // 2
        content[middle : middle + 200] = bytes(200)
        (tmp_path / f"{i}.png").write_bytes(content)
    dataset = open_dataset(tmp_path, max_bad_fraction=0.5, cache_dir=tmp_path / ".cache")
    assert len(dataset) == 8
    assert dataset.bad == []
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
    for step in (1, 3):  # a new loader does not know yet what is bad
        assert_equal(take(spoilt, kind, 8 - step, position=5 * step, num_threads=3), batches[step:])


@pytest.mark.skipif(not create.has_dali(), reason="needs NVIDIA DALI")
def test_both_loaders_replace_alike(spoilt):
    assert_equal(take(spoilt, "torch", 8), take(spoilt, "dali", 8))


@pytest.mark.skipif(not create.has_dali(), reason="needs NVIDIA DALI")
def test_what_only_dali_refuses_is_decoded_on_the_host(tmp_path, monkeypatch, caplog):
    """Nearly every batch holds such a file, and a third file is one that nothing decodes."""
    from fastmae.data.dali_loader import DaliLoader

    for i in range(8):
        encoded = refused_by_dali_alone(seed=i) if i in (2, 5) else picture_bytes(i)
        (tmp_path / f"{i}.jpg").write_bytes(encoded)
    dataset = open_dataset(tmp_path, max_bad_fraction=0.5, cache_dir=tmp_path / ".cache")
    assert dataset.bad == []
    content = picture_bytes(6)
    (tmp_path / "6.jpg").write_bytes(content[: len(content) * 9 // 10])
    built, build = [], DaliLoader._build
    monkeypatch.setattr(DaliLoader, "_build", lambda self, step: built.append(step) or build(self, step))
    with create_loader(dataset, loader="dali", **OPTIONS) as loader:
        batches = [next(loader) for _ in range(16)]
        assert [Path(bad.path).name for bad in loader.bad_files] == ["6.jpg"]
    assert [caplog.text.count(f"{i}.jpg: ") for i in range(8)] == [0, 0, 1, 0, 0, 1, 1, 0]
    assert len(built) <= 4  # not one for each time that such a file comes
    decoded_twice = {"augment": Augment(crop="center")}  # whole images, so that DALI reads the damage of every file
    assert_equal(*(take(dataset, kind, 8, **decoded_twice) for kind in ("torch", "dali")))
    for step in (1, 7):
        assert_equal(take(dataset, "dali", 16 - step, position=5 * step, num_threads=3), batches[step:])


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
def test_nothing_decodes(tmp_path, kind):
    Image.fromarray(smooth(64, 64, 0)).save(tmp_path / "0.png")
    content = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(content[:60] + bytes(500) + content[560:])
    dataset = open_dataset(tmp_path, cache_dir=tmp_path / ".cache")
    with create_loader(dataset, loader=kind, **OPTIONS) as loader, pytest.raises(DataError, match="1 of 1 images"):
        next(loader)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_disappears_stops(spoilt, kind, monkeypatch):
    from fastmae.data import retry

    monkeypatch.setattr(retry, "PAUSES", (0.0,))
    Path(spoilt.path(3)).unlink()
    with create_loader(spoilt, loader=kind, **OPTIONS) as loader, pytest.raises(DataError, match=r"3\.png: cannot be"):
        [next(loader) for _ in range(4)]


@pytest.mark.skipif(not create.has_dali(), reason="needs NVIDIA DALI")
def test_an_error_in_planning_reaches_the_right_step(dataset, monkeypatch):
    expected = take(dataset, "dali", 3)
    plan = loader_module.Loader.plan

    def failing(self, step):
        if step >= 3:
            raise DataError("the plan failed")
        return plan(self, step)

    monkeypatch.setattr(loader_module.Loader, "plan", failing)
    with create_loader(dataset, loader="dali", **OPTIONS) as loader:
        assert_equal([next(loader) for _ in range(3)], expected)
        with pytest.raises(DataError, match="the plan failed"):
            next(loader)


@pytest.mark.skipif(not create.has_dali(), reason="needs NVIDIA DALI")
def test_what_dali_cannot_do_is_done_on_the_host(dataset, monkeypatch, caplog):
    from fastmae.data.dali_loader import DaliLoader

    failing = {2}

    def broken(self, plan, *others):
        if plan.step in failing:
            raise RuntimeError("an error of DALI's own")
        return deliver(self, plan, *others)

    expected, deliver = take(dataset, "dali", 5), DaliLoader._deliver
    monkeypatch.setattr(DaliLoader, "_deliver", broken)
    for ours, theirs in zip(take(dataset, "dali", 5), expected, strict=True):
        assert torch.equal(ours.sample_ids, theirs.sample_ids)
        assert (ours.images.int() - theirs.images.int()).abs().max() <= 2
    assert "decoded on the host" in caplog.text
    failing.update(range(100))
    with pytest.raises(DataError, match="in a row: an error of DALI's own"):
        take(dataset, "dali", 15)


# Beginning and end


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_runs_after_closing(dataset, kind):
    before = set(threading.enumerate())
    loader = create_loader(dataset, loader=kind, **OPTIONS)
    next(loader)
    loader.close()
    loader.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("fastmae")]
    with pytest.raises(ValueError, match="closed"):
        next(loader)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forgotten_loader_ends_its_threads(dataset, kind):
    before = set(threading.enumerate())
    loader = create_loader(dataset, loader=kind, **OPTIONS)
    next(loader)
    reference = weakref.ref(loader)
    del loader
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        gc.collect()
        left = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("fastmae")]
        if reference() is None and not left:
            return
        time.sleep(0.02)
    pytest.fail(f"still there: {reference()} {left}")


def test_a_process_ends_without_closing(folder, tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from fastmae.data import create_loader, has_dali, open_dataset
dataset = open_dataset(Path({str(folder)!r}), cache_dir=Path({str(tmp_path)!r}))
options = dict(batch_size=64, img_size=(64, 64), seed=0)
loaders = [create_loader(dataset, loader=kind, **options) for kind in ("torch", "dali")[: 1 + has_dali()]]
for batches in zip(*loaders):
    os.kill(os.getpid(), signal.SIGINT)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180)
    assert result.stderr.rstrip().endswith("KeyboardInterrupt")
    assert result.returncode in (-2, 130)


def test_which_loader(dataset, monkeypatch):
    photographs = open_dataset(None)
    assert create.choose_loader(photographs) == "torch"
    monkeypatch.setattr(create, "has_dali", lambda: True)
    assert create.choose_loader(dataset) == "dali"
    assert create.choose_loader(photographs, "dali") == "dali"
    monkeypatch.setattr(create, "has_dali", lambda: False)
    assert create.choose_loader(dataset) == "torch"
    with pytest.raises(DataError, match=r"dali-cuda13.*dali-cuda12"):
        create_loader(dataset, loader="dali", **OPTIONS)


def test_importing_the_package_imports_no_decoder():
    program = (
        "import sys, fastmae.data; print([m for m in ('nvidia.dali', 'skimage', 'torchvision') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loader", "pillow"),
        ("batch_size", 0),
        ("img_size", (0, 32)),
        ("rank", 2),
        ("world_size", 0),
        ("position", -1),
        ("num_threads", 0),
        ("seed", -1),
    ],
)
def test_arguments_out_of_range_are_refused(dataset, name, value):
    with pytest.raises(ValueError, match=name):
        create_loader(dataset, **({"loader": "torch"} | OPTIONS | {name: value}))


def test_damaged_bytes_never_take_the_process_down():
    """Each decoder, on files with holes, cuts and zeros; in a process of its own, because the failure is a crash."""
    image = Image.fromarray(smooth(60, 80, 0))
    encoded = []
    for format_, options in [("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("PNG", {})]:
        buffer = io.BytesIO()
        image.save(buffer, format_, **options)
        encoded.append(buffer.getvalue())
    program = f"""
import numpy as np
from fastmae.data.decode import UndecodableImage, decode
random, refused = np.random.default_rng(0), 0
for content in {encoded!r}:
    for trial in range(90):
        damaged = np.frombuffer(content, np.uint8).copy()
        at = random.integers(20, len(damaged) - 50)
        length = random.integers(10, 500)
        if trial % 3 == 0:
            damaged[at : at + length] = 0
        elif trial % 3 == 1:
            damaged = np.delete(damaged, slice(at, at + length))
        else:
            damaged[random.integers(20, len(damaged), 10)] = random.integers(0, 256, 10)
        try:
            assert decode(damaged).dtype == np.uint8
        except UndecodableImage:
            refused += 1
print(refused)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) > 100
