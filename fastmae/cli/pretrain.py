"""``fastmae pretrain``: a run folder, a trainer, and at the end a picture."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from fastmae.cli.console import WordWrapConsole
from fastmae.cli.errors import UsageError, mistakes
from fastmae.cli.pretrain_begin import prepare
from fastmae.cli.pretrain_end import export, finish
from fastmae.train.checkpoint import Ranks, list_checkpoints
from fastmae.train.checkpoint.format import step_of
from fastmae.train.config import PretrainConfig, to_json
from fastmae.train.liveness.collectives import joining
from fastmae.train.liveness.heartbeat import Heartbeat
from fastmae.train.liveness.rank_states import StateBoard
from fastmae.train.liveness.signals import PREEMPTED, StoppedEarly, StopRequest
from fastmae.train.parallel import Parallelism, initialize, shutdown
from fastmae.train.recipes import NEEDS_WEIGHTS
from fastmae.train.rules import validate
from fastmae.train.run_folder import RunFolder
from fastmae.train.telemetry.rank_log import RankLog

_FLAGS = {
    "mode": "--train.parallel",
    "shard_size": "--train.shard-size",
    "device_type": "--train.device",
    "global_batch": "--train.global-batch-size",
    "max_batch": "--train.batch-size",
    "compile_mode": "--train.compile-mode",
    "cuda_graph": "--train.cuda-graph",
}
"""Where arguments come from that functions complain about by their own names."""


def pretrain(config: PretrainConfig, stop: StopRequest) -> int:
    """Train, evaluate, and say where the picture is; return the exit code.

    Args:
        config: from the flags.
        stop: signals, watched for already.
    """
    with mistakes(_FLAGS):
        validate(config)
        if config.recipe in NEEDS_WEIGHTS and config.train.init_from is None:
            raise ValueError(f"--train.init-from: expected weights to continue from with {config.recipe}, got none")
        shard_size = config.train.shard_size
        with joining():
            parallelism = initialize(config.train.parallel, _device_type(config.train.device), shard_size=shard_size)
    stall_seconds = config.report.stall_seconds
    try:
        with (
            Heartbeat(parallelism.rank, StateBoard.create(), stall_seconds) as heartbeat,
            heartbeat.explaining(),
            Ranks.create() as ranks,
            heartbeat.explaining(),
        ):
            ranks.waiting = heartbeat.waiting
            code = _pretrain(config, parallelism, ranks, stop, heartbeat)
    except BaseException:
        shutdown(parallelism, failed=True)
        raise
    shutdown(parallelism)
    return code


def _pretrain(
    config: PretrainConfig, parallelism: Parallelism, ranks: Ranks, stop: StopRequest, heartbeat: Heartbeat
) -> int:
    default = Path("runs") / time.strftime(f"{config.recipe}-%Y%m%d-%H%M%S")
    config = replace(config, out=ranks.first("naming the run", lambda: config.out or default))
    with mistakes():
        run = _open_run(config, ranks)
    with run, RankLog(run.path, ranks.rank, ranks.size, parallelism.device):
        console = WordWrapConsole(quiet=not parallelism.is_main)
        try:
            with mistakes(_FLAGS):
                trainer = prepare(config, run, console, parallelism, ranks, stop, heartbeat)
        except StoppedEarly as stopped:
            _leave_early(config, run, console, str(stopped))
            return PREEMPTED
        begun, first_step = time.monotonic(), trainer.step
        status = trainer.fit()
        seconds = time.monotonic() - begun
        if status == "preempted":
            console.print(f"Saved at step {trainer.step}. Continue with: fastmae pretrain --out {run.path} --resume")
            return PREEMPTED
        code = 0
        if parallelism.is_main:
            heartbeat.begin("evaluating")
            ended = run.read_json("status.json")
            run.write_json("status.json", ended | {"status": "running"})  # it is not finished without its weights
            with run.failure_noted(lambda: trainer.step):
                model, weights = export(trainer, run)
                try:
                    with stop.raising():
                        finish(trainer, model, weights, run, console, seconds, trainer.step - first_step)
                except StoppedEarly as stopped:
                    ended |= {"status": "preempted", "reason": f"{stopped} during the final evaluation"}
                    # What its time limit ended trains on before it evaluates.
                    verb = "Evaluate" if trainer.step == trainer.schedule.total_steps else "Continue"
                    resume = f"fastmae pretrain --out {run.path} --resume"
                    console.print(f"The training is done: {weights}. {verb} with: {resume}")
                    code = PREEMPTED
            run.write_json("status.json", ended)
        heartbeat.begin("ending")
        return ranks.first("ending the run", lambda: code)  # the others wait for it


def _open_run(config: PretrainConfig, ranks: Ranks) -> RunFolder:
    """The run folder, locked by the first rank."""
    run = None

    def lead() -> None:
        nonlocal run
        try:
            run = RunFolder(config.out, resume=config.resume)
        except BlockingIOError:
            raise
        except OSError as error:
            raise UsageError(f"--out: expected a folder that can be written, got {config.out}: {error}") from error

    lead() if ranks.size == 1 else ranks.first("opening the run folder", lead)
    return run or RunFolder(config.out, resume=config.resume, leader=False)


def _leave_early(config: PretrainConfig, run: RunFolder, console: Console, reason: str) -> None:
    """Leave a run folder that the run can begin in, or go on in, with ``--resume``."""
    saved = list_checkpoints(run.checkpoints)
    run.write_json("status.json", {"status": "preempted", "step": step_of(saved[0]) if saved else 0, "reason": reason})
    if run.leader and run.read_json("config.json") is None:
        run.write_json("config.json", to_json(config))
    console.print(f"Left before the first step. Continue with: fastmae pretrain --out {run.path} --resume")


def _device_type(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--train.device: expected a CUDA device for cuda, but PyTorch finds none")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return name
