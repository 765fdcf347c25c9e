"""Ranks agree on when to save and leave; a rank that hangs or dies is named by the others, which then end."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch.distributed as dist
from distributed import run_ranks, start_process, start_ranks
from pretrain_flags import FLAGS, no_evaluation
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from training import make_trainer, write_images

from fastmae.cli import main
from fastmae.train import liveness
from fastmae.train.checkpoint import CheckpointError, LostRankError, Ranks
from fastmae.train.liveness import Agreement, RankState, StopRequest, Watchdog, find_lost, is_broken
from fastmae.train.parallel import initialize, shutdown
from fastmae.train.trainer import Trainer

WAIT = 120.0
"""Seconds after which what a test waits for counts as not happening."""
STEPS, EVERY = 200, 10.0
CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:29569."
SIZES = "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:454] op.preamble.length <= op.nbytes"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def agreed_steps(rank: int, step_seconds: float) -> dict:
    """Steps after which all save by the clock of rank 0, and the one before which all leave on a signal to the last."""
    now, asked, saved = 0.0, [], []
    with Ranks.create() as ranks, patch.object(liveness.time, "monotonic", lambda: now):
        maximum = ranks.maximum
        ranks.maximum = lambda *values: asked.append(step) or maximum(*values)
        stop = StopRequest()
        agreement = Agreement(ranks, stop, math.inf, EVERY if step_seconds >= 1 else None)
        for step in range(STEPS):
            if agreement.must_leave():
                break
            now += step_seconds * (rank == 0)  # the other ranks' clocks do not advance
            if agreement.save_due:
                saved.append(step)
                agreement.saved()
            if step == 100 and rank == ranks.size - 1:
                stop.requested = "SIGTERM"
    return {"saved": saved, "left": step, "asked": asked}


@pytest.mark.parametrize("world_size", [1, 2])
def test_slow_steps_look_each_time_and_save_once_by_the_clock(world_size):
    result, *others = run_ranks(agreed_steps, world_size, 1.0)
    assert all(other == result for other in others)
    assert result["left"] == 100 + world_size
    assert 100 / (EVERY + 4) <= len(result["saved"]) <= 100 / EVERY
    assert all(after - before >= EVERY for before, after in pairwise(result["saved"]))


def test_fast_steps_ask_every_twentieth_time():
    first, second = run_ranks(agreed_steps, 2, 0.01)
    assert first == second
    assert first["asked"][:4] == [0, 1, 2, 22]
    assert {after - before for before, after in pairwise(first["asked"][2:])} == {20}
    assert first["left"] == 122


def open_files(rank: int) -> tuple[int, int]:
    """Soft limit of open files after joining the others, and the hard one."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    shutdown(initialize("ddp", "cpu"))
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def test_the_limit_of_open_files_is_raised():
    ((soft, hard),) = run_ranks(open_files, 1, init_group=False)
    assert 256 < soft <= (hard if hard > 0 else soft)


def test_garbage_collection_passes_over_what_lives_as_long_as_the_run(tmp_path):
    trainer, frozen = make_trainer(tmp_path / "run", write_images(tmp_path / "images"), steps=3, warmup_steps=1), []
    before = gc.get_freeze_count()
    trainer.train_step = lambda step=trainer.train_step: frozen.append(gc.get_freeze_count()) or step()
    trainer.fit()
    assert [count > before for count in frozen] == [False, True, True]
    assert gc.get_freeze_count() <= before


COMPUTES, LOADS, WAITS = "computing", "waiting for images", "waiting for other ranks (ending)"
STILL, OTHERS = "not heard from any more, last at step", "the other 2 at step 42, computing"


@pytest.mark.parametrize(
    ("states", "silent", "text"),
    [
        ([(41, LOADS), (42, COMPUTES), (42, COMPUTES)], (), f"0 (node0) is at step 41, {LOADS} for 300 s; {OTHERS}"),
        ([(42, LOADS), (42, COMPUTES)], (), "0 (node0) is at step 42, waiting for images"),
        ([(42, "evaluating"), (42, WAITS)], (), "0 (node0) is at step 42, evaluating for 300 s; the other 1"),
        ([(42, COMPUTES)] * 3, (), "0 (node0) is at step 42, computing for 300 s, and 2 more ranks like it"),
        ([*[(40, COMPUTES)] * 3, (41, COMPUTES)], (), "0 (node0) is at step 40, computing for 300 s, and 2 more ranks "
         "like it; the other 1 at step 41, computing"),
        ([(40, COMPUTES), (42, COMPUTES)], (1,), f"1 (node0) is {STILL} 42, computing; the other 1 at step 40"),
        ([(40, COMPUTES), None], (), "1 has never been heard from; the other 1 at step 40, computing"),
        ([(40, COMPUTES), (42, COMPUTES), (41, "failed while saving: OSError: no disk")], (1,),
         "2 (node1) at step 41 failed while saving: OSError: no disk; the other 1"),
        ([(40, COMPUTES), (42, "ended")], (1,), "0 (node0) is at step 40, computing for 300 s"),
    ],
)  # fmt: skip
def test_the_rank_that_all_wait_for_is_named(states, silent, text):
    after = [state and RankState(*state, f"node{rank // 2}", 300.0, 7) for rank, state in enumerate(states)]
    before = [state and state._replace(beat=7 - (rank not in silent)) for rank, state in enumerate(after)]
    found = find_lost(before, after)
    assert found.text.startswith(f"rank {text}")
    assert found.lost == any(word in text for word in ("failed", "heard"))


