"""Steps without a finite gradient are skipped; after several the run goes back, names the samples, leaves them out."""

from __future__ import annotations

import io
import json
import math
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import latest_checkpoint, load_checkpoint
from distributed import run_ranks
from PIL import Image
from rich.console import Console
from training import TRAIN, assert_same_tensors, make_trainer

from fastmae.data.sampler import Order, permuted_ids
from fastmae.train import parallel
from fastmae.train.callbacks import Callback
from fastmae.train.checkpoint import Ranks, list_checkpoints
from fastmae.train.config import PretrainConfig
from fastmae.train.guard import Guard, LossScale, SamplePositions, step_unless_non_finite
from fastmae.train.optim import create_optimizer, parameter_groups
from fastmae.train.rules import LEAST_FP16, validate
from fastmae.train.task import MaskedAutoencoding
from fastmae.train.trainer import Trainer

IMAGES, SEED = 120, 0
IDS = permuted_ids(np.arange(IMAGES), IMAGES, SEED)[0].tolist()
BLACK = (43, 52, 60)
"""Positions in the order of images, in steps 6, 7 and 8, whose images are black."""
OPTIONS = {"precision": "fp32", "seed": SEED, "rollback_after": 3, "checkpoint_every_steps": 1, "keep_checkpoints": 2}
SAMPLES = [{"step": step, "sample_ids": IDS[8 * step - 8 : 8 * step]} for step in (6, 7, 8)]


