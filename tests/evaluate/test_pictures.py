"""Reconstruction pictures during a run: always of the same images and masks, and nothing about the training changes."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from PIL import Image
from rich.console import Console
from torch.distributed.tensor import DTensor
from training import MODEL, TRAIN, make_trainer, write_images

from fastmae import data
from fastmae.evaluate.callbacks import Pictures, Probe, reconstruction_sets
from fastmae.loading import load
from fastmae.model import create_model
from fastmae.train.callbacks import Callback
from fastmae.train.checkpoint import Ranks
from fastmae.train.config import DataConfig, PretrainConfig, ReportConfig
from fastmae.train.parallel import construct, initialize, shutdown
from fastmae.train.run_folder import RunFolder, read_rows
from fastmae.train.task import MaskedAutoencoding
from fastmae.train.trainer import Trainer

REPORT = ReportConfig(picture_every_steps=4)


def trainer_of(out: Path, images: Path, callbacks=(Pictures,), **options) -> Trainer:
    """A trainer with two image sizes, accumulation and bf16, watched by callbacks."""
    options = {"steps": 8, "batch_size": 4, "options": {"progressive_sizes": (16, 32)}} | options
    trainer = make_trainer(out, images, **options)
    config = replace(trainer.config, report=REPORT)
    trainer.callbacks = [callback(config, trainer.dataset) for callback in callbacks]
    return trainer


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "images")


class Untouched(Pictures):
    """Pictures that leave random numbers and the model's state as they are."""

    def after_step(self, trainer):
        state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - what nobody should touch
        super().after_step(trainer)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
        assert all(module.training for module in trainer.model.modules())
        assert all(getattr(m, "weight_cast", None) is None for m in trainer.model.modules())
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        assert torch.is_grad_enabled()


@pytest.fixture(scope="module")
def observed(tmp_path_factory, images) -> Trainer:
    """A finished run with pictures and a checkpoint every second step, its folder unlocked."""
    trainer = trainer_of(tmp_path_factory.mktemp("runs") / "run", images, (Untouched,), checkpoint_every_steps=2)
    trainer.fit()
    trainer.run.close()
    return trainer


def test_the_training_is_the_same_bit_for_bit(tmp_path, images, observed):
    plain = trainer_of(tmp_path / "plain", images, (), checkpoint_every_steps=4)
    plain.fit()
    keys = ("step", "loss", "grad_norm", "lr", "samples")
    one, other = ([[row[key] for key in keys] for row in trainer.run.read_metrics()] for trainer in (plain, observed))
    assert one == other
    for step in (4, 8):
        one, other = (load(t.run.checkpoints / f"step-{step}").state_dict() for t in (plain, observed))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_picture_every_so_many_steps_with_its_errors(observed):
    names = [f"step-{step:06}.png" for step in (4, 8)]
    assert sorted(path.name for path in observed.run.reconstructions.iterdir()) == names
    rows = observed.run.read_evaluations()
    assert [(row["step"], Path(row["reconstructions"]).name) for row in rows] == [(4, names[0]), (8, names[1])]
    for key in ("crops_mse", "unseen_mse"):
        assert len({row[key] for row in rows}) == 2  # the weights move
        for baseline in ("mean_color", "inverse_distance"):
            assert len({row[f"{key}_{baseline}"] for row in rows}) == 1  # images and masks do not


def test_pictures_of_the_same_weights_are_the_same_and_may_fail(tmp_path, images):
    trainer = trainer_of(tmp_path / "run", images)
    (pictures,) = trainer.callbacks
    trainer.model.train()
    trainer.reporter.open(0, 8)
    pictures.begin(trainer)
    for trainer.step, size in ((4, (32, 48)), (8, (16, 24))):  # the size of the training's images
        trainer.model.set_input_size(size)
        pictures.after_step(trainer)
    (tmp_path / "run" / "reconstructions").rename(tmp_path / "away")
    trainer.step = 12
    pictures.after_step(trainer)
    assert "step 12: no picture: " in trainer.console.file.getvalue()
    first, other = ({**row, "step": 4, "reconstructions": ""} for row in trainer.run.read_evaluations())
    assert first == other
    first, other = (pixels(tmp_path / "away" / f"step-00000{step}.png") for step in (4, 8))
    title = 120  # which says the step
    assert np.array_equal(first[title:], other[title:])
    assert not np.array_equal(first[:title], other[:title])