def test_broken_collectives_are_told_from_bugs():
    wrapped = CheckpointError("rank 1: lost")
    wrapped.__cause__ = RuntimeError(CLOSED)
    broken = [RuntimeError(CLOSED), dist.DistBackendError("NCCL error: remote process exited"), LostRankError("saving")]
    assert all(map(is_broken, [*broken, wrapped]))
    bugs = [RuntimeError("mat1 and mat2 shapes"), RuntimeError(SIZES), CheckpointError("rank 1: disk full")]
    assert not any(map(is_broken, bugs))


@pytest.fixture
def watchdog(monkeypatch):
    """Makes watchdogs of ranks that share a store. One that would end the process ends its thread."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setattr(Watchdog, "interval", 0.05)
    monkeypatch.setattr(Watchdog, "signal_seconds", 0.2)
    monkeypatch.setattr(liveness.os, "_exit", sys.exit)
    run = Watchdog._run

    def run_until_exit(self: Watchdog) -> None:
        with suppress(SystemExit):
            run(self)

    monkeypatch.setattr(Watchdog, "_run", run_until_exit)
    yield lambda rank, stop=None: Watchdog(rank, 2, 100.0, stop)
    del server


def fall_silent(watchdog: Watchdog) -> None:
    """What a rank looks like to the others once it has been killed."""
    beat = watchdog._beat
    until(lambda: watchdog._beat > beat + 1)
    watchdog._publish = lambda: None


def failure(watchdog: Watchdog, error: Exception) -> str:
    """What a watchdog says before it ends a process in which a collective fails."""
    texts: list[str] = []
    with pytest.raises(type(error)), watchdog.explaining(texts.append):
        raise error
    return texts[0]


def test_a_failed_collective_names_the_rank_that_failed_and_why(watchdog, capfd):
    with watchdog(0) as first, watchdog(1) as second:
        first.at("computing", 5)
        second.at("waiting for images", 4)
        with pytest.raises(ValueError, match="bad"), second.explaining():
            raise ValueError("bad\ncrop")
        text = failure(first, RuntimeError(CLOSED))
    failed = r"a collective failed: rank 1 \(\S+\) at step 4 failed while waiting for images: ValueError: bad crop"
    assert re.match(failed + r"; the other 1 at step 5, computing \(Connection closed by peer \S+\)$", text)
    assert capfd.readouterr().err == f"fastmae: error: {text}\n"


def test_a_failed_collective_among_ranks_that_answer_may_be_the_network(watchdog):
    with watchdog(0) as first, watchdog(1):
        assert "all ranks answer, so it may be the network; rank 0" in failure(first, LostRankError("x"))


def test_a_hanging_collective_names_a_silent_rank_after_a_signal(watchdog):
    with watchdog(0, Mock()) as first, watchdog(1) as second:  # the mock has got a signal
        second.at("saving", 4)
        texts: list[str] = []
        with first.explaining(texts.append):
            until(lambda: first._beat > 20)
            assert texts == []  # a signal alone ends nothing
            fall_silent(second)
            until(lambda: texts)
    assert re.match(rf"rank 1 \(\S+\) is {STILL} 4, saving", texts[0])


def test_a_store_that_does_not_answer_is_no_error(watchdog):
    refuse = Mock(side_effect=dist.DistNetworkError("Broken pipe"))
    with patch.object(dist, "TCPStore", refuse), watchdog(0) as first:
        text = failure(first, RuntimeError(CLOSED))
    assert "does not answer, so lost ranks cannot be named" in text
    assert "all ranks answer" not in text


def test_a_stalled_process_says_in_what_and_shows_its_stacks(capfd, monkeypatch):
    clock, texts = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, strftime=time.strftime), []
    monkeypatch.setattr(liveness, "time", clock)
    monkeypatch.setattr(Watchdog, "interval", 0.02)

    def printed_after(seconds: float) -> str:
        clock.now += seconds
        beat = watchdog._beat
        until(lambda: watchdog._beat > beat + 3)
        texts.append(capfd.readouterr().err)
        return "".join(texts)

    with Watchdog(stall_seconds=100.0) as watchdog:
        for _ in range(3):  # many batches of one step
            watchdog.at("waiting for images", 3)
            assert printed_after(0.0) == printed_after(99.0) == ""
        assert printed_after(2.0).count("no progress for 101 s: rank 0") == 1
        assert printed_after(98.0).count("no progress") == 1
        text = printed_after(2.0)
    assert text.count("no progress for") == 2
    assert "at step 3, waiting for images for 201 s" in text
    assert "test_a_stalled_process_says_in_what" in text  # its stack


def train(rank: int, folder: Path, *flags: str) -> int:
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{rank}")
    own = ["--data.path", str(folder / "images"), "--out", str(folder / "run"), "--train.global-batch-size", "6"]
    with no_evaluation():
        return main([*FLAGS, *own, "--train.batch-size", "6", *flags])


def hang(rank: int, folder: Path) -> int:
    """Rank 1 hangs before its fourth step until a file appears, and before the sixth it is killed."""
    plain = Trainer._next_inputs

    def next_inputs(self):
        self.watchdog.at("waiting for images", self.step)
        if rank == 1 and self.step == 3:
            until(lambda: (folder / "go on").exists())
        if rank == 1 and self.step == 5:
            time.sleep(1.5)  # more than a beat
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self)

    Trainer._next_inputs = next_inputs
    code = train(rank, folder, "--train.parallel", "fsdp", "--report.stall-seconds", "2")
    os._exit(code)  # what follows in the test's own process group would fail


def test_a_rank_that_hangs_and_one_that_is_killed_are_named(tmp_path):
    write_images(tmp_path / "images")
    logs = [tmp_path / f"{rank}.log" for rank in range(3)]
    with start_ranks(hang, 3, tmp_path, folder=tmp_path, timeout=WAIT) as processes:
        behind = (
            r"no progress for \d+ s: rank 1 \(\S+\) is at step 3, waiting for images for \d+ s; the other 2 at step 3"
        )
        until(lambda: logs[0].exists() and re.search(behind, logs[0].read_text()))
        until(lambda: "next_inputs" in logs[1].read_text())  # its stack
        (tmp_path / "go on").touch()
        for process in processes:
            process.join(WAIT)
        assert [process.exitcode for process in processes] == [2, -signal.SIGKILL, 2]
    line = r"a collective failed: rank 1 \(\S+\) is not heard from any more, last at step 5, waiting for images"
    assert re.search(f"fastmae: error: {line}; the other 2 at step 5", logs[0].read_text())
    assert "Traceback" not in logs[0].read_text()
    assert "fastmae: error" not in logs[2].read_text()
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["status"] == "failed"
    assert re.search(line, status["reason"])


def die_before_the_first_step(rank: int, folder: Path) -> int:
    """Rank 1 never comes, and rank 0 gets the SIGTERM that torchrun sends then, in C++ that no exception reaches."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    Watchdog.signal_seconds = 0.5
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    train(rank, folder)
    os._exit(0)


