"""A run that was stopped, killed or damaged continues as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from checkpoints import latest_checkpoint
from safetensors.torch import load_file
from training import LOADERS, MODEL, assert_same_tensors, fitted, make_trainer, numbers, write_images

from fastmae.cli import main
from fastmae.loading import load
from fastmae.train.checkpoint import CheckpointError, open_latest


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, images):
    """A run of 12 steps with checkpoints of steps 5, 10 and 12, saved in the background; tests that write copy it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return fitted(out, images, checkpoint_every_steps=5, background_save=True)


@pytest.mark.parametrize("loader", LOADERS)
def test_stopping_and_resuming_equals_going_straight(tmp_path, images, loader):
    """The stop falls inside a log interval and inside an epoch; the run ends inside both, too."""
    changes = {"precision": "fp32", "batch_size": 2}
    if loader == "torch":
        changes = {"precision": "bf16", "masks_per_image": 2, "optimizer": "muon"}
    options = {"loader": loader, "steps": 14, "clip_grad": 1.0} | changes
    straight = fitted(tmp_path / "straight", images, **options)
    stopped = make_trainer(tmp_path / "stopped", images, **options, checkpoint_every_steps=7)
    stopped.fit(on_checkpoint=lambda path: os.kill(os.getpid(), signal.SIGTERM) if path.name == "step-7" else None)
    assert stopped.step == 7
    assert stopped.run.read_json("status.json") == {"status": "preempted", "step": 7, "reason": "SIGTERM"}
    stopped.run.close()

    torch.manual_seed(99)
    resumed = make_trainer(tmp_path / "stopped", images, **options, resume=True)
    assert resumed.resume(latest_checkpoint(tmp_path / "stopped")) == []
    assert (resumed.step, resumed.samples) == (7, 28 if loader == "torch" else 56)
    assert resumed.fit() == "finished"
    resumed.run.close()
    assert numbers(resumed.run) == numbers(straight.run)
    assert_same_tensors(tmp_path / "straight/checkpoints/step-14", tmp_path / "stopped/checkpoints/step-14")


def test_saving_in_the_background_changes_nothing(tmp_path, images, finished):
    seen = []
    waiting = make_trainer(tmp_path / "run", images, checkpoint_every_steps=5, background_save=False)
    waiting.fit(on_checkpoint=lambda path: seen.append(path.name))
    waiting.run.close()
    assert seen == ["step-0", "step-5", "step-10", "step-12"]
    for step in ("step-5", "step-10", "step-12"):
        assert_same_tensors(*(trainer.run.checkpoints / step for trainer in (waiting, finished)))


def test_consolidated_weights_are_those_of_the_run(tmp_path, finished, capsys):
    run = finished.run.path
    for folder, step in ((run, 12), (run / "checkpoints/step-5", 5)):
        file = tmp_path / f"{step}.safetensors"
        assert main(["consolidate", str(folder), str(file)]) == 0
        assert "MiB" in capsys.readouterr().out
        model, manifest = load(file, return_info=True)
        assert (manifest.step, manifest.config["train"]["steps"], manifest.has_decoder) == (step, 12, True)
        expected = load(run / f"checkpoints/step-{step}") if step == 5 else finished.model
        for name, weight in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], weight), name
    everything = tmp_path / "all.safetensors"
    assert main(["consolidate", str(run), str(everything), "--optimizer"]) == 0
    assert load_file(everything)["optimizer.norm.weight.step"].item() == 12
    capsys.readouterr()
    assert main(["consolidate", str(run), str(tmp_path / "weights.pt")]) == 2
    assert main(["consolidate", str(tmp_path / "no run"), str(tmp_path / "a.safetensors")]) == 2
    assert main(["consolidate", str(run), str(tmp_path / "no folder/a.safetensors")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == f"fastmae: error: OUT: expected a .safetensors file, got {tmp_path}/weights.pt"
    assert errors[1].startswith(f"fastmae: error: {tmp_path}/no run: expected a run folder")
    assert errors[2].startswith(f"fastmae: error: could not write {tmp_path}/no folder/a.safetensors: ")


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, images, finished, capsys):
    run = shutil.copytree(finished.run.path, tmp_path / "run")
    (shard,) = (run / "checkpoints/step-12").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    resumed = make_trainer(run, images, checkpoint_every_steps=5, resume=True)
    resumed.resume(latest_checkpoint(run))
    assert resumed.step == 10
    assert "step-12" in capsys.readouterr().err
    resumed.fit()
    resumed.run.close()
    assert numbers(resumed.run) == numbers(finished.run)
    assert_same_tensors(run / "checkpoints/step-12", finished.run.checkpoints / "step-12")
    assert (run / "checkpoints/step-12.damaged").is_dir()


def test_a_manifest_whose_state_makes_no_sense_is_one_error(tmp_path, images, finished):
    run = shutil.copytree(finished.run.path, tmp_path / "run")
    saved = open_latest(run)
    saved = replace(saved, manifest={**saved.manifest, "guard": ["nothing"]})
    resumed = make_trainer(run, images, checkpoint_every_steps=5, resume=True)
    with pytest.raises(CheckpointError, match=r"step-12/manifest.json: unreadable: "):
        resumed.resume(saved)
    resumed.run.close()


def test_what_differs_is_named_or_refused(tmp_path, images, finished):
    run = shutil.copytree(finished.run.path, tmp_path / "run")
    write_images(tmp_path / "more", 12)

    def resume(images=images, **options):
        trainer = make_trainer(run, images, resume=True, checkpoint_every_steps=5, **options)
        try:
            return trainer.resume(run / "checkpoints/step-12")
        finally:
            trainer.run.close()

    assert resume(log_every_steps=1, keep_checkpoints=9) == []
    assert resume(options={"max_bad_fraction": 0.5, "prefetch": 3, "timeout": 60.0}) == []
    assert resume(options={"value_range": (0.0, 9.0)}) == ["data.value_range was None, is [0.0, 9.0]"]
    assert resume(options={"crop": "center"}) == ["data.crop was random, is center"]
    assert resume(base_lr=1.0) == ["train.base_lr was 0.03, is 1.0"]
    with pytest.raises(CheckpointError, match=r"--train.seed: .*started with, 0, got 1"):
        resume(seed=1)
    with pytest.raises(CheckpointError, match=r"--train.masks-per-image: .*started with, 1, got 2"):
        resume(masks_per_image=2)
    with pytest.raises(CheckpointError, match=r"--train.optimizer: .*started with, adamw, got muon"):
        resume(optimizer="muon")
    assert resume(model=replace(MODEL, mask_strategy="block")) == ["model.mask_strategy was random, is block"]
    with pytest.raises(CheckpointError, match=r"--train.global-batch-size: .*8, got 16"):
        resume(global_batch_size=16)
    with pytest.raises(
        CheckpointError, match=r"another architecture: embed_dim 32 there, 64 here; depth 2 there, 1 here"
    ):
        resume(model=replace(MODEL, embed_dim=64, depth=1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert resume() == [f"num_threads was {threads}, is {threads + 1}"]
    finally:
        torch.set_num_threads(threads)
    assert [difference.split()[0] for difference in resume(tmp_path / "more")] == ["dataset.hash"]
