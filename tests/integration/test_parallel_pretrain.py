"""``fastmae pretrain`` in several processes: they leave the run folder that one would, and one goes on from theirs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from pretrain_flags import FLAGS
from training import write_images

import fastmae
from fastmae.cli import main
from fastmae.loading import load
from fastmae.train.checkpoint import Ranks, open_checkpoint

FLAGS = [*FLAGS, "--train.global-batch-size", "7"]
"""Of two processes one takes four images and one three."""
RUNS = {
    "ddp": "--train.parallel auto",
    "fsdp": "--train.parallel fsdp --train.batch-size 2 --train.reduce-every micro-batch "
    "--train.activation-checkpointing full",
    "fsdp-fp16": "--train.parallel fsdp --train.precision fp16 --train.steps 5 --train.background-save True",
}


def job(rank: int, folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Every run that the tests ask about, and what came of it: exit codes and errors."""
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{rank}")
    flags = [*FLAGS, "--data.path", str(folder / "images")]
    codes, errors = {}, {}

    def start(name: str, options: str) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            codes[name] = main([*flags, "--out", str(folder / name), *options.split()])
        errors[name] = stderr.getvalue()

    for name, options in RUNS.items():
        start(name, options)
        assert dist.is_initialized()  # by the helper, and so not to be ended here
    extract = ["features", str(folder / "single"), str(folder / "images"), str(folder / "two.npy"), "--batch-size", "4"]
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        codes["features"] = main(extract)
    errors["features"] = stdout.getvalue()
    if rank == 1:
        threading.Thread(target=end_once_training, args=(folder / "stopped",), daemon=True).start()
    start("stopped", "--train.steps 100000 --train.warmup-steps 3 --train.parallel fsdp")
    start("too-small", "--train.global-batch-size 1")
    return codes, errors


def end_once_training(run: Path) -> None:
    """Tells this process, which is one of two, to leave."""
    while not (run / "metrics.jsonl").exists() or not rows(run):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def errors() -> list[dict[str, str]]:
    """What each rank printed as errors; the fixture ``folder`` fills it."""
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory, errors) -> Path:
    """Runs of two processes, and one of a single process that they are compared with."""
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "images")
    threads = torch.get_num_threads()
    try:
        assert main([*FLAGS, "--data.path", str(folder / "images"), "--out", str(folder / "single")]) == 0
        for codes, printed in run_ranks(job, 2, folder, timeout=100):
            assert codes == dict.fromkeys([*RUNS, "features"], 0) | {"stopped": 75, "too-small": 2}
            errors.append(printed)
    finally:
        torch.set_num_threads(threads)
    return folder


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_leave_what_one_leaves(folder, name):
    run, single = folder / name, folder / "single"
    files = [{str(p.relative_to(r)) for p in r.rglob("*") if "tfevents" not in p.name} for r in (run, single)]
    assert {f for f in files[0] ^ files[1] if "shard-" not in f} == set()
    assert len(list((run / "checkpoints/step-12").glob("shard-*"))) == (2 if name == "fsdp" else 1)
    assert [row["step"] for row in rows(run)] == [5, 10, 12]
    for row, expected in zip(rows(run), rows(single), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert (row["samples"], row["lr"]) == (expected["samples"], expected["lr"])
    assert len(list(run.glob("events.out.tfevents*"))) == 1
    status = json.loads((run / "status.json").read_text())
    assert status == {"status": "finished", "step": 12, "reason": "all steps done"}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_exported_weights_are_those_of_a_single_process(folder, name):
    model, expected = (load(folder / run / "model.safetensors") for run in (name, "single"))
    from_checkpoint = load(folder / name / "checkpoints/step-12")
    assert open_checkpoint(folder / name / "checkpoints/step-12").manifest["world_size"] == 2
    for (key, tensor), other in zip(model.state_dict().items(), from_checkpoint.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), key
        if "qkv.bias" not in key:  # the keys' part of it is noise, see test_parallel.py
            torch.testing.assert_close(tensor, expected.state_dict()[key], rtol=0, atol=1e-5)


def test_two_processes_write_the_features_of_one_in_order(folder, errors):
    model = load(folder / "single")
    expected = fastmae.extract_features(model, folder / "images", batch_size=4)
    np.testing.assert_allclose(np.load(folder / "two.npy"), expected.features, atol=1e-5)
    assert (folder / "two.paths.txt").read_text().splitlines() == expected.paths
    assert [f"{len(expected.ids)} features of" in printed["features"] for printed in errors] == [True, False]


def test_float16_scales_the_loss_and_saves_the_scale(folder):
    scale = open_checkpoint(folder / "fsdp-fp16/checkpoints/step-5", ranks=Ranks()).read(
        "loss_scale.value_and_good_steps"
    )
    assert scale.tolist() == [2.0**16, 5]
    (row,) = rows(folder / "fsdp-fp16")
    assert row["skipped_steps"] == 0
    assert row["loss"] == pytest.approx(rows(folder / "single")[0]["loss"], rel=0.2)


def test_uneven_shares_are_told_once_and_too_few_images_are_an_error(folder, errors):
    shares = "7 images do not divide evenly among 2 processes. In a step 1 of them take 4 and 1 take 3"
    assert [printed["ddp"].count(shares) for printed in errors] == [1, 0]
    assert "--train.global-batch-size: expected at least 2 for 2 processes, got 1" in errors[0]["too-small"]
    assert not (folder / "too-small").exists()


def test_one_process_continues_a_run_of_two_and_says_what_differs(folder, capsys):
    run, options = folder / "fsdp", "--train.parallel none --train.reduce-every step --train.steps 14"
    threads = torch.get_num_threads()
    try:
        assert main(["pretrain", "--out", str(run), "--resume", *options.split()]) == 0
    finally:
        torch.set_num_threads(threads)
    errors = capsys.readouterr().err
    assert "world_size was 2, is 1" in errors
    assert "train.parallel was fsdp, is none" in errors
    assert [(row["step"], row["samples"]) for row in rows(run)] == [(step, 7 * step) for step in (5, 10, 12, 14)]


def test_signal_to_one_process_stops_both_at_one_step(folder):
    status = json.loads((folder / "stopped/status.json").read_text())
    assert (status["status"], status["reason"]) == ("preempted", "a signal to another rank")
    assert load(folder / "stopped", return_info=True)[1].step == status["step"] >= 5


@pytest.mark.slow
def test_torchrun_trains_and_leaves_on_a_signal_to_its_workers(folder):
    run = folder / "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastmae", *FLAGS]
    options = ["--data.path", str(folder / "images"), "--out", str(run), "--train.parallel", "fsdp"]
    endless = ["--train.steps", "100000", "--train.warmup-steps", "3"]
    process = subprocess.Popen(
        [*command, *options, *endless], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output = []
    for line in process.stdout:
        output.append(line)
        if re.match(r"step +20/", line):
            process.send_signal(signal.SIGTERM)
            break
    output.append(process.communicate(timeout=60)[0])
    text = "".join(output)
    assert "2 processes (fsdp) x 1 x 4 images" in text
    assert "Saved at step" in text
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("preempted", "SIGTERM")
    assert load(run, return_info=True)[1].step == status["step"] >= 20
