"""A run that was stopped, killed or damaged goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from training import LOADERS, MODEL, assert_same_tensors, make_trainer, numbers, write_images

from fastmae.cli import main
from fastmae.train.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints, load_checkpoint
from fastmae.train.weights import load_model


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("precision", "batch_size", "masks"), [("bf16", None, 2), ("fp32", 2, 1)])
def test_stopping_and_resuming_equals_going_straight(tmp_path, images, loader, precision, batch_size, masks):
    """The stop falls inside a log interval and inside an epoch; the run ends inside both, too."""
    options = {"loader": loader, "precision": precision, "batch_size": batch_size, "steps": 14, "clip_grad": 1.0}
    options |= {"masks_per_image": masks}
    straight = make_trainer(tmp_path / "straight", images, **options)
    straight.fit()
    straight.run.close()

    stopped = make_trainer(tmp_path / "stopped", images, **options, checkpoint_every_steps=7)
    stopped.fit(on_checkpoint=lambda path: os.kill(os.getpid(), signal.SIGTERM) if path.name == "step-7" else None)
    assert stopped.step == 7
    assert stopped.run.read_json("status.json") == {"status": "preempted", "step": 7, "reason": "SIGTERM"}
    stopped.run.close()

    torch.manual_seed(99)
    resumed = make_trainer(tmp_path / "stopped", images, **options, resume=True)
    assert resumed.resume(latest_checkpoint(tmp_path / "stopped")) == []
    assert (resumed.step, resumed.samples) == (7, 56 // masks)
    assert resumed.fit() == "finished"
    resumed.run.close()
    assert numbers(resumed.run) == numbers(straight.run)
    assert_same_tensors(tmp_path / "straight/checkpoints/step-14", tmp_path / "stopped/checkpoints/step-14")


def test_saving_in_the_background_changes_nothing(tmp_path, images, monkeypatch):
    seen = {}
    for name, background in (("waiting", False), ("background", True)):
        trainer = make_trainer(tmp_path / name, images, checkpoint_every_steps=4, background_save=background)
        seen[name] = []
        trainer.fit(on_checkpoint=lambda path, name=name: seen[name].append(path.name))
        trainer.run.close()
    assert seen["background"] == seen["waiting"] == ["step-0", "step-4", "step-8", "step-12"]
    for step in ("step-4", "step-8", "step-12"):
        assert_same_tensors(*(tmp_path / name / "checkpoints" / step for name in seen))

    def full(path, *arguments):
        raise OSError(28, "No space left on device", str(path))

    trainer = make_trainer(tmp_path / "full", images, checkpoint_every_steps=4, background_save=True)

    def fill(path):
        monkeypatch.setattr("fastmae.train.checkpoint.save.write_tensors", full)

    with pytest.raises(
        CheckpointError, match=r"3 saves in a row failed.*step-0.*could not write .*step-12: .*No space"
    ):
        trainer.fit(on_checkpoint=fill)
    trainer.run.close()
    assert trainer.run.read_json("status.json")["status"] == "failed"
    assert list_checkpoints(tmp_path / "full/checkpoints") == [tmp_path / "full/checkpoints/step-0"]


def test_consolidated_weights_are_those_of_the_run(tmp_path, images, capsys):
    trainer = make_trainer(tmp_path / "run", images, checkpoint_every_steps=5)
    trainer.fit()
    trainer.run.close()
    for folder, step in ((tmp_path / "run", 12), (tmp_path / "run/checkpoints/step-5", 5)):
        file = tmp_path / f"{step}.safetensors"
        assert main(["consolidate", str(folder), str(file)]) == 0
        assert f"step-{step} -> {file}" in capsys.readouterr().out
        model, manifest = load_model(file)
        assert (manifest["step"], manifest["architecture"]) == (step, json.loads(json.dumps(model.architecture)))
        expected = load_model(tmp_path / f"run/checkpoints/step-{step}")[0].state_dict()
        for name, weight in model.state_dict().items():
            assert torch.equal(expected[name], weight), name
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(load_model(tmp_path / "12.safetensors")[0].state_dict()[name], weight), name
    everything = tmp_path / "all.safetensors"
    assert main(["consolidate", str(tmp_path / "run"), str(everything), "--optimizer"]) == 0
    assert load_file(everything)["optimizer.norm.weight.step"].item() == 12
    capsys.readouterr()
    assert main(["consolidate", str(tmp_path / "run"), str(tmp_path / "weights.pt")]) == 2
    assert main(["consolidate", str(tmp_path / "no run"), str(tmp_path / "a.safetensors")]) == 2
    assert main(["consolidate", str(tmp_path / "run"), str(tmp_path / "no folder/a.safetensors")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == f"fastmae: error: OUT: expected a .safetensors file, got {tmp_path}/weights.pt"
    assert errors[1].startswith(f"fastmae: error: {tmp_path}/no run: expected a run folder")
    assert errors[2].startswith(f"fastmae: error: could not write {tmp_path}/no folder/a.safetensors: ")


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, images, capsys):
    straight = make_trainer(tmp_path / "run", images, checkpoint_every_steps=5)
    straight.fit()
    straight.run.close()
    expected = numbers(straight.run)
    tensors, _ = load_checkpoint(tmp_path / "run/checkpoints/step-12")
    (shard,) = (tmp_path / "run/checkpoints/step-12").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])

    resumed = make_trainer(tmp_path / "run", images, checkpoint_every_steps=5, resume=True)
    resumed.resume(latest_checkpoint(tmp_path / "run"))
    assert resumed.step == 10
    assert "step-12" in capsys.readouterr().err
    resumed.fit()
    resumed.run.close()
    assert numbers(resumed.run) == expected
    assert torch.equal(
        load_checkpoint(tmp_path / "run/checkpoints/step-12")[0]["model.norm.weight"], tensors["model.norm.weight"]
    )
    assert (tmp_path / "run/checkpoints/step-12.damaged").is_dir()


def test_what_differs_is_named_or_refused(tmp_path, images):
    first = make_trainer(tmp_path / "run", images)
    first.fit()
    first.run.close()
    path = latest_checkpoint(tmp_path / "run")

    def resume(**options):
        trainer = make_trainer(tmp_path / "run", images, resume=True, **options)
        try:
            return trainer.resume(path)
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
    write_images(tmp_path / "more", 12)
    trainer = make_trainer(tmp_path / "run", tmp_path / "more", resume=True)
    differences = trainer.resume(path)
    trainer.run.close()
    assert [difference.split()[0] for difference in differences] == ["dataset.hash"]
