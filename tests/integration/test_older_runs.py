"""Run folders and checkpoints of released versions still load and resume.

``fixtures/run-0.1.0`` is a run of version 0.1.0 on its folder ``images``, six steps in fp32 on one CPU thread, with the
checkpoint of step 3. It was made by

    fastmae pretrain --out runs/old --recipe photographs --data.path images --data.loader torch --model.img-size 32
      --model.patch-size 8 --model.embed-dim 16 --model.depth 1 --model.num-heads 2 --model.decoder-embed-dim 16
      --model.decoder-num-heads 2 --train.steps 6 --train.warmup-steps 2 --train.global-batch-size 4
      --train.precision fp32 --train.checkpoint-every-steps 3 --train.log-every-steps 2
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import load_checkpoint, save_checkpoint

from fastmae.cli import main
from fastmae.loading import load

OLD = Path(__file__).parent / "fixtures/run-0.1.0"


def test_an_older_run_resumes_with_the_losses_of_its_undisturbed_steps(tmp_path, capsys):
    expected = {row["step"]: row["loss"] for row in rows(OLD)}
    run = tmp_path / "run"
    shutil.copytree(OLD, run)
    (run / "model.safetensors").unlink()
    # A later checkpoint of a broken program: its checksums fit, but its manifest is not one of a run.
    newest = save_checkpoint(run / "checkpoints", 5, load_checkpoint(OLD / "checkpoints/step-3")[0], {"config": None})
    assert main(["pretrain", "--out", str(run), "--resume", "--data.path", str(run / "images")]) == 0
    warnings = capsys.readouterr().err
    assert f"WARNING: damaged checkpoint passed over: {newest}/manifest.json" in warnings
    assert "dataset.hash" not in warnings  # the index of the same images has the hash that it had
    found = {row["step"]: row["loss"] for row in rows(run)}
    assert found.keys() == expected.keys() == {2, 4, 6}
    # Another CPU or PyTorch rounds differently; other images, crops or masks would change the second digit.
    assert found == pytest.approx(expected, rel=1e-4)


def test_weights_of_an_older_run_load_from_its_folder_checkpoint_and_file(tmp_path):
    checkpoint = load(OLD / "checkpoints/step-3")
    images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    assert checkpoint.encode(images).shape == (1, 17, 16)
    for path in (OLD, OLD / "model.safetensors"):
        model, info = load(path, return_info=True)
        assert info.has_decoder
        assert model.state_dict().keys() == checkpoint.state_dict().keys()


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