def test_crops_are_those_of_the_end_and_grey_models_have_no_photographs(tmp_path, images):
    config = PretrainConfig(data=DataConfig(path=images), model=MODEL)
    dataset = data.open_dataset(images)
    few, names = reconstruction_sets(config, dataset, 12)
    many, _ = reconstruction_sets(config, dataset, 20)
    heading = "new crops of the training images"
    assert list(few) == [heading, "a photograph never trained on"]
    assert names == {"a photograph never trained on": ["cat"]}
    assert torch.equal(few[heading], many[heading][:12])
    (tmp_path / "grey").mkdir()
    Image.new("L", (40, 50), 99).save(tmp_path / "grey" / "a.png")
    config = replace(config, model=replace(MODEL, in_chans=1), data=DataConfig(path=tmp_path / "grey"))
    grey, names = reconstruction_sets(config, data.open_dataset(tmp_path / "grey", channels=1), 2)
    assert (list(grey), names) == ([heading], {})
    assert grey[heading].shape == (2, 1, 32, 48)


def test_a_continued_run_draws_again_what_comes_after_its_checkpoint(tmp_path, images, observed):
    run = tmp_path / "run"
    shutil.copytree(observed.run.path, run)
    (run / "reconstructions" / "step-000008.png").write_bytes(b"of another future")
    trainer = trainer_of(run, images, resume=True)
    trainer.resume(run / "checkpoints" / "step-6")
    trainer.fit()
    assert [row["step"] for row in trainer.run.read_evaluations()] == [4, 8]
    for path in observed.run.reconstructions.iterdir():
        assert (run / "reconstructions" / path.name).read_bytes() == path.read_bytes()


class Others(Callback):
    """After pictures and probe: no rank goes on before the first one has looked, and no weights are gathered."""

    def after_step(self, trainer):
        _, probe, _ = trainer.callbacks
        rows = [row for row in trainer.run.read_evaluations() if row["step"] == trainer.step]
        due = [trainer.step % 4 == 0, probe.is_due(trainer.step)]
        assert [any(key in row for row in rows) for key in ("reconstructions", "knn_top1")] == due
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        assert all(isinstance(parameter, DTensor) == trainer.parallelism.sharded for parameter in trained)


def train(rank: int, mode: str, out: Path, images: Path, watched: bool) -> dict | None:
    place = initialize(mode)
    config = PretrainConfig(
        out=out,
        model=MODEL,
        data=DataConfig(path=images, loader="torch", num_threads=1),
        train=replace(TRAIN, precision="fp32", parallel=mode, steps=8, checkpoint_every_steps=4),
        report=replace(REPORT, probe_every_epochs=2.0),
    )
    with Ranks.create() as ranks:
        dataset = data.open_dataset(images, cache_dir=images.parent / f"cache-{rank}")
        model = construct(lambda: create_model(**config.model_arguments()), place)
        run, task = RunFolder(out, leader=rank == 0), MaskedAutoencoding(config, model, dataset, data.create_loader)
        parts = {"parallelism": place, "ranks": ranks, "console": Console(file=io.StringIO())}
        if watched:
            parts["callbacks"] = [Pictures(config, dataset), Probe(config, dataset, ranks), Others()]
        Trainer(config, task, run, **parts).fit()
    shutdown(place)
    return rank or {step: load(out / "checkpoints" / f"step-{step}").state_dict() for step in (4, 8)}


MODES = ("ddp", "fsdp")


def job(rank: int, folder: Path) -> dict:
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{rank}")
    cases = [(mode, watched) for mode in MODES for watched in (False, True)]
    return {
        case: train(rank, case[0], folder / "-".join(map(str, case)), folder / "classes", case[1]) for case in cases
    }


@pytest.fixture(scope="module")
def ranks_runs(tmp_path_factory) -> tuple[Path, dict]:
    """Runs of two processes, with pictures and probes and without, and one of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("one", "two"):
        write_images(folder / "classes" / name)
    train(0, "none", folder / "none-True", folder / "classes", watched=True)
    return folder, run_ranks(job, 2, folder, timeout=120)[0]


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_train_as_if_nobody_looked_and_see_what_one_sees(ranks_runs, mode):
    folder, runs = ranks_runs
    for step, weights in runs[mode, False].items():
        assert all(torch.equal(runs[mode, True][step][key], tensor) for key, tensor in weights.items())
    found, expected = (read_rows(folder / f"{run}-True" / "evaluations.jsonl") for run in (mode, "none"))
    assert [set(row) for row in found] == [set(row) for row in expected]
    assert len(found) == 4
    assert any("knn_top1" in row for row in found)
    for row, other in zip(found, expected, strict=True):
        for key in set(row) - {"probe_seconds", "reconstructions"}:
            assert row[key] == pytest.approx(other[key], rel=1e-4), key
