"""Errors of several processes: what all meet is printed by rank 0 alone, what one meets by that one; none is lost."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from distributed import start_ranks

from fastmae.cli import main
from fastmae.cli.said_once import say_once


def failing(rank: int) -> int:
    common = main(["pretrain", "--resume"])
    assert main(["pretrain", "--no-such-flag"]) == 2
    if rank == 1:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()  # as torchrun does once rank 0 has ended
    if rank != 0:
        say_once("the disk is gone", patience=0.5)
    if rank == 2:
        say_once("bad cable", patience=0.5)
        os.environ["MASTER_PORT"] = "9"
        say_once("no store", patience=0.5)
    return common


def test_common_errors_are_said_by_rank_0_and_others_by_one_that_met_them(tmp_path):
    with start_ranks(failing, 3, folder=tmp_path, init_group=False) as processes:
        for process in processes:
            process.join(50)
        assert [process.exitcode for process in processes] == [0, 0, 0]
    first, second, third = ((tmp_path / f"{rank}.log").read_text() for rank in range(3))
    assert first.count("fastmae: error: --resume: expected --out") == 1
    assert "no-such-flag" in first
    for text in (second, third):
        assert "--resume" not in text
        assert "no-such-flag" not in text
    assert (second + third).count("the disk is gone") == 1
    assert third.count("fastmae: error: rank 2 (") == 2 + ("the disk is gone" in third)
    assert "bad cable" in third
    assert "no store" in third
    assert "disk" not in first


def test_a_process_alone_says_its_error_without_a_rank(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    say_once("a mistake")
    assert capsys.readouterr().err == "fastmae: error: a mistake\n"


def test_help_is_printed_by_rank_0_alone(capsys, monkeypatch):
    for rank, printed in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit, match="0"):
            main(["plan", "--help"])
        assert ("--gpus" in capsys.readouterr().out) == printed
