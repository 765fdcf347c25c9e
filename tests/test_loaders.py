"""Both loaders: one protocol, the same samples, boxes and flips, and the same answer to files that do not decode."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastmae.data import Augment, DataError, Dataset, create, create_loader, crop_boxes, flips, open_dataset
from fastmae.data import loader as loader_module

KINDS = [
    "torch",
    pytest.param("dali", marks=pytest.mark.skipif(not create.has_dali(), reason="needs NVIDIA DALI")),
]
OPTIONS = {"batch_size": 5, "img_size": (32, 48), "seed": 3}


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """A picture with structure at several scales, uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save_16_bit(path: Path, values: np.ndarray) -> None:
    Image.fromarray((values.astype(np.uint16) * 257) ^ 0x55).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    image = Image.fromarray(smooth(90, 120, 0))
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(smooth(90, 120, 1)[..., 0]))
    image.save(root / "baseline.jpg", quality=95)
    image.save(root / "progressive.jpg", progressive=True)
    image.convert("L").save(root / "grey.jpg")
    image.convert("CMYK").save(root / "cmyk.jpg")
    image.save(root / "rgb.png")
    image.convert("L").save(root / "grey.png")
    image.convert("1").save(root / "bilevel.png")
    image.quantize(64).save(root / "palette.png")
    image.quantize(64).save(root / "palette_transparent.png", transparency=3)
    alpha.save(root / "rgba.png")
    alpha.convert("LA").save(root / "grey_alpha.png")
    save_16_bit(root / "grey16.png", smooth(90, 120, 2)[..., 0])
    image.save(root / "lossy.webp")
    alpha.save(root / "lossless.webp", lossless=True)
    Image.fromarray(smooth(2, 2, 3)).save(root / "tiny.png")
    Image.fromarray(smooth(3, 200, 4)).save(root / "long.png")
    for orientation in (3, 5, 6, 8):
        tags = Image.Exif()
        tags[0x0112] = orientation
        for suffix in ("jpg", "png", "webp"):
            Image.fromarray(smooth(60, 100, orientation)).save(root / f"turned{orientation}.{suffix}", exif=tags)
    return root


@pytest.fixture(scope="module")
def dataset(folder, tmp_path_factory) -> Dataset:
    return open_dataset(folder, on_bad="stop", cache_dir=tmp_path_factory.mktemp("cache"))


def take(dataset: Dataset, kind: str, count: int, **options):
    with create_loader(dataset, loader=kind, **(OPTIONS | options)) as loader:
        assert loader.kind == kind
        return [next(loader) for _ in range(count)]


def assert_equal(first, second) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def upright(path: str) -> Image.Image:
    image = Image.open(path)
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return ImageOps.exif_transpose(image).convert("RGB")


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_channels_last_views(dataset, kind):
    [batch] = take(dataset, kind, 1)
    assert batch.images.shape == (5, 3, 32, 48)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for ids in (batch.sample_ids, batch.epochs):
        assert ids.dtype == torch.int64
        assert ids.shape == (5,)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_pixels_of_pillow(dataset, kind):
    augment = Augment(vflip=0.5)
    batches = take(dataset, kind, -(-len(dataset) // 5), augment=augment)
    ids = torch.cat([batch.sample_ids for batch in batches])[: len(dataset)]
    assert sorted(ids.tolist()) == list(range(len(dataset)))
    for batch in batches:
        keys = batch.sample_ids.numpy(), batch.epochs.numpy()
        boxes = crop_boxes(*keys, *dataset.shapes(keys[0]), seed=3, augment=augment)
        mirrored = flips(*keys, seed=3, augment=augment)
        for j, sample_id in enumerate(batch.sample_ids.tolist()):
            top, left, height, width = boxes[j]
            image = upright(dataset.path(sample_id)).crop((left, top, left + width, top + height))
            expected = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC)).astype(int)
            left_right, top_bottom = mirrored[j]
            expected = expected[:, ::-1] if left_right else expected
            expected = expected[::-1] if top_bottom else expected
            difference = np.abs(batch.images[j].permute(1, 2, 0).numpy() - expected)
            assert difference.mean() < 0.7, dataset.path(sample_id)
            assert difference.max() <= 4, dataset.path(sample_id)


