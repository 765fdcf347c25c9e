"""``--report.profile-at-step``: the trace and its summary are there, the training is what it is without."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
import torch
from training import make_trainer, write_images

from fastmae.train.profile import Profile, StageTimes

STAGES = ("data", "masking", "forward", "backward", "optimizer")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def train(out, images, profile=None, *, before=lambda trainer: None, **options):
    """Run to the end, profiled or not; the trainer, what it printed in ``.said``, its folder unlocked."""
    trainer = make_trainer(out, images, **{"precision": "fp32"} | options)
    trainer.callbacks = [Profile(*profile)] if profile else []
    before(trainer)
    assert trainer.fit() == "finished"
    trainer.run.close()
    trainer.said = trainer.console.file.getvalue().replace("\n", "")
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory, images):
    """A run that nobody profiles, with the times of its stages and a checkpoint of step 6."""

    def measure(trainer):
        trainer.stage = StageTimes(trainer.device)

    return train(tmp_path_factory.mktemp("runs") / "plain", images, before=measure, checkpoint_every_steps=6)


def read_trace(path):
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def test_a_trace_has_the_wanted_steps_with_their_stages_and_the_training_is_the_same(tmp_path, images, plain):
    profiled = train(tmp_path / "run", images, (5, 3))
    assert all(map(torch.equal, plain.model.state_dict().values(), profiled.model.state_dict().values()))
    trace = tmp_path / "run" / "traces" / "rank-0-steps-5-7.json.gz"
    events = [event["name"] for event in read_trace(trace) if event.get("cat") == "user_annotation"]
    assert {name: events.count(name) for name in STAGES} == dict.fromkeys(STAGES, 3)
    assert "aten::addmm" in trace.with_name("rank-0-steps-5-7.txt").read_text()
    assert str(trace) in profiled.said
    assert profiled.stage is profiled.reporter.stages
    assert all(row["data_time"] > 0 for row in profiled.run.read_metrics())  # rows have their times meanwhile


def test_times_of_the_stages_are_those_of_the_steps(plain):
    times = plain.stage
    found = times.take()
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys(STAGES, 12)
    assert all(sum(seconds) > 0 for seconds in found.values())
    assert not any(times.take().values())


def test_a_resumed_run_that_ends_in_between_leaves_the_steps_that_it_made(tmp_path, images, plain):
    checkpoint = plain.run.checkpoints / "step-6"
    train(tmp_path / "run", images, (11, 5), before=lambda trainer: trainer.resume(checkpoint))
    names = [path.name for path in sorted((tmp_path / "run" / "traces").iterdir())]
    assert names == ["rank-0-steps-11-12.json.gz", "rank-0-steps-11-12.txt"]


@pytest.mark.parametrize("first", [6, 13, 99])
def test_steps_that_the_run_does_not_make_are_named_before_it_begins(tmp_path, images, first):
    trainer = make_trainer(tmp_path / "run", images)
    trainer.step, profile = 6, Profile(first, 2)
    profile.begin(trainer)
    assert trainer.stage is trainer.reporter.stages
    said = trainer.console.file.getvalue().replace("\n", "")
    profile.end()
    assert said == f"--report.profile-at-step {first}: the run trains steps 7 to 12; nothing will be profiled"


def test_a_run_that_ends_before_says_that_nothing_was_profiled(tmp_path, images):
    trainer = train(tmp_path / "run", images, (12, 2), max_minutes=1e-9)
    assert f"--report.profile-at-step 12: the run ended at step {trainer.step}; nothing was profiled" in trainer.said
    assert not (tmp_path / "run" / "traces").exists()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, images):
    run = tmp_path / "run"
    trainer = train(run, images, (2, 1), before=lambda trainer: (run / "traces").write_text("in the way"), steps=4)
    assert "the trace could not be written" in trainer.said


@pytest.mark.parametrize(("rank", "local_rank", "written"), [(8, 0, True), (9, 1, False)])
def test_the_first_process_of_each_node_is_recorded_from_the_first_step_on(tmp_path, images, rank, local_rank, written):
    def place(trainer):
        trainer.parallelism = replace(trainer.parallelism, rank=rank, local_rank=local_rank)

    train(tmp_path / "run", images, (1, 1), before=place, steps=4)
    trace = tmp_path / "run" / "traces" / f"rank-{rank}-steps-1-1.json.gz"
    assert trace.parent.exists() == written
    assert not written or sum(event["name"] == "backward" for event in read_trace(trace)) == 1


@pytest.mark.gpu
def test_a_trace_of_a_gpu_has_kernels_and_stages_have_device_times(tmp_path, images):
    train(tmp_path / "run", images, (5, 3), device="cuda", precision="bf16")
    trace = tmp_path / "run" / "traces" / "rank-0-steps-5-7.json.gz"
    assert any(event.get("cat") == "kernel" for event in read_trace(trace))
    trainer = make_trainer(tmp_path / "other", images, device="cuda", precision="bf16")
    trainer.stage = times = StageTimes(trainer.device)
    trainer.fit()
    torch.cuda.synchronize()
    assert all(sum(seconds) > 0 for seconds in times.take().values())