class BlackIsNotFinite(MaskedAutoencoding):
    """A batch with a black image has no finite loss or gradient."""

    def loss(self, forward, *inputs):
        black = (inputs[0] == 0).flatten(1).all(1).any()
        return super().loss(forward, *inputs) * torch.where(black, math.inf, 1.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    black = {IDS[position] for position in BLACK}
    generator = np.random.default_rng(0)
    for index in range(IMAGES):
        pixels = np.zeros((4, 5, 3)) if index in black else generator.integers(20, 256, (4, 5, 3))
        picture = Image.fromarray(pixels.astype(np.uint8)).resize((60, 48), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:03}.png")
    return folder


def make(out: Path, images: Path, *callbacks: Callback, **options) -> Trainer:
    """A trainer for which a black image is too much."""
    console = Console(file=io.StringIO(), width=1000)
    options = OPTIONS | {"task": BlackIsNotFinite, "callbacks": callbacks, "console": console} | options
    return make_trainer(out, images, **options)


def fit(trainer: Trainer, **options) -> str:
    with trainer.run:
        return trainer.fit(**options)


def read(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def records(run: Path) -> list[dict]:
    """The rollbacks, as the rows tell them."""
    return [record for row in read(run) for record in row.get("rolled_back", [])]


class At(Callback):
    """Calls a function after a step, at a visit (None: each); a run that went back visits the step again."""

    def __init__(self, step, function, visit=1):
        self.step, self.function, self.visit, self.visits = step, function, visit, 0

    def after_step(self, trainer):
        if trainer.step == self.step:
            self.visits += 1
            if self.visit in (None, self.visits):
                self.function(trainer)


def leave(trainer):
    os.kill(os.getpid(), signal.SIGTERM)


class Killed(BaseException):
    """Ends a run without a save, as SIGKILL does."""


def die(trainer):
    raise Killed


@pytest.fixture(scope="module")
def straight(tmp_path_factory, images):
    """A run that goes back once, undisturbed, and what it printed."""
    trainer = make(tmp_path_factory.mktemp("straight") / "run", images)
    assert fit(trainer) == "finished"
    return trainer.run.path, trainer.console.file.getvalue()


def test_a_run_goes_back_names_the_samples_and_continues_with_later_images(straight):
    run, printed = straight
    rows = read(run)
    assert [row["step"] for row in rows] == [4, 8, 12]
    # Steps 6 to 8 fail: back to step 5, and on with the images of step 9.
    assert [row["samples"] for row in rows] == [32, 8 * 8 + 3 * 8, 8 * 8 + 7 * 8]
    assert [row["rollbacks"] for row in rows] == [0, 1, 1]
    assert all(row["loss"] is not None and row["skipped_steps"] == 0 for row in rows)
    record = {"first_step": 6, "last_step": 8, "to_step": 5, "positions_left_out": [40, 63], "skipped_samples": SAMPLES}
    assert [row.get("rolled_back") for row in rows] == [None, [record], None]
    ids = ", ".join(map(str, IDS[40:64]))
    failed = f"no finite gradient in steps 6 to 8, all skipped (sample ids {ids})"
    assert f"ROLLED BACK TO STEP 5 (1 of at most 3 times): {failed}" in printed
    assert "Images 40 to 63 of the run's order are left out" in printed
    # The checkpoint before the streak outlived two newer ones of the streak, which are set aside.
    assert {path.name for path in (run / "checkpoints").glob("*.abandoned")} == {"step-6.abandoned", "step-7.abandoned"}
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-12", "step-11"]


def test_what_follows_is_the_checkpoint_on_later_images(straight, images, tmp_path):
    """As if somebody had taken step 5's checkpoint and begun the data at position 64 by hand."""
    fit(make(tmp_path / "run", images, At(5, leave)))
    second = make(tmp_path / "run", images, resume=True)
    assert second.resume(latest_checkpoint(tmp_path / "run")) == []
    second.positions.jump(5, 64)
    fit(second)
    assert_same_tensors(straight[0] / "checkpoints/step-12", tmp_path / "run/checkpoints/step-12")


def test_a_few_skipped_steps_are_named_and_no_reason_to_go_back(images, tmp_path):
    trainer = make(tmp_path / "run", images, steps=9, rollback_after=4, log_every_steps=3, checkpoint_every_steps=None)
    assert fit(trainer) == "finished"
    rows = read(tmp_path / "run")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2]
    assert [row.get("skipped_samples") for row in rows] == [None, SAMPLES[:1], SAMPLES[1:]]


MOMENTS = [
    (leave, 7, 1, 0),  # among the skipped steps
    (die, 8, 1, 0),  # when they would have been noticed
    (die, 6, 2, 0),  # gone back, and not saved since
    (None, 0, 0, 1),
    (leave, 8, 1, 1),  # before the run goes back
]
SLOW = [(how, step, 1, 0) for how in (leave, die) for step in range(5, 12)]
SLOW += [(how, step, 2, 0) for how in (leave, die) for step in range(6, 9)]  # the steps that the run goes back over
MOMENTS += [pytest.param(*moment, marks=pytest.mark.slow) for moment in SLOW if moment not in MOMENTS]


@pytest.mark.parametrize(("how", "step", "visit", "late"), MOMENTS)
def test_interrupted_at_any_moment_it_continues_as_undisturbed(straight, images, tmp_path, how, step, visit, late):
    """Rows are read an interval late on a GPU and with several ranks."""
    out = tmp_path / "run"
    trainer = make(out, images, At(step, how, visit))
    trainer.reporter._late = late
    with pytest.raises(Killed) if how is die else nullcontext():
        assert fit(trainer) == ("preempted" if how else "finished")
    if how:
        resumed = make(out, images, resume=True)
        assert resumed.resume(latest_checkpoint(out)) == []
        assert fit(resumed) == "finished"
    names = ("step", "samples", "epoch", "lr", "loss", "grad_norm", "skipped_steps", "rollbacks", "rolled_back")
    one, other = ([[row.get(name) for name in names] for row in read(run)] for run in (out, straight[0]))
    assert one == other
    manifests = [json.loads((run / "checkpoints/step-12/manifest.json").read_text()) for run in (out, straight[0])]
    for name in ("samples_consumed", "positions", "guard"):
        assert manifests[0][name] == manifests[1][name]
    assert_same_tensors(straight[0] / "checkpoints/step-12", out / "checkpoints/step-12")


def test_the_last_steps_may_be_the_ones(images, tmp_path):
    trainer = make(tmp_path / "run", images, steps=8)
    trainer.reporter._late = 1
    assert fit(trainer) == "finished"
    assert [row["skipped_steps"] for row in read(tmp_path / "run")] == [0, 0]


def test_damaged_checkpoints_and_weights_that_are_not_finite_are_passed_over(images, tmp_path, capsys):
    bias = {}

    def forget(trainer):  # what step 4's checkpoint has
        bias.update(trainer=trainer, value=trainer.model.norm.bias.detach().clone())
        trainer.model.norm.bias.data[0] = math.nan

    def mend_and_damage(path):
        if path.name == "step-4":
            bias["trainer"].model.norm.bias.data.copy_(bias["value"])
        if path.name == "step-5":
            (shard,) = path.glob("*.safetensors")
            shard.write_bytes(shard.read_bytes()[:-10])

    trainer = make(tmp_path / "run", images, At(4, forget), keep_checkpoints=9, steps=8)
    assert fit(trainer, on_checkpoint=mend_and_damage) == "finished"
    assert "WARNING: damaged checkpoint passed over: " in capsys.readouterr().err
    assert "step-4 is not used: its weights or moments are not all finite" in trainer.console.file.getvalue()
    assert [(r["to_step"], r["positions_left_out"]) for r in records(tmp_path / "run")] == [(3, [24, 63])]
    assert (tmp_path / "run/checkpoints/step-5.abandoned").is_dir()


def test_a_run_that_cannot_be_mended_ends_and_says_what_happened(images, tmp_path):
    """Whenever it comes to step 3, its weights are finite and of no use, in the checkpoint too."""

    def spoil(trainer):
        trainer.model.decoder_pred.weight.data.mul_(1e30)

    trainer = make(tmp_path / "run", images, At(3, spoil, None), max_rollbacks=2, keep_checkpoints=9, log_every_steps=3)
    with pytest.raises(FloatingPointError) as caught:
        fit(trainer)
    text = str(caught.value)
    assert text.startswith("no finite gradient in steps 4 to 6, all skipped (sample ids ")
    assert text.endswith(
        "). The run has rolled back 2 times, the limit of --train.max-rollbacks. To continue, --resume with a higher "
        "limit and a lower --train.base-lr, --train.clip-grad 1.0"
    )
    # The checkpoint of step 3 has failed twice then, on different images: the second time it is not used.
    assert [record["to_step"] for record in trainer.guard.rollbacks] == [3, 2]
    rows = read(tmp_path / "run")
    assert [row["step"] for row in rows] == [3, 6]
    assert len({sample_id for step in rows[1]["skipped_samples"] for sample_id in step["sample_ids"]}) == 24
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "failed"


def test_without_a_good_checkpoint_the_run_ends(images, tmp_path):
    trainer = make(tmp_path / "run", images, rollback_after=4)
    trainer.model.decoder_pred.weight.data[0, 0] = math.nan
    before = trainer.model.decoder_pred.bias.clone()
    with pytest.raises(FloatingPointError, match=r"in steps 1 to 4, .*There is no good checkpoint of an earlier step"):
        fit(trainer)
    assert torch.equal(trainer.model.decoder_pred.bias, before)
    assert [(row["loss"], row["skipped_steps"]) for row in read(tmp_path / "run")] == [(None, 4)]


def train_on_two(rank: int, folder: Path, images: Path) -> str:
    """Two ranks, of which one has the black image of step 6."""
    place = parallel.initialize("fsdp")
    with Ranks.create() as ranks:
        options = {"place": place, "ranks": ranks, "parallel": "fsdp", "reshard_after_forward": False}
        return fit(make(folder / "two", images, steps=8, **options))


def test_two_ranks_skip_and_go_back_together(images, tmp_path):
    fit(make(tmp_path / "one", images, steps=8))
    assert run_ranks(train_on_two, 2, tmp_path, images, timeout=100) == ["finished", "finished"]
    for row, single in zip(read(tmp_path / "two"), read(tmp_path / "one"), strict=True):
        assert row["loss"] == pytest.approx(single["loss"], abs=1e-6)
        for name in ("step", "samples", "rollbacks", "skipped_steps", "rolled_back"):
            assert row.get(name) == single.get(name)
    two, one = (load_checkpoint(latest_checkpoint(tmp_path / run), prefix="model.")[0] for run in ("two", "one"))
    for name, value in one.items():
        assert torch.allclose(two[name], value, atol=5e-5), name


def test_the_loss_scale_is_found_and_goes_back_with_the_weights(images, tmp_path):
    """The first one overflows once or twice; three black batches halve it as often, and the checkpoint undoes that."""
    scales = []
    callbacks = [At(step, lambda trainer: scales.append(float(trainer.loss_scale.value)), None) for step in (5, 7)]
    trainer = make(tmp_path / "run", images, *callbacks, precision="fp16", steps=8)
    initial = float(trainer.loss_scale.value.fill_(2.0**22))
    assert fit(trainer) == "finished"
    found = scales[0]
    assert found in (initial / 2, initial / 4)
    assert scales == [found, found / 4, found]  # steps 5 and 7, and 7 again
    resumed = make(tmp_path / "run", images, resume=True, precision="fp16", steps=8)
    assert resumed.resume(latest_checkpoint(tmp_path / "run")) == []
    resumed.run.close()
    assert float(resumed.loss_scale.value) == found


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16", "cuda_graph": True}])
def test_on_a_gpu(images, tmp_path, options):
    """Rows are read an interval late there, saves run beside the training, and the step may be a graph."""
    trainer = make(tmp_path / "run", images, place=parallel.initialize("none", "cuda"), device="cuda", **options)
    assert fit(trainer) == "finished"
    rows = read(tmp_path / "run")
    assert [(row["step"], row["samples"], row["rollbacks"]) for row in rows] == [(4, 32, 0), (8, 88, 1), (12, 120, 1)]
    assert all(row["loss"] is not None and row["skipped_steps"] == 0 for row in rows)
    assert records(tmp_path / "run")[0]["skipped_samples"] == SAMPLES


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_leaves_everything_as_it_was(value):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    optimizer = create_optimizer(parameter_groups(model, TRAIN.weight_decay), TRAIN)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    state = [*model.parameters()]
    for bad in (None, value, None):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        if bad is not None:
            model[0].weight.grad[0, 0] = bad
        before = [tensor.clone() for tensor in state]
        assert step_unless_non_finite(optimizer, clip_grad=1.0)[1] == (bad is not None)
        same = [torch.equal(a, b) for a, b in zip(state, before, strict=True)]
        assert all(same) if bad is not None else not any(same)
        state = [*model.parameters(), *(t for p in model.parameters() for t in optimizer.state[p].values())]


def test_the_loss_scale_is_torchs():
    overflows, interval = [0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1], 3
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=interval)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    ours = LossScale(torch.device("cpu"), 1024.0, interval)
    for step, overflow in enumerate(overflows):
        theirs.scale(parameter.sum() * (math.inf if overflow else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        if step == 9:
            state, ours = ours.state_dict(), LossScale(torch.device("cpu"), 1.0, interval)
            ours.load_state_dict(state)
        ours.update(torch.tensor(float(overflow)))
        assert float(ours.value) == theirs.get_scale()


def feed(guard: Guard, skipped: list[int], interval: int = 4, begin: int = 0) -> None:
    for start in range(0, len(skipped), interval):
        part = skipped[start : start + interval]
        guard.observe({"step": begin + start + len(part)}, {"skipped": part})


def new_guard() -> Guard:
    return Guard(5, SamplePositions(8, Order(IMAGES, SEED)))


@pytest.mark.parametrize("interval", [1, 4, 100])
def test_so_many_in_a_row_are_a_failure_however_late_they_are_seen(interval):
    guard = new_guard()
    feed(guard, [1, 1, 1, 1, 0] * 5 + [0, 0], interval)
    assert not guard.due
    feed(guard, [0, 1, 1, 1], interval, begin=27)
    state, guard = json.loads(json.dumps(guard.state_dict())), new_guard()
    guard.load_state_dict(state)
    feed(guard, [1, 1, 1, 0, 0, 0, 0, 1], interval, begin=31)
    assert guard.due
    assert guard.newest_good() == 28
    assert guard.newest_taken(40, lambda: {"skipped": [1]})() == 28
    assert guard.newest_taken(41, lambda: {"skipped": [1, 0, 1]})() == 40
    failure = guard.failure()
    assert (failure.first, failure.last, failure.next_position) == (29, 33, 33 * 8)
    assert "steps 29 to 33, all skipped" in str(failure)
    assert "and 8 more in metrics.jsonl" in str(failure)
    guard.roll_back(28, failure)
    assert not guard.due
    feed(guard, [1] * 5, interval, begin=28)
    assert (guard.due, guard.newest_good()) == (True, 27)  # these weights have failed twice


def test_the_state_of_version_0_1_0_is_understood():
    guard = new_guard()
    guard.load_state_dict({"due": None, "first": 7, "length": 2, "last_finite": 6, "rollbacks": 2, "went_to": 3})
    row = {"step": 9}
    guard.observe(row, {"skipped": [1]})
    assert (guard.state_dict()["length"], row["rollbacks"], "rolled_back" in row) == (3, 2, False)


def test_positions_follow_the_steps_with_jumps():
    positions = SamplePositions(8, Order(300, SEED))
    assert (positions.after(5), positions.step_of(47)) == (40, 6)
    positions.jump(5, 64)
    assert [positions.after(step) for step in (4, 5, 6)] == [32, 64, 72]
    assert [positions.step_of(position) for position in (39, 64, 71, 72)] == [5, 6, 6, 7]
    positions.jump(9, 120)
    positions.jump(7, 200)  # gone back to before the last jump
    assert [positions.after(step) for step in (4, 5, 6, 7, 8)] == [32, 64, 72, 200, 208]
    restored = SamplePositions(8, Order(300, SEED))
    restored.load_state_dict(json.loads(json.dumps(positions.state_dict())))
    assert restored.state_dict() == positions.state_dict()
    assert restored.sample_ids(200, 8) == permuted_ids(np.arange(200, 208), 300, SEED)[0].tolist()


def test_fp16_needs_a_rollback_after_that_the_search_for_the_loss_scale_does_not_reach():
    """The worst that the first scale can be wrong by takes 16 steps."""
    scale, overflows = LossScale(torch.device("cpu")), 0
    while float(scale.value) * 60000 > 65504:
        overflows += 1
        scale.update(torch.tensor(1.0))
    assert overflows == 16 < LEAST_FP16
    with pytest.raises(ValueError, match=r"--train.rollback-after: expected at least 17 with fp16.*, got 16"):
        validate(PretrainConfig(train=replace(TRAIN, precision="fp16", rollback_after=16)))
    validate(PretrainConfig(train=replace(TRAIN, precision="fp16", rollback_after=17)))
