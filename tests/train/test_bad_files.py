"""Files found bad while training: sent once to the other ranks, and judged over all of them at the same step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch.distributed as dist
from distributed import run_ranks
from training import make_trainer, write_images

from fastmae import data
from fastmae.data import DataError, LateBad
from fastmae.train.bad_files import BadFiles
from fastmae.train.checkpoint import Ranks
from fastmae.train.trainer import Trainer

PER_STEP = 8


class Files:
    """A data set of 640 files, of which at most six may be bad."""

    bad_ids, index = (), SimpleNamespace(bad={})
    root, max_bad_fraction = "files", 0.01
    check_bad_fraction, _found = data.Dataset.check_bad_fraction, data.Dataset._found

    def __len__(self):
        return 640

    def path(self, sample_id: int) -> str:
        return f"{sample_id}.jpg"


def trainer_of(ranks, path: Path, late: list[LateBad], known=()):
    """As much of a trainer as exchanges bad files."""
    bad_files = BadFiles(path, Files(), lambda position: position // PER_STEP + 1, writes=ranks.rank == 0)
    bad_files.load_state_dict({"late": known})
    loader = SimpleNamespace(late_bad=late)
    return SimpleNamespace(ranks=ranks, dataset=Files(), bad_files=bad_files, loader=loader)


def exchange(rank: int, path: Path) -> tuple[list[int], list[int], str]:
    """Two ranks find a file each at every step from the third to the sixth, and one that both find.

    Returns:
        How many files each step sent from this rank, how many are known after it, and how it ended.
    """
    sent, known, gather = [], [], dist.all_gather_object

    def counted(outcomes, own, group):
        sent[-1] += len(own[0])
        return gather(outcomes, own, group)

    with Ranks.create() as ranks, patch.object(dist, "all_gather_object", counted):
        both = LateBad(600, "cut", 2 * PER_STEP + 5 * rank)
        finds = [both, *(LateBad(10 * step + rank, "cut", step * PER_STEP + 3 + rank) for step in range(2, 6))]
        trainer = trainer_of(ranks, path, finds)
        try:
            for step in range(1, 8):
                trainer.samples = step * PER_STEP
                sent.append(0)
                Trainer._note_bad_files(trainer)
                known.append(len(trainer.bad_files))
        except DataError as error:
            return sent, known, str(error)
    return sent, known, ""


def test_finds_are_sent_once_and_judged_together(tmp_path):
    path = tmp_path / "bad.jsonl"
    first, second = run_ranks(exchange, 2, path)
    assert first == second  # each finds five, which is allowed, and both together nine
    sent, known, error = first
    assert sent == [0, 0, 2, 1, 1]
    assert known == [0, 0, 3, 5]
    assert "7 of 640 images cannot be used" in error
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["sample_id"] for line in lines] == [600, 20, 21, 30, 31, 40, 41]  # by where the first rank met them


def test_a_resumed_run_ends_at_the_step_at_which_the_undisturbed_one_does(tmp_path):
    """Three of eleven files lose their ends after the index was made, and two are allowed."""
    images = write_images(tmp_path / "images")
    dataset = data.open_dataset(images, cache_dir=tmp_path / "cache", max_bad_fraction=0.2)
    for name in ("2.jpg", "5.jpg", "7.jpg"):
        content = (images / name).read_bytes()
        (images / name).write_bytes(content[: len(content) // 2])
    options = {"dataset": dataset, "global_batch_size": 2, "checkpoint_every_steps": 1, "keep_checkpoints": 99}

    def ends(trainer) -> tuple[int, str]:
        with pytest.raises(DataError, match="3 of 11 images cannot be used") as error:
            trainer.fit()
        trainer.run.close()
        return trainer.step, str(error.value)

    straight = ends(make_trainer(tmp_path / "straight", images, **options))
    assert straight[0] > 1
    for step in (1, straight[0] - 1):
        out = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / f"straight/checkpoints/step-{step}", out / f"checkpoints/step-{step}")
        resumed = make_trainer(out, images, resume=True, **options)
        resumed.resume(out / f"checkpoints/step-{step}")
        assert ends(resumed) == straight


@pytest.fixture
def spoilt(tmp_path):
    """Eleven images, of which two cannot be used, as the index sees."""
    folder = write_images(tmp_path / "images")
    (folder / "3.jpg").write_bytes(b"")
    content = (folder / "5.jpg").read_bytes()
    (folder / "5.jpg").write_bytes(content[: len(content) // 2])
    return folder


def test_bad_files_are_listed_and_counted(tmp_path, spoilt):
    trainer = make_trainer(tmp_path / "run", spoilt, options={"max_bad_fraction": 0.2})
    trainer.fit()
    trainer.run.close()
    lines = [json.loads(line) for line in (tmp_path / "run/bad_files.jsonl").read_text().splitlines()]
    assert [(line["path"], line["found"]) for line in lines] == [
        (str(spoilt / "3.jpg"), "index"),
        (str(spoilt / "5.jpg"), "index"),
    ]
    assert [trainer.dataset.path(line["sample_id"]) for line in lines] == [line["path"] for line in lines]
    assert "empty" in lines[0]["reason"]
    assert [row["bad_files"] for row in trainer.run.read_metrics()] == [2, 2, 2]
