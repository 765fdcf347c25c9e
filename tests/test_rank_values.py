"""What a rank measures of itself, and what rows and logs say of many ranks."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from fastmae.train.checkpoint import LostRankError
from fastmae.train.telemetry import rank_values
from fastmae.train.telemetry.block_timer import BlockTimer
from fastmae.train.telemetry.peak import peak_flops
from fastmae.train.telemetry.rank_values import SHOWN_RANKS, RankValues


class Timed(nn.Module):
    """A block of a second, on a clock that it moves."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.now, self.asked = 0.0, 0
        monkeypatch.setattr("fastmae.train.telemetry.block_timer.time.perf_counter", self.time)

    def time(self) -> float:
        self.asked += 1
        return self.now

    def wait(self, *_: object) -> None:
        self.now += 100.0

    def forward(self) -> None:
        self.now += 1.0


def test_a_block_is_timed_in_some_steps_without_what_hooks_before_it_wait_for(monkeypatch):
    block = Timed(monkeypatch)
    block.register_forward_pre_hook(block.wait)
    block.register_forward_hook(block.wait)
    timer = BlockTimer(block, torch.device("cpu"), every=3)
    for _ in range(4):
        block()
        block()  # a second pass of a step that accumulates
        timer.next_step()
    assert block.asked == 4  # before and after one pass of the first step, and of the fourth
    assert timer.take() == 1.0
    assert math.isnan(timer.take())
    timer.close()
    for _ in range(3):
        timer.next_step()
        block()
    assert block.asked == 4


def test_a_picture_in_between_is_not_timed(monkeypatch):
    block = Timed(monkeypatch).eval()
    timer = BlockTimer(block, torch.device("cpu"))
    block()
    assert math.isnan(timer.take())
    block.train()
    block()
    assert timer.take() == 1.0


@pytest.mark.gpu
def test_a_block_on_a_gpu_is_timed_by_events_that_are_not_waited_for():
    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.cuda._sleep(10**8)
            return x

    block = Block()
    timer = BlockTimer(block, torch.device("cuda"))
    torch.cuda._sleep(10**9)
    block(torch.zeros(1))
    assert math.isnan(timer.take())  # not there yet, and nobody waited
    torch.cuda.synchronize()
    assert timer.take() > 0.005


class Many:
    """Ranks of which the last one knows no block's time; this is the first."""

    def __init__(self, size: int) -> None:
        self.rank, self.size, self.group = 0, size, None

    def gather(self, what: str, function) -> list:
        return [function()] * self.size

    def all_gather(self, gathered: list[torch.Tensor], own: torch.Tensor, group: None, async_op: bool) -> Many:
        for rank, values in enumerate(gathered):
            values.copy_(own)
            values[0] = math.nan if rank == self.size - 1 else 0.01 * (rank + 1)
        return self

    def wait(self) -> None:
        pass


@pytest.mark.parametrize(("size", "lines"), [(SHOWN_RANKS, 3), (SHOWN_RANKS + 1, 2)])
def test_of_many_ranks_rows_and_logs_are_shorter(size, lines, monkeypatch, caplog):
    ranks, now = Many(size), iter([1000.0, 1001.0, 1000.0 + rank_values.MINUTE])
    monkeypatch.setattr(rank_values.dist, "all_gather", ranks.all_gather)
    monkeypatch.setattr(rank_values.time, "monotonic", lambda: next(now))
    values = RankValues(ranks, torch.device("cpu"), interval=4)
    assert values.open(torch.float32) == pytest.approx(size * peak_flops(torch.device("cpu"), torch.float32))
    caplog.set_level("INFO", "fastmae")
    for step in (4, 8, 12):
        row, _ = values.share({"step": step, "step_time": 0.5, "data_time": 0.25})()
    assert row["data_share"] == 0.5
    assert (row["block_time_min"], row["block_time_max"]) == (0.01, 0.01 * (size - 1))
    if size == SHOWN_RANKS:
        assert row["ranks"]["block_time"] == [*(0.01 * (rank + 1) for rank in range(size - 1)), None]
    assert ("ranks" in row) == (size == SHOWN_RANKS)
    assert "NaN" not in json.dumps(row)
    assert sum("ms a step" in record.getMessage() for record in caplog.records) == lines


def test_a_rank_that_has_gone_is_an_error(monkeypatch):
    def gone() -> None:
        raise RuntimeError("[tcp/pair.cc:561] Connection closed by peer. This is typically caused by a crash")

    ranks = Many(2)
    monkeypatch.setattr(rank_values.dist, "all_gather", ranks.all_gather)
    values = RankValues(ranks, torch.device("cpu"), interval=4)
    values.open(torch.float32)
    shared = values.share({"step": 4, "step_time": 0.5, "data_time": 0.25})
    monkeypatch.setattr(ranks, "wait", gone)
    with pytest.raises(LostRankError, match=r"does not answer \(Connection closed by peer.\)"):
        shared()
