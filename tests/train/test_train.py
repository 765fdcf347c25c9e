"""The loop: the loss falls, splitting a batch changes nothing, no step waits for the device, the folder is complete."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import traceback
from dataclasses import replace

import pytest
import torch
from devices import fake_cuda
from training import MODEL, TRAIN, fitted, make_trainer, write_images

from fastmae.data import Batch, has_dali
from fastmae.model import create_model
from fastmae.train import trainer as loop
from fastmae.train.config import PretrainConfig
from fastmae.train.guard import LossScale, step_unless_non_finite
from fastmae.train.liveness import StopRequest
from fastmae.train.optim import create_optimizer
from fastmae.train.task import MaskedAutoencoding


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def test_the_loss_falls_and_the_folder_is_complete(tmp_path, images):
    """The run ends inside an interval of rows and of checkpoints; old checkpoints are deleted."""
    options = {"steps": 98, "base_lr": 0.1, "checkpoint_every_steps": 30, "keep_checkpoints": 2}
    trainer = make_trainer(tmp_path / "run", images, **options)
    rows, checkpoints = [], []
    assert trainer.fit(on_log=rows.append, on_checkpoint=checkpoints.append) == "finished"
    trainer.run.close()
    assert rows == trainer.run.read_metrics()
    assert [row["step"] for row in rows] == [*range(4, 97, 4), 98]
    assert rows[-1]["loss"] < 0.85 * rows[0]["loss"]
    assert rows[-1]["samples"] == 784
    assert rows[-1]["epoch"] == pytest.approx(784 / 11)
    assert all(row["images_per_second"] > 0 and 0 <= row["data_share"] <= 1 for row in rows)
    assert all(row["skipped_steps"] == 0 and row["grad_norm"] > 0 for row in rows)
    assert [path.name for path in checkpoints] == ["step-0", "step-30", "step-60", "step-90", "step-98"]
    assert {path.name for path in trainer.run.checkpoints.iterdir()} == {"step-90", "step-98"}
    assert trainer.run.read_json("status.json") == {"status": "finished", "step": 98, "reason": "all steps done"}
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


GROWING = {"options": {"progressive_sizes": (16, 32)}, "precision": "fp32", "log_every_steps": 1}
"""Sizes grow after 44 of 96 images, in the middle of the sixth step; a step has one size however it is split."""


@pytest.fixture(scope="module")
def growing(tmp_path_factory, images):
    return fitted(tmp_path_factory.mktemp("growing") / "run", images, **GROWING)


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 2}, {"compile": "blocks"}, pytest.param({"compile": "model"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_splitting_a_batch_and_compiling_change_nothing(tmp_path, images, growing, monkeypatch, changes):
    """With the graph that the compiler captures, run without the code generation that takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    other = fitted(tmp_path / "run", images, **GROWING, **changes)
    assert other.accumulation == (4 if "batch_size" in changes else 1)
    rows, expected = other.run.read_metrics(), growing.run.read_metrics()
    assert [row["input_height"] for row in rows] == [16] * 6 + [32] * 6
    assert [row["input_height"] for row in expected] == [16] * 6 + [32] * 6
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    for (name, a), b in zip(growing.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=5e-5, msg=name)


def maskings_of_a_step(trainer):
    """Images and masking of each forward pass of one optimiser step."""
    calls, forward = [], trainer.forward

    def recorded(images, masking, **options):
        calls.append((images, masking))
        return forward(images, masking=masking, **options)

    trainer.forward = recorded
    with trainer.loader_at(trainer.samples) as trainer.loader:
        trainer.train_step()
    trainer.forward = forward
    return calls


def test_several_masks_an_image_divide_decoding_and_leave_steps_and_rates_alone(tmp_path, images):
    options = {"steps": None, "epochs": 10, "warmup_steps": None, "warmup_epochs": 2}
    once = make_trainer(tmp_path / "once", images, **options)
    twice = make_trainer(tmp_path / "twice", images, **options, masks_per_image=2, batch_size=4)
    assert once.schedule == twice.schedule
    assert (twice.schedule.total_steps, twice.schedule.peak_lr) == (14, 0.03 * 8 / 256)
    calls = maskings_of_a_step(twice)
    assert [len(x) for x, _ in calls] == [2, 2]
    assert [len(masking.mask) for _, masking in calls] == [4, 4]
    assert not torch.equal(calls[0][1].mask[0], calls[0][1].mask[1])
    (whole,) = maskings_of_a_step(once)
    assert torch.equal(whole[0][:4], torch.cat([x for x, _ in calls]))
    assert torch.equal(whole[1].mask[:2], calls[0][1].mask[::2])
    assert (once.samples, twice.samples) == (8, 4)
    for trainer in (once, twice):
        trainer.fit()
        trainer.run.close()
    ours, theirs = ([(row["step"], row["epoch"], row["lr"]) for row in t.run.read_metrics()] for t in (twice, once))
    assert ours == theirs
    assert [row["samples"] for row in twice.run.read_metrics()] == [4 * step for step, _, _ in ours]


