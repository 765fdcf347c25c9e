"""A run whose gradients are no longer finite goes back, leaves the images out, names them, and comes to its end."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from test_resume import assert_same_tensors
from training import MODEL, TRAIN

from fastmae import data
from fastmae.data import Batch, LateBad
from fastmae.data.sampler import permuted_ids
from fastmae.model import PRESETS, MAEOutput, MaskedAutoencoderViT
from fastmae.train import parallel
from fastmae.train.bad_files import BadFiles
from fastmae.train.callbacks import Callback
from fastmae.train.checkpoint import Ranks, latest_checkpoint, list_checkpoints, load_checkpoint
from fastmae.train.config import DataConfig, PretrainConfig
from fastmae.train.feed import draw_masks
from fastmae.train.loop import Trainer
from fastmae.train.numerics.batch_dump import KEPT, _conclusion
from fastmae.train.numerics.divergence import LEAST_FP16, Divergence
from fastmae.train.numerics.gradients import LossScale
from fastmae.train.rules import validate
from fastmae.train.run_folder import RunFolder
from fastmae.train.sample_positions import SamplePositions

IMAGES, SEED = 160, 0
BLACK = (43, 52, 60)
"""Positions in the order of images, of steps 6, 7 and 8, whose images are black."""
OPTIONS = {"precision": "fp32", "seed": SEED, "rollback_after": 3, "checkpoint_every_steps": 1, "keep_checkpoints": 2}


class BlackIsNotFinite(MaskedAutoencoderViT):
    """Predicts infinity for a black image, and so has no finite loss or gradient for its batch."""

    def forward(self, images, *, masking, full_pred):
        out = super().forward(images, masking=masking, full_pred=full_pred)
        black = (images == 0).flatten(1).all(1).repeat_interleave(len(out.pred) // len(images))
        pred = out.pred * torch.where(black, math.inf, 1.0)[:, None, None]
        return MAEOutput(self._loss(images, pred, masking.ids_mask), pred, out.mask)


def create(model=MODEL):
    config = PretrainConfig(model=model, train=TRAIN)
    arguments = {key: value for key, value in config.model_arguments().items() if value is not None}
    return BlackIsNotFinite(**PRESETS[arguments.pop("name")] | arguments)


def write_images(folder: Path) -> Path:
    folder.mkdir()
    black = permuted_ids(np.array(BLACK), IMAGES, SEED)[0].tolist()
    generator = np.random.default_rng(0)
    for index in range(IMAGES):
        pixels = np.zeros((4, 5, 3)) if index in black else generator.integers(20, 256, (4, 5, 3))
        picture = Image.fromarray(pixels.astype(np.uint8)).resize((60, 48), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def make(out: Path, images: Path, *, place=None, ranks=None, resume=False, callbacks=(), options=None, **train):
    """A trainer, as ``training.make_trainer`` makes it, of a model that black images are too much for."""
    place, ranks = place or parallel.Parallelism(), ranks or Ranks()
    train = replace(TRAIN, **OPTIONS | {"parallel": place.mode} | train)
    settings = DataConfig(path=images, loader="torch", num_threads=1, **options or {})
    config = PretrainConfig(out=out, resume=resume, model=MODEL, data=settings, train=train)
    return Trainer(
        config,
        parallel.construct(create, place),
        data.open_dataset(images, cache_dir=out.parent / f"cache-{ranks.rank}"),
        RunFolder(out, resume=resume, leader=ranks.rank == 0),
        create_loader=data.create_loader,
        console=Console(file=io.StringIO(), width=1000),
        parallelism=place,
        ranks=ranks,
        callbacks=callbacks,
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def known(run: Path) -> dict:
    """What a run left that must not hang on interruptions: rows without times, rollbacks without paths."""
    names = ("step", "samples", "epoch", "lr", "loss", "grad_norm", "skipped_steps", "rollbacks", "loss_max")
    rollbacks = [(r["first_step"], r["to_step"], r["positions_left_out"]) for r in read(run / "rollbacks.jsonl")]
    return {"rows": [[row[name] for name in names] for row in read(run / "metrics.jsonl")], "rollbacks": rollbacks}


class At(Callback):
    """Calls a function after a step, at a visit (None: each); a run that went back meets the step again."""

    def __init__(self, step, function, visit=1):
        self.step, self.function, self.visit, self.visits = step, function, visit, 0

    def after_step(self, trainer):
        if trainer.step == self.step:
            self.visits += 1
            if self.visit in (None, self.visits):
                self.function(trainer)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, images):
    """A run that goes back once, undisturbed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    trainer = make(out, images)
    assert trainer.fit() == "finished"
    trainer.run.close()
    return out, trainer.console.file.getvalue()


