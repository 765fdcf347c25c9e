"""Files found bad: listed, counted, and judged over all ranks at the same step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from distributed import run_ranks
from training import make_trainer, write_images

from fastmae import data
from fastmae.data import DataError
from fastmae.train import parallel
from fastmae.train.checkpoint import Ranks
from fastmae.train.trainer import Trainer

OPTIONS = {"global_batch_size": 2, "checkpoint_every_steps": 1, "keep_checkpoints": 99}


def cut(images: Path) -> None:
    """Three files of eleven lose their ends."""
    for name in ("2.jpg", "5.jpg", "7.jpg"):
        content = (images / name).read_bytes()
        (images / name).write_bytes(content[: len(content) // 2])


def open_images(images: Path, rank: int = 0) -> data.Dataset:
    return data.open_dataset(images, cache_dir=images.parent / f"cache-{rank}", max_bad_fraction=0.2)


def end(trainer: Trainer) -> tuple[int, str]:
    """The step at which too many files are bad, and the error."""
    with trainer.run, pytest.raises(DataError, match="3 of 11 images cannot be used") as error:
        trainer.fit()
    return trainer.step, str(error.value)


def end_on_two(rank: int, images: Path, out: Path) -> tuple[int, str]:
    with Ranks.create() as ranks:
        dataset = open_images(images, rank)
        ranks.gather("opening the data", lambda: None)
        ranks.first("cutting files", lambda: cut(images))
        options = {"dataset": dataset, "place": parallel.initialize("ddp", "cpu"), "ranks": ranks, "parallel": "ddp"}
        return end(make_trainer(out, images, **options, **OPTIONS))


def test_files_are_judged_at_the_same_step_on_two_ranks_and_after_resuming(tmp_path):
    """They are cut after the index was made, and two are allowed."""
    images, straight = write_images(tmp_path / "images"), tmp_path / "straight"
    first, second = run_ranks(end_on_two, 2, images, tmp_path / "two")
    dataset = open_images(write_images(images))  # whole again
    cut(images)
    alone = end(make_trainer(straight, images, dataset=dataset, **OPTIONS))
    assert first == second == alone
    assert alone[0] > 1
    listed = (straight / "bad_files.jsonl").read_text()
    assert sorted(Path(json.loads(line)["path"]).name for line in listed.splitlines()) == ["2.jpg", "5.jpg", "7.jpg"]
    assert (tmp_path / "two/bad_files.jsonl").read_text() == listed
    for step in (1, alone[0] - 1):
        out = tmp_path / f"from-{step}"
        shutil.copytree(straight / f"checkpoints/step-{step}", out / f"checkpoints/step-{step}")
        resumed = make_trainer(out, images, resume=True, dataset=dataset, **OPTIONS)
        resumed.resume(out / f"checkpoints/step-{step}")
        assert end(resumed) == alone
        assert (out / "bad_files.jsonl").read_text() == listed


def test_files_that_the_index_knows_are_listed_and_counted(tmp_path):
    images = write_images(tmp_path / "images")
    (images / "3.jpg").write_bytes(b"")
    (images / "5.jpg").write_bytes((images / "5.jpg").read_bytes()[:500])
    trainer = make_trainer(tmp_path / "run", images, options={"max_bad_fraction": 0.2})
    with trainer.run as run:
        trainer.fit()
    lines = [json.loads(line) for line in (run.path / "bad_files.jsonl").read_text().splitlines()]
    found = [(line["path"], line["found"]) for line in lines]
    assert found == [(str(images / "3.jpg"), "index"), (str(images / "5.jpg"), "index")]
    assert [trainer.dataset.path(line["sample_id"]) for line in lines] == [line["path"] for line in lines]
    assert "empty" in lines[0]["reason"]
    assert [row["bad_files"] for row in run.read_metrics()] == [2, 2, 2]
