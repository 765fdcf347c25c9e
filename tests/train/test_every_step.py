"""Stopped at any step, a run continues to the same weights and the same rows, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from training import LOADERS, assert_same_tensors, fitted, make_trainer, needs_dali, numbers, write_images, write_shards

from fastmae import data
from fastmae.train.trainer import Trainer

STEPS = 10
ROWS = [3, 6, 9, 10]
PLAIN = {"steps": STEPS, "log_every_steps": 3}
# The epoch that changes the size begins within the sixth step. A global batch of 8 is 4 images with two masks each, in
# two forward passes.
RICH = PLAIN | {"masks_per_image": 2, "batch_size": 4, "clip_grad": 1.0}
RICH_DATA = {"progressive_sizes": (16, 32), "color_jitter": 0.3, "scale": (0.2, 1.0), "vflip": 0.3}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def assert_every_step_resumes(tmp_path: Path, path: Path, stops: Iterable[int] = range(STEPS), **options) -> Trainer:
    """Run straight, saving at every step; continue from saves in copies of the folder; return the straight run."""
    straight = fitted(tmp_path / "straight", path, checkpoint_every_steps=1, keep_checkpoints=99, **options)
    for step in stops:
        out = tmp_path / f"from-{step}"
        (out / "checkpoints").mkdir(parents=True)
        shutil.copytree(straight.run.checkpoints / f"step-{step}", out / f"checkpoints/step-{step}")
        for name in ("metrics.jsonl", "bad_files.jsonl"):
            shutil.copy(straight.run.path / name, out)
        torch.manual_seed(step + 100)
        resumed = make_trainer(out, path, resume=True, **options)
        assert resumed.resume(out / f"checkpoints/step-{step}") == []
        assert resumed.fit() == "finished"
        resumed.run.close()
        assert numbers(resumed.run) == numbers(straight.run), step
        assert_same_tensors(straight.run.checkpoints / f"step-{STEPS}", out / f"checkpoints/step-{STEPS}")
        assert (out / "bad_files.jsonl").read_text() == (straight.run.path / "bad_files.jsonl").read_text()
    return straight


@pytest.mark.parametrize(
    ("loader", "stops"),
    [
        ("torch", (2, 5, 6, 9)),
        pytest.param("torch", range(STEPS), marks=pytest.mark.slow),
        pytest.param("dali", range(STEPS), marks=[pytest.mark.slow, needs_dali]),
    ],
    ids=str,
)
def test_shards_with_changing_sizes_jitter_and_two_masks_per_image(tmp_path, images, loader, stops):
    """The same images in a folder give the same run."""
    shards, options = write_shards(tmp_path / "shards", images), {"loader": loader, "options": RICH_DATA, **RICH}
    run = assert_every_step_resumes(tmp_path, shards, stops, **options).run
    assert [row["input_height"] for row in run.read_metrics()] == [16, 16, 32, 32]
    assert numbers(fitted(tmp_path / "folder", images, **options).run) == numbers(run)


@pytest.mark.parametrize("loader", LOADERS)
def test_with_a_file_that_is_found_bad_on_the_way(tmp_path, loader):
    """DALI reads as much of a JPEG as the crop needs, so some crops of a cut one decode. From the first that does not,
    the file is out for good, also for a run that continues from a checkpoint and has not seen it fail."""
    images = write_images(tmp_path / "images", count=5)
    dataset = data.open_dataset(images, cache_dir=tmp_path / "cache", max_bad_fraction=0.5)
    for name in ("2.jpg", "3.jpg"):  # after the index was made
        content = (images / name).read_bytes()
        (images / name).write_bytes(content[: int(len(content) * 0.9)].ljust(len(content), b"\xff"))
    options = {"scale": (0.05, 0.3), "max_bad_fraction": 0.5}
    run = assert_every_step_resumes(
        tmp_path, images, (0, 4, 8), loader=loader, dataset=dataset, options=options, **PLAIN | {"global_batch_size": 2}
    ).run
    lines = [json.loads(line) for line in (run.path / "bad_files.jsonl").read_text().splitlines()]
    assert sorted(Path(line["path"]).name for line in lines) == ["2.jpg", "3.jpg"]
    assert all(1 <= line["found"] <= STEPS and "does not decode" in line["reason"] for line in lines)
    assert [dataset.path(line["sample_id"]) for line in lines] == [line["path"] for line in lines]
    counts = [row["bad_files"] for row in run.read_metrics()]
    assert counts == [sum(line["found"] <= step for line in lines) for step in ROWS]