def test_a_run_goes_back_and_on_with_later_images(straight):
    run, printed = straight
    rows = read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 12]
    # Steps 6 to 8 are not finite: back to step 5, and on with the images of step 9.
    assert [row["samples"] for row in rows] == [32, 8 * 8 + 3 * 8, 8 * 8 + 7 * 8]
    assert [row["epoch"] for row in rows] == [8 * step / IMAGES for step in (4, 8, 12)]
    assert [row["rollbacks"] for row in rows] == [0, 1, 1]
    assert all(row["loss"] is not None and row["skipped_steps"] == 0 for row in rows)
    assert read(run / "rollbacks.jsonl") == [
        {
            "first_step": 6,
            "last_step": 8,
            "noticed_at_step": 8,
            "dump": str(run / "non_finite/step-6"),
            "to_step": 5,
            "checkpoint": str(run / "checkpoints/step-5"),
            "positions_left_out": [40, 63],
        }
    ]
    assert "WENT BACK TO STEP 5 (1 of at most 3 times): no finite gradient in steps 6 to 8" in printed
    assert "Images 40 to 63 of the run's order are left out" in printed
    # The checkpoint before the streak outlived two of the streak that are newer; those are set aside.
    assert {path.name for path in (run / "checkpoints").glob("*.abandoned")} == {"step-6.abandoned", "step-7.abandoned"}
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-12", "step-11"]


def test_the_batch_is_dumped_and_the_image_named(straight, images):
    run, printed = straight
    folder = run / "non_finite/step-6"
    assert [path.name for path in folder.parent.iterdir()] == ["step-6"]
    dumped = json.loads((folder / "batch.json").read_text())
    black = int(permuted_ids(np.array([43]), IMAGES, SEED)[0][0])
    path = str(images / f"{black:03}.png")
    assert dumped["images_without_finite_loss"] == 1
    assert dumped["weights_not_finite"] == dumped["moments_not_finite"] == []
    assert 0 < dumped["largest_weight"][1] < 100
    first, *others = dumped["images"]
    assert math.isinf(float(first["loss"]))
    assert (first["position"], first["sample_id"], first["path"], first["epoch"]) == (43, black, path, 0)
    assert (first["label"], first["rank"], len(first["box"]), len(first["flips"])) == (None, 0, 4, 2)
    assert sorted(image["position"] for image in dumped["images"]) == list(range(40, 48))
    losses = [image["loss"] for image in others]
    assert losses == sorted(losses, reverse=True)
    tensors = load_file(folder / "rank-0.safetensors")
    assert tensors["images"].shape == (8, 3, 32, 48)
    assert tensors["images"].dtype == torch.uint8
    assert torch.equal((tensors["images"] == 0).flatten(1).all(1), ~tensors["losses"].isfinite().all(1))
    assert not tensors["images"][first["row"]].any()
    assert tensors["sample_ids"][first["row"]] == black
    assert tensors["ids_keep"].shape == (8, 1, 6)
    assert f"8 images, 0.04 MB. No finite loss: {path}" in printed


def test_the_losses_of_the_dump_are_those_of_the_training(straight, images, tmp_path):
    """On the checkpoint before the step, whose weights are those that the step failed on."""
    trainer = make(tmp_path / "run", images, callbacks=[At(5, leave)])
    trainer.fit()
    trainer.run.close()
    with trainer.loader_at(40) as loader:
        batch = Batch(*(values[(batch.images != 0).flatten(1).any(1)] for batch in [next(loader)] for values in batch))
    with torch.no_grad():
        masking = draw_masks(batch, trainer.model, trainer.config)
        loss = trainer.model(batch.images, masking=masking, full_pred=False).loss.item()
    dumped = json.loads((straight[0] / "non_finite/step-6/batch.json").read_text())
    assert loss == pytest.approx(np.mean([image["loss"] for image in dumped["images"][1:]]), rel=1e-5)


