"""``--report.profile-at-step``: the trace and its summary are there, the training is what it is without."""

from __future__ import annotations

import gzip
import json
import time
from dataclasses import replace

import pytest
import torch
from training import make_trainer, write_images

from fastmae.train.profile import Profile, StageTimes, no_stage

STAGES = ("data", "masking", "forward", "backward", "optimizer")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def train(out, images, profile=None, *, resume_from=None, **options):
    """Run to the end, profiled or not; the trainer, what it printed in ``.said``, its folder unlocked."""
    trainer = make_trainer(out, images, resume=resume_from is not None, **options)
    if profile is not None:
        trainer.callbacks = [Profile(*profile)]
    if resume_from is not None:
        trainer.resume(resume_from)
    trainer.fit()
    trainer.run.close()
    trainer.said = trainer.console.file.getvalue().replace("\n", "")
    return trainer


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def read_trace(path):
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def test_a_trace_has_the_wanted_steps_with_their_stages_and_the_training_is_the_same(tmp_path, images):
    plain = train(tmp_path / "plain", images)
    profiled = train(tmp_path / "run", images, (5, 3))
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(profiled)[name]), name
    trace = tmp_path / "run" / "traces" / "rank-0-steps-5-7.json.gz"
    events = [event["name"] for event in read_trace(trace) if event.get("cat") == "user_annotation"]
    assert {name: events.count(name) for name in STAGES} == dict.fromkeys(STAGES, 3)
    assert "aten::addmm" in trace.with_name("rank-0-steps-5-7.txt").read_text()
    assert str(trace) in profiled.said
    assert profiled.stage is no_stage


@pytest.mark.parametrize("first", [1, 2])
def test_the_first_steps_can_be_had(tmp_path, images, first):
    train(tmp_path / "run", images, (first, 1), steps=4)
    trace = tmp_path / "run" / "traces" / f"rank-0-steps-{first}-{first}.json.gz"
    assert sum(event["name"] == "backward" for event in read_trace(trace)) == 1


def test_steps_are_those_of_the_run_after_a_resume_too(tmp_path, images):
    first = train(tmp_path / "run", images, checkpoint_every_steps=6)
    resumed = train(tmp_path / "run", images, (9, 2), resume_from=first.run.checkpoints / "step-6")
    assert [path.name for path in sorted((tmp_path / "run" / "traces").iterdir())] == [
        "rank-0-steps-9-10.json.gz", "rank-0-steps-9-10.txt",
    ]  # fmt: skip
    assert resumed.step == 12


def test_a_step_in_the_past_is_said_to_be_so(tmp_path, images):
    first = train(tmp_path / "run", images, checkpoint_every_steps=6)
    resumed = train(tmp_path / "run", images, (6, 2), resume_from=first.run.checkpoints / "step-6")
    assert "--report.profile-at-step 6: the run is at step 6 already; nothing is profiled" in resumed.said
    assert not (tmp_path / "run" / "traces").exists()


@pytest.mark.parametrize("step", [13, 14, 99])
def test_a_run_that_is_too_short_says_so_before_it_begins(tmp_path, images, step):
    trainer = train(tmp_path / "run", images, (step, 2))
    said = f"--report.profile-at-step {step}: the run ends at step 12; nothing will be profiled"
    assert trainer.said.count("--report.profile-at-step") == 1
    assert -1 < trainer.said.index(said) < trainer.said.index("step  4/12")
    assert not (tmp_path / "run" / "traces").exists()


def test_a_run_that_ends_before_says_that_nothing_was_profiled(tmp_path, images):
    trainer = train(tmp_path / "run", images, (12, 2), max_minutes=1e-9)
    assert f"--report.profile-at-step 12: the run ended at step {trainer.step}; nothing was profiled" in trainer.said


def test_a_run_that_ends_in_between_leaves_the_steps_that_it_made(tmp_path, images):
    train(tmp_path / "run", images, (11, 5))
    assert (tmp_path / "run" / "traces" / "rank-0-steps-11-12.txt").exists()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, images):
    trainer = make_trainer(tmp_path / "run", images)
    (tmp_path / "run" / "traces").write_text("in the way")
    trainer.callbacks = [Profile(2, 1)]
    assert trainer.fit() == "finished"
    assert "the trace could not be written" in trainer.console.file.getvalue()


def test_times_of_the_stages_are_those_of_the_steps(tmp_path, images):
    trainer = make_trainer(tmp_path / "run", images, batch_size=4)
    trainer.stage = times = StageTimes(trainer.device)
    begun = time.perf_counter()
    trainer.fit()
    found, elapsed = times.read(), time.perf_counter() - begun
    assert found.keys() == set(STAGES)
    assert 0 < sum(found.values()) < elapsed
    assert times.read() == {}


@pytest.mark.parametrize(("rank", "local_rank", "written"), [(8, 0, True), (9, 1, False)])
def test_the_first_process_of_each_node_is_recorded(tmp_path, images, rank, local_rank, written):
    trainer = make_trainer(tmp_path / "run", images, steps=4)
    trainer.parallelism = replace(trainer.parallelism, rank=rank, local_rank=local_rank)
    trainer.callbacks = [Profile(2, 1)]
    trainer.fit()
    assert (tmp_path / "run" / "traces" / f"rank-{rank}-steps-2-2.json.gz").exists() == written
    assert (tmp_path / "run" / "traces").exists() == written


@pytest.mark.gpu
def test_a_trace_of_a_gpu_has_kernels_and_stages_have_device_times(tmp_path, images):
    train(tmp_path / "run", images, (5, 3), device="cuda", precision="bf16")
    trace = tmp_path / "run" / "traces" / "rank-0-steps-5-7.json.gz"
    assert any(event.get("cat") == "kernel" for event in read_trace(trace))
    trainer = make_trainer(tmp_path / "other", images, device="cuda", precision="bf16")
    trainer.stage = times = StageTimes(trainer.device)
    trainer.fit()
    assert all(seconds > 0 for seconds in times.read().values())