def test_a_rank_that_dies_before_the_first_step_is_named_and_the_others_end(tmp_path):
    options = {"folder": tmp_path, "timeout": WAIT, "init_group": False}
    with start_ranks(die_before_the_first_step, 2, tmp_path, **options) as processes:
        processes[0].join(WAIT)
        assert processes[0].exitcode == 2
    text = (tmp_path / "0.log").read_text()
    assert "fastmae: error: rank 1 has never been heard from; the other 1 at step 0, joining the process group" in text


def die_once(folder: Path) -> None:
    """Training, in which rank 1 is killed after ten steps of the first start."""
    plain = Trainer.train_step

    def train_step(self):
        plain(self)
        if self.step == 10 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.train_step = train_step
    if code := train(int(os.environ["RANK"]), folder):
        os._exit(code)


def torchrun(folder: Path) -> None:
    """What ``torchrun --max-restarts 1`` does, in forks of a process that has imported PyTorch."""
    os.dup2(os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "run_id": "test", "start_method": "fork"}
    elastic_launch(LaunchConfig(1, 1, 2, max_restarts=1, monitor_interval=0.1, **options), die_once)(folder)


def test_torchrun_restarts_a_run_which_resumes_by_itself(tmp_path):
    write_images(tmp_path / "images")
    launcher = start_process(torchrun, tmp_path, daemon=False)  # it has children
    launcher.join(WAIT)
    launcher.kill()
    printed = (tmp_path / "log").read_text()
    assert launcher.exitcode == 0, printed
    assert f"Continuing from {tmp_path}/run/checkpoints/step-8" in printed
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "finished"
    assert "is not heard from any more, last at step" in printed