def test_the_mask_strategy_is_that_of_the_configuration(tmp_path, images):
    masks = {}
    for strategy in ("random", "block", "grid"):
        trainer = make_trainer(tmp_path / strategy, images, model=replace(MODEL, mask_strategy=strategy))
        ((_, masking),) = maskings_of_a_step(trainer)
        masks[strategy] = mask = masking.mask.view(-1, 4, 6)
        assert torch.equal(mask, mask[:, :2, :2].repeat(1, 2, 3)) == (strategy == "grid")
    assert not torch.equal(masks["random"], masks["block"])


def test_a_step_reads_nothing_back_from_the_device(tmp_path, images, monkeypatch):
    """What would synchronise a GPU must not happen between two logs; the loader works on the host and is exempt."""
    trainer = make_trainer(tmp_path / "run", images, clip_grad=1.0)
    with trainer.loader_at(trainer.samples) as loader:
        batches = iter([next(loader) for _ in range(3)])
    trainer.loader = batches
    trainer.train_step()  # creates the optimiser's state

    def watched(name):
        read = getattr(torch.Tensor, name)

        def refuse(tensor, *arguments):
            callers = {frame.filename for frame in traceback.extract_stack()}
            if not any("/fastmae/ops/" in caller for caller in callers):  # checks of index values, on the CPU only
                raise AssertionError(f"Tensor.{name} reads on the host")
            return read(tensor, *arguments)

        return refuse

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    trainer.train_step()
    trainer.train_step()
    monkeypatch.undo()
    assert len(trainer.reporter.values.steps) == 3
    trainer.run.close()


def test_a_step_is_all_on_the_device_and_copies_nothing_to_it():
    """Masks, loss and update on a GPU that is a fake one."""
    config = PretrainConfig(model=MODEL, train=replace(TRAIN, clip_grad=1.0, masks_per_image=2))
    task = MaskedAutoencoding(config, create_model(**config.model_arguments()), None, None)
    with fake_cuda(autocast=torch.bfloat16) as waiting:
        task.model.to("cuda")
        optimizer = create_optimizer(task.parameter_groups(), config.train)
        scale = LossScale(torch.device("cuda"))
        images = torch.zeros(4, 32, 48, 3, dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
        keys = torch.zeros(4, dtype=torch.int64, device="cuda")
        waiting.clear()
        with task.model.cast_weights(torch.bfloat16):
            loss = task.loss(task.model, *task.prepare(Batch(images, keys, keys)))
        for parameter in task.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        norm, skipped = step_unless_non_finite(optimizer, config.train.clip_grad, scale)
        assert all(value.is_cuda for value in (loss, norm, skipped))


def test_the_time_limit_ends_a_run_with_a_checkpoint(tmp_path, images):
    trainer = make_trainer(tmp_path / "run", images, steps=10**6, max_minutes=0.5 / 60)
    assert trainer.fit() == "finished"
    assert 0 < trainer.step < 10**6
    assert (trainer.run.checkpoints / f"step-{trainer.step}").is_dir()
    assert trainer.run.read_json("status.json")["reason"] == "time limit"
    text = f"Time limit of 0.00833333 minutes reached at step {trainer.step:,} of 1,000,000\n"
    assert text in trainer.console.file.getvalue()


def test_the_first_signal_asks_and_the_second_leaves():
    child = os.fork()
    if child == 0:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            if stop.requested == "SIGINT":
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)  # not reached
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_sizes_grow_on_a_gpu(tmp_path, images, loader):
    """With compiled kernels, in bf16, from both loaders: the same run, stopped half-way and continued."""
    if loader == "dali" and not has_dali():
        pytest.skip("needs NVIDIA DALI")
    options = {"options": {"progressive_sizes": (16, 32)}, "device": "cuda", "loader": loader, "log_every_steps": 1}
    trainer = make_trainer(tmp_path / "run", images, checkpoint_every_steps=4, **options)
    trainer.fit()
    trainer.run.close()
    rows = trainer.run.read_metrics()
    assert [row["input_height"] for row in rows] == [16] * 6 + [32] * 6
    resumed = make_trainer(tmp_path / "run", images, resume=True, **options)
    resumed.resume(tmp_path / "run/checkpoints/step-4")
    resumed.fit()
    for before, after in zip(rows, resumed.run.read_metrics(), strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-2)
        assert after["samples"] == before["samples"]


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits_for_it(tmp_path):
    """Between two rows of metrics the host only queues work: anything that reads a value back raises here."""
    trainer = make_trainer(tmp_path / "run", write_images(tmp_path / "images"), device="cuda", batch_size=4)
    with trainer.loader_at(trainer.samples) as trainer.loader:
        batch = next(trainer.loader)
        trainer.loader = iter(lambda: batch, None)
        trainer.train_step()  # compiles kernels and creates the optimiser's state
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert trainer.step == 2


def test_a_step_can_be_read_at_a_glance():
    assert len(inspect.getsource(loop.Trainer.train_step).splitlines()) < 25
