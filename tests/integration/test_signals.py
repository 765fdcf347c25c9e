"""A signal at any moment of a run: before the first step it leaves what can go on, and it ends the evaluation."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from pretrain_flags import FLAGS, no_evaluation
from safetensors.torch import load_file
from training import write_images

from fastmae import pretraining
from fastmae.cli import main
from fastmae.data import open_dataset
from fastmae.evaluate import evaluate_sets
from fastmae.train.preflight import preflight


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("signals") / "images")


def signalled(function, number: int):
    """The function, during which a signal comes."""

    def call(*arguments, **options):
        os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return call


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def test_a_signal_while_the_images_are_indexed_leaves_a_run_that_can_begin(tmp_path, images, capfd):
    run = tmp_path / "run"
    with patch.object(pretraining.data, "open_dataset", signalled(open_dataset, signal.SIGUSR1)):
        assert main([*FLAGS, "--data.path", str(images), "--out", str(run)]) == 75
    assert status(run) == {"status": "preempted", "step": 0, "reason": "SIGUSR1"}
    assert f"Continue with: fastmae pretrain --out {run} --resume" in capfd.readouterr().out
    assert not list(run.rglob("step-*"))
    with no_evaluation():
        assert main(["pretrain", "--out", str(run), "--resume"]) == 0
    assert status(run) == {"status": "finished", "step": 12, "reason": "all steps done"}

    # Again, while the run resumes.
    before = (run / "config.json").read_text()
    with patch.object(pretraining, "preflight", signalled(preflight, signal.SIGUSR1)):
        assert main(["pretrain", "--out", str(run), "--resume", "--train.steps", "14"]) == 75
    assert status(run) == {"status": "preempted", "step": 12, "reason": "SIGUSR1"}
    assert (run / "config.json").read_text() == before


def test_a_signal_ends_the_evaluation_which_resuming_repeats(tmp_path, images, capfd):
    run, seen, ended = tmp_path / "run", [], []

    def evaluate(*arguments, **options):
        seen.append(status(run)["status"])
        os.kill(os.getpid(), signal.SIGTERM)
        ended.append(True)
        return evaluate_sets(*arguments, **options)

    with patch.object(pretraining, "evaluate_sets", evaluate):
        assert main([*FLAGS, "--data.path", str(images), "--out", str(run)]) == 75
    assert (seen, ended) == (["running"], [])  # a run that is killed here has not finished
    assert status(run) == {"status": "preempted", "step": 12, "reason": "SIGTERM during the final evaluation"}
    assert not (run / "summary.json").exists()
    printed = capfd.readouterr()
    assert f"The training is done: {run}/model.safetensors. Evaluate with: " in printed.out
    assert "SIGTERM: ending the evaluation; once more to leave at once" in printed.err
    weights = load_file(run / "model.safetensors")

    assert main(["pretrain", "--out", str(run), "--resume"]) == 0
    assert status(run) == {"status": "finished", "step": 12, "reason": "all steps done"}
    assert (run / "summary.json").exists()
    torch.testing.assert_close(load_file(run / "model.safetensors"), weights, rtol=0, atol=0)


def test_a_signal_after_the_last_step_skips_the_evaluation(tmp_path, images):
    run = tmp_path / "run"
    with patch.object(pretraining, "export_weights", signalled(pretraining.export_weights, signal.SIGTERM)):
        assert main([*FLAGS, "--data.path", str(images), "--out", str(run)]) == 75
    assert status(run)["reason"] == "SIGTERM during the final evaluation"


def test_a_run_that_fails_in_its_evaluation_says_so(tmp_path, images):
    run = tmp_path / "run"

    def evaluate(*arguments, **options):
        raise RuntimeError("no picture")

    with patch.object(pretraining, "evaluate_sets", evaluate), pytest.raises(RuntimeError, match="no picture"):
        main([*FLAGS, "--data.path", str(images), "--out", str(run)])
    assert status(run) == {"status": "failed", "step": 12, "reason": "RuntimeError('no picture')"}


def start(rank: int, folder: Path) -> int:
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{rank}")
    opened = signalled(open_dataset, signal.SIGTERM) if rank == 1 else open_dataset
    with patch.object(pretraining.data, "open_dataset", opened):
        return main([*FLAGS, "--data.path", str(folder / "images"), "--out", str(folder / "run")])


def test_a_signal_to_one_rank_before_the_first_step_is_followed_by_all(tmp_path):
    write_images(tmp_path / "images")
    assert run_ranks(start, 2, tmp_path) == [75, 75]
    assert status(tmp_path / "run") == {"status": "preempted", "step": 0, "reason": "a signal to another rank"}
