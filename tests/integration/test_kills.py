"""Killed in the middle of a step, of a save, and one process of two: the run goes on to what it would have become.

The kills come at known moments: a process ends itself by SIGKILL where a test has put it. ``make soak`` kills at random
ones.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import load_checkpoint
from consumed import attempts, check, expected, record
from distributed import run_ranks, start_process, start_ranks
from pretrain_flags import FLAGS, no_evaluation
from training import write_images

from fastmae.cli import main
from fastmae.train import trainer as loop
from fastmae.train.checkpoint import list_checkpoints, save

STEPS, BATCH, IMAGES, SAVED = 12, 8, 11, 4
Die = Callable[[int, Path], None] | None
"""Makes this process die at a step."""


def die_in_step(step: int, run: Path) -> None:
    """Between the backward of a step and its update, once the save that was begun before it is done."""
    update, calls = loop.step_unless_non_finite, []

    def die_or_update(*args):
        calls.append(args)
        if len(calls) > step:
            while not (run / f"checkpoints/step-{step // SAVED * SAVED}").exists():
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args)

    loop.step_unless_non_finite = die_or_update


def die_in_save(step: int, run: Path) -> None:
    """With a part of a checkpoint's tensors in its file, which is then neither whole nor on the disk for sure."""
    write_tensors = save.write_tensors

    def die_or_write(path, pieces, read, *args):
        names = []

        def read_or_die(name):
            names.append(name)
            if path.parent.name == f"step-{step}.tmp" and len(names) > len(pieces) // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(name)

        return write_tensors(path, pieces, read_or_die, *args)

    save.write_tensors = die_or_write


def pretrain(rank: int, folder: Path, name: str, attempt: int, *arguments: str, die: Die = None, step: int = 0) -> int:
    """One process of one start of a run: with the flags, or resumed with all else from the folder."""
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{rank}")
    if die is not None:
        die(step, folder / name)
    flags = ["pretrain", "--resume"]
    if attempt == 0:
        flags = [*FLAGS, "--train.checkpoint-every-steps", str(SAVED), "--data.path", str(folder / "images")]
    with record(folder / f"{name}-consumed", attempt), no_evaluation():
        return main([*flags, "--out", str(folder / name), "--report.stall-seconds", "2", *arguments])


def alone(folder: Path, attempt: int, background: str, die: Die, step: int) -> None:
    """:func:`pretrain` in a process of its own."""
    os.dup2(os.open(folder / f"{attempt}.log", os.O_CREAT | os.O_WRONLY), 1)
    os.dup2(1, 2)
    os._exit(pretrain(0, folder, "killed", attempt, "--train.background-save", background, die=die, step=step))


@pytest.fixture
def folder(tmp_path) -> Path:
    write_images(tmp_path / "images", IMAGES)
    return tmp_path


def newest(folder: Path, name: str) -> str:
    return list_checkpoints(folder / name / "checkpoints")[0].name


def rows(run: Path) -> list[tuple]:
    """The log without times."""
    names = ("step", "samples", "epoch", "lr", "loss", "grad_norm", "skipped_steps")
    return [tuple(json.loads(line)[n] for n in names) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_end(folder: Path) -> None:
    """Weights, optimiser, log: bit for bit those of the undisturbed run."""
    tensors = [load_checkpoint(folder / n / f"checkpoints/step-{STEPS}")[0] for n in ("killed", "undisturbed")]
    assert tensors[0].keys() == tensors[1].keys()
    different = [n for n in tensors[0] if not n.startswith("rng.") and not torch.equal(tensors[0][n], tensors[1][n])]
    assert different == []
    assert rows(folder / "killed") == rows(folder / "undisturbed")
    assert [row[0] for row in rows(folder / "killed")] == [5, 10, 12]


def test_killed_in_a_step_and_in_a_save(folder, monkeypatch):
    """A process alone, which saves in the background and not."""

    def start(*arguments) -> int | None:
        process = start_process(alone, folder, *arguments)
        process.join(120)
        return process.exitcode

    assert start(0, "True", die_in_step, 6) == -signal.SIGKILL
    assert newest(folder, "killed") == "step-4"
    assert start(1, "False", die_in_save, 8) == -signal.SIGKILL
    assert newest(folder, "killed") == "step-4"
    assert (folder / "killed/checkpoints/step-8.tmp").is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # put back afterwards
    assert [pretrain(0, folder, name, attempt) for name, attempt in (("killed", 2), ("undisturbed", 0))] == [0, 0]

    wanted = expected(STEPS, BATCH, IMAGES)
    # Seven steps were begun, four of them saved; and four more, none of them saved.
    assert check(attempts(folder / "killed-consumed", BATCH), wanted, begins=[0, 4, 4]) == 3 + 4
    assert check(attempts(folder / "undisturbed-consumed", BATCH), wanted, begins=[0]) == 0
    assert_same_end(folder)


def one_dies(rank: int, folder: Path, mode: str) -> int:
    die, flags = die_in_step if rank == 1 else None, ["--train.parallel", mode, "--train.background-save", "True"]
    return pretrain(rank, folder, "killed", 0, *flags, die=die, step=6)


def both_go_on(rank: int, folder: Path, mode: str) -> list[int]:
    runs = (("killed", 1), ("undisturbed", 0))
    return [pretrain(rank, folder, name, attempt, "--train.parallel", mode) for name, attempt in runs]


@pytest.mark.parametrize("mode", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_one_process_of_two_is_killed(folder, mode):
    """The other notices, says so and ends; both go on from the newest checkpoint."""
    with start_ranks(one_dies, 2, folder, mode, folder=folder, timeout=120) as (first, second):
        first.join(120)
        assert second.exitcode == -signal.SIGKILL
        assert first.exitcode is not None, (folder / "0.log").read_text()
    status = json.loads((folder / "killed/status.json").read_text())
    assert status["status"] == "failed"
    assert 6 <= status["step"] <= 7
    assert newest(folder, "killed") == "step-4"

    assert run_ranks(both_go_on, 2, folder, mode, timeout=120) == [[0, 0], [0, 0]]
    wanted = expected(STEPS, BATCH, IMAGES)
    assert check(attempts(folder / "killed-consumed", BATCH), wanted, begins=[0, 4]) == 3
    assert check(attempts(folder / "undisturbed-consumed", BATCH), wanted, begins=[0]) == 0
    assert_same_end(folder)