def test_what_follows_is_the_checkpoint_on_later_images(straight, images, tmp_path):
    """As if somebody had taken step 5's checkpoint and begun the data at position 64 by hand."""
    first = make(tmp_path / "run", images, steps=12, callbacks=[At(5, leave)])
    first.fit()
    first.run.close()
    second = make(tmp_path / "run", images, resume=True)
    assert second.resume(latest_checkpoint(tmp_path / "run")) == []
    second.positions.jump(5, 64)
    second.fit()
    second.run.close()
    assert_same_tensors(straight[0] / "checkpoints/step-12", tmp_path / "run/checkpoints/step-12")


def test_one_step_may_be_enough_several_times_with_several_masks_passes_and_sizes(images, tmp_path):
    """Steps of four images, two masks each, in two forward passes; images of 16 pixels first, then of 32."""
    steps = {"masks_per_image": 2, "batch_size": 4, "rollback_after": 1, "max_rollbacks": 9, "log_every_steps": 1}
    trainer = make(tmp_path / "run", images, options={"progressive_sizes": (16, 32)}, steps=80, **steps)
    assert trainer.fit() == "finished"
    trainer.run.close()
    rows = read(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 81))
    assert all(row["loss"] is not None for row in rows)
    assert {((row["samples"] - 4) // IMAGES, row["input_height"]) for row in rows} == {(0, 16), (1, 32), (2, 32)}
    # Positions 43, 52 and 60 are in steps 11, 14 and 16 as long as nothing was left out.
    rollbacks = read(tmp_path / "run/rollbacks.jsonl")
    assert [r["first_step"] for r in rollbacks][:3] == [11, 13, 14]
    assert [r["positions_left_out"] for r in rollbacks][:3] == [[40, 43], [52, 55], [60, 63]]
    assert rows[-1]["samples"] == 4 * (80 + len(rollbacks))
    # Whenever the images come again, they are named again.
    ids = permuted_ids(np.arange(rows[-1]["samples"]), IMAGES, SEED)[0]
    folders = [Path(r["dump"]) for r in rollbacks]
    assert [folder.name for folder in folders[:3]] == ["step-11", "step-13-2", "step-14-3"]
    named = [
        image["position"]
        for folder in folders
        for image in json.loads((folder / "batch.json").read_text())["images"]
        if image["loss"] == "inf"
    ]
    assert named == np.flatnonzero(np.isin(ids, ids[list(BLACK)])).tolist()
    assert len(named) > 5
    files = [folder / "rank-0.safetensors" for folder in folders]
    assert [file.exists() for file in files] == [False] * (len(files) - KEPT) + [True] * KEPT
    tensors = load_file(files[-1])
    assert tensors["images"].shape == (4, 3, 32, 48)
    assert tensors["losses"].shape == (4, 2)
    assert tensors["ids_mask"].shape[:2] == (4, 2)


def test_the_loss_scale_goes_back_too(images, tmp_path):
    """Three skipped steps have halved it three times; with the weights comes the scale that they had."""
    scales = []
    callbacks = [At(step, lambda trainer: scales.append(float(trainer.loss_scale.value)), None) for step in (5, 7, 8)]
    trainer = make(tmp_path / "run", images, callbacks=callbacks, precision="fp16")
    trainer.fit()
    trainer.run.close()
    first = scales[0]
    assert scales == [first, first / 4, first / 8, first, first]  # steps 5, 7, 8, and 7 and 8 again
    assert float(trainer.loss_scale.value) == first


def leave(trainer):
    os.kill(os.getpid(), signal.SIGTERM)


class Killed(BaseException):
    """Ends a run without a save, as SIGKILL does."""


def die(trainer):
    raise Killed


def resume_and_finish(out: Path, images: Path) -> None:
    torch.manual_seed(77)
    resumed = make(out, images, resume=True)
    assert resumed.resume(latest_checkpoint(out)) == []
    assert resumed.fit() == "finished"
    resumed.run.close()


def assert_as_undisturbed(out: Path, straight: Path) -> None:
    assert known(out) == known(straight)
    manifests = [json.loads((run / "checkpoints/step-12/manifest.json").read_text()) for run in (out, straight)]
    for name in ("samples_consumed", "jumps", "divergence", "spikes"):
        assert manifests[0][name] == manifests[1][name]
    assert_same_tensors(straight / "checkpoints/step-12", out / "checkpoints/step-12")


SLOW = pytest.mark.slow
MOMENTS = [
    *(pytest.param(how, step, 1, marks=SLOW) for how in (leave, die) for step in (5, 8, 9, 11)),
    *(pytest.param(how, step, visit, marks=SLOW) for how in (leave, die) for step in (6, 7) for visit in (1, 2)),
    (leave, 7, 1),  # in the streak
    (die, 8, 1),  # when it would have been noticed
    (die, 6, 2),  # gone back, and not saved since
]


@pytest.mark.parametrize(("how", "step", "visit"), MOMENTS)
def test_interrupted_at_any_moment_it_goes_on_as_undisturbed(straight, images, tmp_path, how, step, visit):
    """A run that goes back visits steps 6 to 8 twice."""
    trainer = make(tmp_path / "run", images, callbacks=[At(step, how, visit)])
    if how is leave:
        assert trainer.fit() == "preempted"
    else:
        with pytest.raises(Killed):
            trainer.fit()
    trainer.run.close()
    resume_and_finish(tmp_path / "run", images)
    assert_as_undisturbed(tmp_path / "run", straight[0])


@pytest.mark.parametrize("stops", [False, True])
def test_noticed_late_it_goes_on_the_same(straight, images, tmp_path, stops):
    """On a GPU and with several ranks, rows are read an interval late; and a run may have to leave before it goes
    back."""
    trainer = make(tmp_path / "run", images, callbacks=[At(8, leave)] if stops else [])
    trainer.reporter._late = 1
    assert trainer.fit() == ("preempted" if stops else "finished")
    trainer.run.close()
    if stops:
        manifest = json.loads((tmp_path / "run/checkpoints/step-8/manifest.json").read_text())
        assert (manifest["divergence"]["due"], manifest["divergence"]["rollbacks"]) == (6, 0)
        resume_and_finish(tmp_path / "run", images)
    else:
        assert read(tmp_path / "run/rollbacks.jsonl")[0]["noticed_at_step"] == 9
    assert_as_undisturbed(tmp_path / "run", straight[0])


def test_rows_that_were_not_read_when_the_run_went_back_are_not_written(images, tmp_path):
    callbacks = [At(5, lambda trainer: trainer.save())]  # the only one: a save reads what there is
    trainer = make(tmp_path / "run", images, steps=16, checkpoint_every_steps=None, callbacks=callbacks)
    trainer.reporter._late = 1
    trainer.fit()
    trainer.run.close()
    assert [(r["to_step"], r["noticed_at_step"]) for r in read(tmp_path / "run/rollbacks.jsonl")] == [(5, 12)]
    rows = read(tmp_path / "run/metrics.jsonl")
    assert [(row["step"], row["rollbacks"]) for row in rows] == [(4, 0), (8, 1), (12, 1), (16, 1)]


def test_the_last_steps_may_be_the_ones(images, tmp_path):
    trainer = make(tmp_path / "run", images, steps=8)
    trainer.reporter._late = 1
    assert trainer.fit() == "finished"
    trainer.run.close()
    assert trainer.step == 8
    assert [row["skipped_steps"] for row in read(tmp_path / "run/metrics.jsonl")] == [0, 0]


def spoil(trainer):
    """Weights that are finite, and no longer of any use."""
    with torch.no_grad():
        trainer.model.decoder_pred.weight.mul_(1e30)


def test_a_checkpoint_that_fails_again_is_not_gone_back_to_twice(images, tmp_path):
    """Step 3 is saved with weights that no gradient is finite of."""
    trainer = make(tmp_path / "run", images, callbacks=[At(3, spoil)], checkpoint_every_steps=3, keep_checkpoints=3)
    assert trainer.fit() == "finished"
    trainer.run.close()
    assert [(r["first_step"], r["to_step"]) for r in read(tmp_path / "run/rollbacks.jsonl")][:2] == [(4, 3), (4, 0)]
    dumped = json.loads((tmp_path / "run/non_finite/step-4/batch.json").read_text())
    assert dumped["images_without_finite_loss"] == len(dumped["images"]) == 8
    assert dumped["largest_weight"][0] == "decoder_pred.weight"
    assert dumped["largest_weight"][1] > 1e28
    assert "the weights are at fault, not the images" in trainer.console.file.getvalue()


def test_a_checkpoint_with_weights_that_are_not_finite_is_passed_over(images, tmp_path, capsys):
    def forget(trainer):
        with torch.no_grad():
            trainer.model.norm.bias[0] = math.nan

    trainer = make(tmp_path / "run", images, callbacks=[At(3, forget)], keep_checkpoints=9, steps=8)
    assert trainer.fit() == "finished"
    trainer.run.close()
    assert "step-3: passed over, its weights or moments are not all finite" in capsys.readouterr().err
    assert [r["to_step"] for r in read(tmp_path / "run/rollbacks.jsonl")][:1] == [2]
    assert json.loads((tmp_path / "run/non_finite/step-4/batch.json").read_text())["weights_not_finite"] == [
        "norm.bias"
    ]
    assert "1 weights are not finite, norm.bias among them" in trainer.console.file.getvalue()


def test_a_run_that_cannot_be_mended_ends_and_says_what_happened(images, tmp_path):
    """Whenever it comes to step 3."""
    callbacks = [At(3, spoil, None)]
    trainer = make(tmp_path / "run", images, callbacks=callbacks, max_rollbacks=2, checkpoint_every_steps=None)
    with pytest.raises(FloatingPointError) as caught:
        trainer.fit()
    trainer.run.close()
    text = str(caught.value)
    assert text.startswith("no finite gradient in steps 4 to 6; all were skipped. The first one's batch is in ")
    assert f"{tmp_path}/run/non_finite/step-4-3: 8 images" in text
    # Each time another batch, of which nothing is lost.
    dumps = [tmp_path / "run/non_finite" / name / "batch.json" for name in ("step-4", "step-4-2", "step-4-3")]
    assert len({json.loads(path.read_text())["images"][0]["position"] // 8 for path in dumps}) == 3
    assert text.endswith(
        "The run has gone back 2 times, as often as --train.max-rollbacks allows. To go on, --resume with a larger one "
        "and with a lower --train.base-lr, --train.clip-grad 1.0"
    )
    assert len(read(tmp_path / "run/rollbacks.jsonl")) == 2
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "failed"
    assert (tmp_path / "run/checkpoints/step-0").is_dir()


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([3.4e18, 0.5], "all losses are finite, the largest 3.4e+18: the gradient overflowed"),
        (["nan", 0.5], "No finite loss: 0.jpg"),
        (["nan", "inf"], "the weights are at fault, not the images"),
    ],
)
def test_what_a_batch_points_at(losses, words):
    images = [{"loss": loss, "path": f"{index}.jpg"} for index, loss in enumerate(losses)]
    bad = [image for image in images if isinstance(image["loss"], str)]
    assert words in _conclusion({"weights_not_finite": []}, bad, images)


def test_a_damaged_checkpoint_is_passed_over_loudly(images, tmp_path, capsys):
    def damage(trainer):
        (shard,) = (tmp_path / "run/checkpoints/step-5").glob("*.safetensors")
        shard.write_bytes(shard.read_bytes()[:-10])

    trainer = make(tmp_path / "run", images, callbacks=[At(7, damage)], keep_checkpoints=9)
    assert trainer.fit() == "finished"
    trainer.run.close()
    assert "WARNING: damaged checkpoint passed over: " in capsys.readouterr().err
    assert read(tmp_path / "run/rollbacks.jsonl")[0]["to_step"] == 4
    assert (tmp_path / "run/checkpoints/step-5.abandoned").is_dir()


def train_on_two(rank: int, folder: Path, images: Path) -> dict[str, list]:
    """Runs of two ranks: the shards of weights that each ends with, and what it said."""
    ended = {}
    for mode in ("ddp", "fsdp"):
        place = parallel.initialize(mode)
        with Ranks.create() as ranks:
            options = {"batch_size": 2, "reshard_after_forward": False}
            trainer = make(folder / mode, images, place=place, ranks=ranks, **options)
            if mode == "ddp" and rank == 1:
                trainer.loader_at = partial(fail_once, trainer)
            status = trainer.fit()
            weights = [getattr(p, "to_local", lambda p=p: p)() for p in trainer.model.parameters()]
            ended[mode] = [status, [w.detach().clone() for w in weights], trainer.console.file.getvalue()]
            trainer.run.close()
    return ended


def fail_once(trainer, position):
    """The loader of the dump, which begins where step 6 does, cannot be made; the others can."""
    if position == 40:
        raise OSError("no such disk")
    return Trainer.loader_at(trainer, position)


def test_two_ranks_go_back_together(straight, images, tmp_path):
    one, other = run_ranks(train_on_two, 2, tmp_path, images, timeout=100)
    for mode in ("ddp", "fsdp"):
        assert one[mode][0] == other[mode][0] == "finished"
        rows = read(tmp_path / mode / "metrics.jsonl")
        expected = read(straight[0] / "metrics.jsonl")
        for row, single in zip(rows, expected, strict=True):
            assert row["loss"] == pytest.approx(single["loss"], abs=1e-6)
            assert [row[name] for name in ("step", "samples", "rollbacks", "skipped_steps")] == [
                single[name] for name in ("step", "samples", "rollbacks", "skipped_steps")
            ]
        assert read(tmp_path / mode / "rollbacks.jsonl")[0]["positions_left_out"] == [40, 63]
    assert all(torch.equal(a, b) for a, b in zip(one["ddp"][1], other["ddp"][1], strict=True))
    # One rank cannot dump: none does, and all go on.
    assert not list((tmp_path / "ddp/non_finite").iterdir())
    assert not read(tmp_path / "ddp/rollbacks.jsonl")[0]["dump"]

    dumped = json.loads((tmp_path / "fsdp/non_finite/step-6/batch.json").read_text())
    single = json.loads((straight[0] / "non_finite/step-6/batch.json").read_text())
    assert len(dumped["images"]) == 8
    assert dumped["images_without_finite_loss"] == 1
    bad = dumped["images"][0]
    for name in ("position", "sample_id", "path", "epoch", "box", "flips"):
        assert bad[name] == single["images"][0][name], name
    assert bad["rank"] == 1  # forward passes of two images on each of two ranks: positions 40 to 47 go 0 0 1 1 0 0 1 1
    tensors = [load_file(tmp_path / f"fsdp/non_finite/step-6/rank-{rank}.safetensors") for rank in (0, 1)]
    assert not tensors[1]["images"][bad["row"]].any()
    assert tensors[1]["sample_ids"][bad["row"]] == bad["sample_id"]
    assert [len(rank["images"]) for rank in tensors] == [4, 4]
    for image, alone in zip(dumped["images"][1:], single["images"][1:], strict=True):
        assert (image["path"], image["box"]) == (alone["path"], alone["box"])
        assert image["loss"] == pytest.approx(alone["loss"], rel=0.03)  # noticed a step late, on other weights
    assert (single["weights_after_step"], dumped["weights_after_step"]) == (8, 9)
    # Its state is whole: one process goes on from it, and finds what a single one would have.
    final, alone = (latest_checkpoint(run) for run in (tmp_path / "fsdp", straight[0]))
    weights, expected = load_checkpoint(final, prefix="model.")[0], load_checkpoint(alone, prefix="model.")[0]
    for name, value in expected.items():
        assert torch.allclose(weights[name], value, atol=5e-5), name


def train_interrupted_on_two(rank: int, folder: Path, images: Path, mode: str) -> None:
    """A run undisturbed; and one that is stopped in the streak, killed after it went back, and resumed each time."""
    place = parallel.initialize(mode)
    with Ranks.create() as ranks:
        options = {"place": place, "ranks": ranks, "precision": "bf16", "clip_grad": 1.0}
        trainer = make(folder / "straight", images, **options)
        trainer.fit()
        trainer.run.close()
        for callbacks in ([At(7, leave)] if rank == 0 else [], [At(6, die)], []):
            trainer = make(folder / "run", images, callbacks=callbacks, resume=(folder / "run").exists(), **options)
            if list_checkpoints(folder / "run/checkpoints"):
                assert trainer.resume(latest_checkpoint(folder / "run", ranks=ranks)) == []
            with contextlib.suppress(Killed):
                trainer.fit()
            trainer.run.close()
            ranks.first("waiting", lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_interrupted_go_on_as_undisturbed(images, tmp_path, mode):
    run_ranks(train_interrupted_on_two, 2, tmp_path, images, mode, timeout=100)
    assert_as_undisturbed(tmp_path / "run", tmp_path / "straight")
    assert len(read(tmp_path / "run/rollbacks.jsonl")) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "bf16", "compile": "model"}])
