"""A run that stands still, or whose collective fails, names the rank that it waits for: its step, and what it does."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import start_ranks
from test_parallel_pretrain import FLAGS
from training import make_trainer, write_images

from fastmae.cli import is_expected, main
from fastmae.train.checkpoint import CheckpointError, LostRankError
from fastmae.train.liveness.collectives import CollectiveError, is_broken, joining, reason_of
from fastmae.train.liveness.heartbeat import Heartbeat
from fastmae.train.liveness.rank_states import (
    RankState,
    StateBoard,
    StoreError,
    lagging_ranks,
    lost_ranks,
    may_be_long,
    tell,
)
from fastmae.train.loop import Trainer
from fastmae.train.preflight import PreflightError

WAIT = 40.0
"""Seconds after which what a test waits for counts as not happening."""

CLOSED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:29569. "
    "This is typically caused by a remote worker crashing. Check the logs"
)
SIZES = "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:454] op.preamble.length <= op.nbytes"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state(rank: int, step: int, phase: str = "computing", **fields) -> RankState:
    return RankState(rank, f"node{rank // 2}", step, phase, since=100.0, alive=400.0, beat=7, **fields)


def told(states: list[RankState | None], lost: dict | None = None) -> str:
    return tell(states, lost or {}, lagging_ranks(states, lost or {}))


def test_the_rank_behind_is_named_and_the_others_counted():
    others = [state(rank, 42) for rank in (0, 1, 3)]
    text = told([*others[:2], state(2, 41, "waiting for images"), others[2]])
    assert text == "rank 2 (node1) is at step 41, waiting for images for 300 s; the other 3 are at step 42, computing"
    text = told([*others[:2], state(2, 42, "waiting for images"), others[2]])
    assert text.startswith("rank 2 (node1) is at step 42, waiting for images for 300 s; the other 3")
    text = told([state(0, 42, "evaluating"), *(state(r, 42, "waiting for the others (ending)") for r in (1, 2))])
    assert text.startswith("rank 0 (node0) is at step 42, evaluating for 300 s; the other 2 are")
    assert told([state(rank, 42) for rank in range(3)]) == "all 3 ranks are at step 42, computing for 300 s"
    both = [state(0, 42, "saving"), state(1, 42, "evaluating"), state(2, 42, "saving")]
    assert told(both) == "of all ranks 3 are at step 42, saving or evaluating"
    assert told([state(0, 3, "saving")]) == "at step 3, saving for 300 s"
    text = told([state(rank, 41 + (rank == 6)) for rank in range(7)])
    assert "; 3 more ranks like these; the other 1 is at step 42, computing" in text


def test_ranks_that_are_lost_or_have_failed_come_before_those_behind():
    behind = state(0, 40)
    assert told([behind, state(1, 42)], {1: 45.2}) == (
        "rank 1 (node0) has not been heard from for 45 s, last at step 42, computing; "
        "the other 1 is at step 40, computing"
    )
    assert told([behind, None], {1: None}).startswith("rank 1 has never been heard from; ")
    failed = state(1, 41, "waiting for images", ended="DataError: no disk")
    assert told([behind, failed]).startswith("rank 1 (node0) ended at step 41, waiting for images: DataError: no disk")
    victim = state(1, 41, ended="RuntimeError: closed", broken=True)
    assert told([behind, victim, state(2, 41)]).startswith("rank 0 (node0) is at step 40")


def test_signs_of_life_are_counted_and_not_timed():
    """Clocks of machines may differ by more than a beat."""
    before = [state(0, 1), state(1, 1), None, state(3, 1), state(4, 1, ended="KeyboardInterrupt:")]
    after = [RankState(0, "a", beat=9, alive=0.0), before[1], None, before[3], before[4]]
    assert lost_ranks(before, after, now=445.0) == {1: 45.0, 2: None, 3: 45.0}


def test_what_may_take_long():
    evaluating = [state(0, 9, "evaluating"), state(1, 9, "waiting for the others (ending the run)")]
    assert may_be_long(evaluating, {}, lagging_ranks(evaluating, {}))
    assert not may_be_long(evaluating, {0: 45.0}, [0])
    assert may_be_long([state(r, 0, "computing the first step") for r in (0, 1)], {}, [])
    assert not may_be_long([state(r, 1) for r in (0, 1)], {}, [])


def test_broken_collectives_are_told_from_bugs():
    assert is_broken(RuntimeError(CLOSED))
    assert is_broken(RuntimeError("Application timeout caused pair closure"))
    assert is_broken(dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3356, remote process exited"))
    assert is_broken(LostRankError("saving: a rank has ended or does not answer"))
    wrapped = CheckpointError("rank 1: lost")
    wrapped.__cause__ = RuntimeError(CLOSED)
    assert is_broken(wrapped)
    preflight = PreflightError("preflight: not all ranks came")
    preflight.__cause__ = RuntimeError(CLOSED)
    assert not is_broken(preflight)
    assert not is_broken(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x8 and 9x8)"))
    assert not is_broken(RuntimeError(SIZES))
    assert not is_broken(CheckpointError("rank 1: disk full"))
    assert not is_broken(torch.OutOfMemoryError("CUDA out of memory"))
    assert reason_of(wrapped) == "Connection closed by peer [127.0.0.1]:29569."
    assert is_expected(CollectiveError("a collective failed"))
    assert not is_expected(RuntimeError(SIZES))


def test_processes_that_do_not_find_each_other_say_so_in_one_line():
    with pytest.raises(CollectiveError, match="do not find each other: wait timeout after 600000ms"), joining():
        raise dist.DistStoreError("wait timeout after 600000ms, keys: /default_pg/0//cpu//0/0")
    with pytest.raises(RuntimeError, match="no such device"), joining():
        raise RuntimeError("no such device")


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def board(server: dist.TCPStore, rank: int, size: int = 2, limit: float = 5.0) -> StateBoard:
    def connect() -> dist.Store:
        return dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))

    return StateBoard(connect, rank, size, "node0", limit)


def heartbeat(server: dist.TCPStore, rank: int, size: int = 2, stall: float = 100.0) -> Heartbeat:
    return Heartbeat(rank, board(server, rank, size), stall, interval=0.05)


def failure(beat: Heartbeat, error: Exception) -> str:
    with pytest.raises(CollectiveError) as caught, beat.explaining():
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_a_failed_collective_names_the_rank_that_failed_first_and_in_what(server):
    with heartbeat(server, 0, 3) as first, heartbeat(server, 1, 3) as second, heartbeat(server, 2, 3) as third:
        first.at(5, "computing")
        second.at(4, "waiting for images")
        with pytest.raises(ValueError, match="bad"), second.explaining():
            raise ValueError("bad\ncrop")  # keeps its type and its traceback
        text = failure(first, RuntimeError(CLOSED))
        assert "rank 1 (" in text
        assert ") ended at step 4, waiting for images: ValueError: bad crop; the other 2 are at steps 0 to 5" in text
        assert failure(third, LostRankError("saving: a rank has ended")) == text  # all say the same


def test_a_failed_collective_names_a_rank_that_is_gone(server):
    second = heartbeat(server, 1)
    second.at(4, "saving")
    second._publish()  # once, and no more
    with heartbeat(server, 0) as first:
        first.at(5, "computing")
        text = failure(first, RuntimeError(CLOSED))
    assert re.search(
        r"rank 1 \(.*\) has not been heard from for \d+ s, last at step 4, saving; the other 1 is at", text
    )


def test_one_rank_says_for_all_that_all_stand_still(server, capfd):
    texts: list[str] = []

    def count(words: str) -> int:
        texts.append(capfd.readouterr().err)
        return len(re.findall(rf"^[\d:]+ {words}", "".join(texts), re.MULTILINE))

    with heartbeat(server, 0, stall=0.4) as first, heartbeat(server, 1, stall=0.4) as second:
        for beat in (first, second):
            beat.at(5, "computing")
        until(lambda: count("stacks of rank 0") >= 2)
    assert count("no step for .*: all 2 ranks are at step 5, computing") == count("stacks of rank 0")
    assert count("no step for") == count("stacks of rank 0")
    assert count("stacks of rank 1") == 0


def test_a_failed_collective_of_ranks_that_all_answer_may_be_the_network(server):
    with heartbeat(server, 0) as first, heartbeat(server, 1) as second:
        for beat in (first, second):
            beat.at(5, "computing")
            beat._publish()
        text = failure(first, RuntimeError(CLOSED))
    assert text.endswith("all ranks answer, so it may be the network (Connection closed by peer [127.0.0.1]:29569.)")


def test_a_failed_collective_without_its_store_says_so(server, capfd):
    with heartbeat(server, 0) as first:
        until(lambda: first._board._store)
        first._board._store = _Dead()
        text = failure(first, RuntimeError(CLOSED))
    assert "the process group's store on node0 does not answer: it has ended, or cannot be reached" in text
    assert capfd.readouterr().err.count("does not answer: a rank that hangs will not be named") == 1


class _Dead:
    def __getattr__(self, name: str):
        def call(*arguments):
            raise dist.DistNetworkError("Broken pipe")

        return call


def test_a_run_goes_on_without_a_connection_for_its_heartbeat(capfd):
    def no_more() -> dist.Store:
        tried.append(1)
        raise dist.DistNetworkError("Too many open files")

    tried: list[int] = []
    with Heartbeat(0, StateBoard(no_more, 0, 512, "node0"), 100.0, interval=0.01) as beat:
        until(lambda: beat._own.beat > 3)
    assert tried == [1]
    assert capfd.readouterr().err.count("store on node0 does not answer: a rank that hangs will not be named") == 1


def test_a_store_that_hangs_is_waited_for_once(server):
    slow = board(server, 0, limit=0.2)
    slow._store = type("Slow", (), {"set": lambda *_: time.sleep(3)})()
    for _ in range(2):
        with pytest.raises(StoreError, match="does not answer"):
            slow.publish(state(0, 1))
    assert threading.active_count() < 20


def test_ordinary_errors_stay_what_they_are(server):
    with heartbeat(server, 0) as first, pytest.raises(RuntimeError, match="shapes") as caught, first.explaining():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert type(caught.value) is RuntimeError


def test_states_of_an_earlier_run_in_the_same_store_do_not_count(server):
    board(server, 0).publish(state(0, 9))
    board(server, 1).publish(state(1, 9))
    second = board(server, 0)
    second.publish(state(0, 0))
    assert [None if s is None else s.step for s in second.read()] == [0, None]


def test_one_process_that_hangs_says_in_what_and_goes_on(capfd):
    def printed() -> str:
        texts.append(capfd.readouterr().err)
        return "".join(texts)

    texts: list[str] = []
    with Heartbeat(stall_seconds=0.2) as beat:
        beat.at(3, "waiting for images")
        until(lambda: printed().count("no step for") >= 2)
        beat.compute(3)
        until(lambda: "goes on after" in printed())
    text = printed()
    assert re.search(r"no step for \d+ s: at step 3, waiting for images", text)
    assert "test_one_process_that_hangs_says_in_what_and_goes_on" in text  # its stack
    assert text.count("goes on after") == 1


def test_a_run_that_goes_on_is_silent_and_its_long_phases_are_not_taken_for_hangs(capfd):
    with Heartbeat(stall_seconds=1.0) as beat:
        for _ in range(150):
            beat.at(3, "waiting for images")  # many batches of one step
            time.sleep(0.01)
        assert capfd.readouterr().err == ""
        beat.compute(3)
        time.sleep(0.01)
        assert beat._point[1] == "computing the first step"
        beat.compute(4)
        assert beat._point[1] == "computing"
        beat.begin("evaluating")
        texts: list[str] = []
        until(lambda: texts.append(capfd.readouterr().err) or texts[-1])
    assert re.search(r"no step for \d+ s: at step 4, evaluating( for \d+ s)?, which may take long\n$", texts[-1])


def test_waiting_in_another_thread_shows_while_the_training_waits_for_it(server):
    with heartbeat(server, 0) as first:
        until(lambda: first._board._store)

        def phase() -> str:
            return first._board.read()[0].phase

        released = threading.Event()

        def save() -> None:
            with first.waiting("writing a checkpoint"):
                released.wait(WAIT)

        thread = threading.Thread(target=save)
        thread.start()
        first.at(4, "computing")
        until(lambda: phase() == "computing")
        first.at(4, "saving")
        until(lambda: phase() == "waiting for the others (writing a checkpoint)")
        released.set()
        thread.join()
        until(lambda: phase() == "saving")
        with first.waiting("asking all ranks"):
            until(lambda: phase() == "waiting for the others (asking all ranks)")
        until(lambda: phase() == "saving")


class Recorder(Heartbeat):
    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, str]] = []

    def at(self, step: int, phase: str) -> None:
        super().at(step, phase)
        if self.points[-1:] != [(step, phase)]:
            self.points.append((step, phase))


def test_the_trainer_says_what_it_does(tmp_path):
    images = write_images(tmp_path / "images")
    trainer = make_trainer(tmp_path / "run", images, steps=3, warmup_steps=1, checkpoint_every_steps=2)
    trainer.heartbeat = Recorder()
    trainer.fit()
    first, later = "computing the first step", "computing"
    assert trainer.heartbeat.points == [
        *((0, phase) for phase in ("saving", "waiting for images", first)),
        *((1, phase) for phase in ("between steps", "waiting for images", later)),
        *((2, phase) for phase in ("between steps", "saving", "waiting for images", later)),
        *((3, phase) for phase in ("between steps", "saving")),
    ]
    trainer.run.close()
    resumed = make_trainer(tmp_path / "run", images, steps=3, warmup_steps=1, resume=True)
    resumed.heartbeat = Recorder()
    resumed.resume(tmp_path / "run/checkpoints/step-2")
    assert resumed.heartbeat.points == [(0, "reading a checkpoint")]


def hang(rank: int, folder: Path) -> int:
    """Rank 1 stands still before its fourth step until a file appears, and all before the sixth until another does."""
    plain = Trainer._next_batch

    def next_batch(self):
        if rank == 1 and self.step == 3:
            self.heartbeat.at(3, "waiting for images")
            until(lambda: (folder / "go on").exists())
        if self.step == 5:
            until(lambda: (folder / "end").exists())
        return plain(self)

    Trainer._next_batch = next_batch
    return train(rank, folder, "--train.parallel", "fsdp", "--report.stall-seconds", "1")


def die(rank: int, folder: Path) -> int:
    plain = Trainer._next_batch

    def next_batch(self):
        if rank == 1 and self.step == 3:
            self.heartbeat.at(3, "waiting for images")
            beats = self.heartbeat._own.beat
            until(lambda: self.heartbeat._own.beat > beats + 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self)

    Trainer._next_batch = next_batch
    code = train(rank, folder, "--train.parallel", "ddp", "--report.stall-seconds", "2")
    os._exit(code)  # what follows in the test's own process group would fail


def train(rank: int, folder: Path, *flags: str) -> int:
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{rank}")
    own = ["--data.path", str(folder / "images"), "--out", str(folder / "run"), "--train.global-batch-size", "6"]
    return main([*FLAGS, *own, "--train.batch-size", "6", *flags])


def test_a_rank_that_hangs_and_one_that_is_stopped_are_named_while_the_others_wait(tmp_path):
    write_images(tmp_path / "images")
    logs = tmp_path / "logs"
    logs.mkdir()

    def log(rank: int) -> str:
        path = logs / f"{rank}.log"
        return path.read_text() if path.exists() else ""

    with start_ranks(hang, 2, tmp_path, folder=logs, timeout=60) as processes:
        behind = (
            r"no step for \d+ s: rank 1 \(\S+\) is at step 3, waiting for images for \d+ s; the other 1 is at step 3"
        )
        until(lambda: re.search(behind, log(0)))
        until(lambda: "stacks of rank 1" in log(1))
        assert "next_batch" in log(1)
        (tmp_path / "go on").touch()
        until(lambda: "goes on after" in log(0))
        os.kill(processes[1].pid, signal.SIGSTOP)
        until(lambda: re.search(r"rank 1 \(\S+\) has not been heard from for \d+ s, last at step", log(0)))
        os.kill(processes[1].pid, signal.SIGCONT)
        (tmp_path / "end").touch()
        for process in processes:
            process.join(WAIT)
        assert [process.exitcode for process in processes] == [0, 0]


def test_a_rank_that_is_killed_is_named_by_the_others_in_one_line(tmp_path):
    write_images(tmp_path / "images")
    logs = tmp_path / "logs"
    logs.mkdir()
    with start_ranks(die, 3, tmp_path, folder=logs, timeout=60) as processes:
        for process in processes:
            process.join(WAIT)
        assert [process.exitcode for process in processes] == [2, -signal.SIGKILL, 2]
    first, last = ((logs / f"{rank}.log").read_text() for rank in (0, 2))
    line = r"a collective failed: rank 1 \(\S+\) has not been heard from for \d+ s, last at step 3, waiting for images"
    assert re.search(f"fastmae: error: {line}; the other 2 are at step 3", first)
    assert "Traceback" not in first + last
    assert "fastmae: error" not in last
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["status"] == "failed"
    assert re.search(line, status["reason"])


def hang_for_ever(rank: int, folder: Path) -> int:
    plain = Trainer._next_batch

    def next_batch(self):
        if rank == 1 and self.step == 3:
            self.heartbeat.at(3, "waiting for images")
            threading.Event().wait()
        return plain(self)

    Trainer._next_batch = next_batch
    os._exit(train(rank, folder, "--train.parallel", "fsdp", "--report.stall-seconds", "2"))


@pytest.mark.slow
def test_a_collective_whose_time_is_over_names_the_rank_behind(tmp_path):
    write_images(tmp_path / "images")
    logs = tmp_path / "logs"
    logs.mkdir()
    with start_ranks(hang_for_ever, 3, tmp_path, folder=logs, timeout=15) as processes:  # of the collectives
        for rank in (0, 2):
            processes[rank].join(2 * WAIT)
        assert [process.exitcode for process in processes] == [2, None, 2]
    line = r"a collective failed: rank 1 \(\S+\) is at step 3, waiting for images for \d+ s; the other 2 are at step 3"
    assert re.search(f"fastmae: error: {line}", (logs / "0.log").read_text())
    assert re.search(line, json.loads((tmp_path / "run/status.json").read_text())["reason"])