@pytest.mark.skipif(not create.has_dali(), reason="needs NVIDIA DALI")
def test_loaders_agree(dataset):
    for ours, dalis in zip(take(dataset, "torch", 12), take(dataset, "dali", 12), strict=True):
        assert torch.equal(ours.sample_ids, dalis.sample_ids)
        assert torch.equal(ours.epochs, dalis.epochs)
        difference = (ours.images.int() - dalis.images.int()).abs().float()
        assert difference.mean() < 0.1  # of 255; only 16-bit files differ, by rounding
        assert difference.max() <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_restarting_anywhere_gives_the_same_batches(dataset, kind):
    straight = take(dataset, kind, 9)
    assert_equal(take(dataset, kind, 5, position=4 * 5), straight[4:])


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_matter(dataset, kind):
    assert_equal(take(dataset, kind, 6, num_threads=1), take(dataset, kind, 6, num_threads=5))


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_see_what_one_would(dataset, kind):
    whole = take(dataset, kind, 4, batch_size=6, position=11)
    ranks = [take(dataset, kind, 4, batch_size=3, position=11, rank=r, world_size=2) for r in range(2)]
    for step, batch in enumerate(whole):
        for tensor, halves in zip(batch, zip(ranks[0][step], ranks[1][step], strict=True), strict=True):
            assert torch.equal(tensor, torch.cat(halves))


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_does_not_matter(dataset, kind):
    small, large = take(dataset, kind, 6, batch_size=2), take(dataset, kind, 2, batch_size=6)
    for i, tensor in enumerate(zip(*large, strict=True)):
        assert torch.equal(torch.cat(tensor), torch.cat([batch[i] for batch in small]))


def test_decoded_once_or_each_time_is_the_same(dataset, monkeypatch):
    kept = take(dataset, "torch", 6)
    decoded = []
    decode = Dataset.decode
    monkeypatch.setattr(Dataset, "decode", lambda self, i: decoded.append(i) or decode(self, i))
    assert_equal(take(dataset, "torch", 12, cache_bytes=0)[:6], kept)
    assert len(decoded) > len(dataset)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_larger_than_the_data_set(tmp_path, kind):
    Image.fromarray(smooth(40, 40, 0)).save(tmp_path / "only.png")
    dataset = open_dataset(tmp_path, cache_dir=tmp_path / ".cache")
    [batch] = take(dataset, kind, 1, batch_size=4)
    assert batch.sample_ids.tolist() == [0, 0, 0, 0]
    assert batch.epochs.tolist() == [0, 1, 2, 3]
    assert not torch.equal(batch.images[0], batch.images[1])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(dataset, kind):
    on_gpu, on_host = take(dataset, kind, 8, device="cuda"), take(dataset, "torch", 8)
    for ours, theirs in zip(on_gpu, on_host, strict=True):
        assert ours.images.is_cuda
        assert ours.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours.sample_ids.cpu(), theirs.sample_ids)
        assert (ours.images.cpu().int() - theirs.images.int()).abs().float().mean() < 2
    assert_equal(take(dataset, kind, 4, device="cuda", position=4 * 5), on_gpu[4:])


# Files that go bad after the index was made


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
    dataset = open_dataset(tmp_path, cache_dir=tmp_path / ".cache")
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_found_bad_late_stops_by_option(spoilt, kind):
    spoilt.on_bad = "stop"
    with create_loader(spoilt, loader=kind, **OPTIONS) as loader:
        with pytest.raises(DataError, match=r"[25]\.png: does not decode"):
            [next(loader) for _ in range(4)]
        with pytest.raises(DataError):
            next(loader)


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

    def broken(self, plan, crops):
        if plan.step in failing:
            raise RuntimeError("an error of DALI's own")
        return deliver(self, plan, crops)

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