def test_on_a_gpu(images, tmp_path, options):
    """Rows are read an interval late there, and saves go on beside the training."""
    place = parallel.initialize("none", "cuda")
    trainer = make(tmp_path / "run", images, place=place, device="cuda", **options)
    assert trainer.fit() == "finished"
    trainer.run.close()
    rows = read(tmp_path / "run/metrics.jsonl")
    assert [(row["step"], row["samples"], row["rollbacks"]) for row in rows] == [(4, 32, 0), (8, 88, 1), (12, 120, 1)]
    assert all(row["loss"] is not None and row["skipped_steps"] == 0 for row in rows)
    dumped = json.loads((tmp_path / "run/non_finite/step-6/batch.json").read_text())
    assert dumped["images_without_finite_loss"] == 1
    assert dumped["images"][0]["position"] == 43


def feed(divergence: Divergence, skipped: list[int], interval: int = 4, begin: int = 0) -> None:
    for start in range(0, len(skipped), interval):
        part = skipped[start : start + interval]
        divergence.observe({"step": begin + start + len(part)}, {"skipped": part})


def test_only_so_many_in_a_row_are_a_divergence():
    divergence = Divergence(5, 3)
    feed(divergence, [1, 1, 1, 1, 0] * 5 + [0, 0])
    assert (divergence.due, divergence.last_finite) == (None, 27)
    feed(divergence, [0, 1, 1, 1], begin=27)
    state = json.loads(json.dumps(divergence.state()))
    divergence = Divergence(5, 3)
    divergence.restore(state)
    feed(divergence, [1, 1, 1, 0, 0, 0, 0, 1], begin=31)
    assert divergence.due == 29
    assert divergence.offending == (29, 33)
    assert divergence.newest_sound == 28
    divergence.went_back(28, 1)
    assert divergence.due is None
    feed(divergence, [1] * 5, begin=28)
    assert (divergence.due, divergence.newest_sound) == (29, 27)


def test_a_loss_scale_that_is_too_high_is_no_divergence():
    """The first one is halved until gradients fit into fp16; the worst that it can be wrong by takes 16 steps."""
    scale, divergence, skipped = LossScale(torch.device("cpu")), Divergence(20, 3), []
    for _ in range(40):
        overflows = float(scale.value) * 60000 > 65504
        skipped.append(float(overflows))
        scale.update(torch.tensor(float(overflows)))
    assert sum(skipped) == 16 < LEAST_FP16
    feed(divergence, skipped)
    assert divergence.due is None
    config = PretrainConfig(train=replace(TRAIN, precision="fp16", rollback_after=16))
    with pytest.raises(ValueError, match=r"--train.rollback-after: expected at least 17 with fp16.*got 16"):
        validate(config)
    validate(replace(config, train=replace(TRAIN, precision="fp16", rollback_after=17)))


@pytest.mark.parametrize(("name", "value"), [("rollback_after", 0), ("max_rollbacks", -1)])
def test_flags_are_validated(name, value):
    with pytest.raises(ValueError, match=f"--train.{name.replace('_', '-')}: expected a .*, got {value}"):
        validate(PretrainConfig(train=replace(TRAIN, **{name: value})))


def test_positions_follow_the_steps_with_jumps():
    positions = SamplePositions(8)
    assert (positions.after(5), positions.of(6), positions.step_of(47)) == (40, (40, 47), 6)
    positions.jump(5, 64)
    assert [positions.after(step) for step in (4, 5, 6)] == [32, 64, 72]
    assert [positions.step_of(position) for position in (39, 64, 71, 72)] == [5, 6, 6, 7]
    positions.jump(9, 120)
    positions.jump(7, 200)  # gone back to before the last jump
    assert [positions.after(step) for step in (4, 5, 6, 7, 8)] == [32, 64, 72, 200, 208]
    restored = SamplePositions(8)
    restored.restore({"step": 8, "samples_consumed": 208, "jumps": json.loads(json.dumps(positions.state()))})
    assert restored.state() == positions.state()
    restored.restore({"step": 8, "samples_consumed": 208})  # what alone the order of images hangs on
    assert restored.after(8) == 208
    with pytest.raises(ValueError, match="position: expected at least 208 after step 8, got 207"):
        positions.jump(8, 207)


def test_files_found_bad_after_going_back_have_the_right_step(images, tmp_path):
    dataset, positions = data.open_dataset(images, cache_dir=tmp_path), SamplePositions(8)
    bad = BadFiles(tmp_path / "bad.jsonl", dataset, positions.step_of)
    bad.begin()
    bad.update([LateBad(3, "cut", 17)], samples=40)
    positions.jump(5, 64)
    bad.update([LateBad(3, "cut", 17), LateBad(9, "torn", 70)], samples=72)
    assert [(line["sample_id"], line["found"]) for line in read(tmp_path / "bad.jsonl")] == [(3, 3), (9, 6)]
