"""The helper that starts ranks: results come back, failures name the rank, nothing outlives its time limit."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from distributed import RankError, run_ranks


def gather_ranks(rank: int, offset: int) -> tuple[list[float], int]:
    values = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(values, torch.tensor([float(rank + offset)]))
    return torch.cat(values).tolist(), int(os.environ["LOCAL_RANK"])


def fail_on_one(rank: int, how: str) -> None:
    if rank == 1 and how == "raise":
        raise ValueError("one two three")
    if rank == 1 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(60)
    dist.barrier()


def test_results_come_back_by_rank():
    expected = [10.0, 11.0]
    assert run_ranks(gather_ranks, 2, 10, ranks_per_node=1) == [(expected, 0), (expected, 0)]


def test_failing_rank_shows_its_traceback():
    with pytest.raises(RankError, match=r"(?s)rank 1 failed first.*fail_on_one.*one two three") as caught:
        run_ranks(fail_on_one, 2, "raise")
    assert (caught.value.rank, caught.value.exit_code) == (1, 1)


@pytest.mark.slow
def test_killed_rank_and_hanging_ranks_are_named():
    with pytest.raises(RankError, match="exit code -9") as caught:
        run_ranks(fail_on_one, 2, "die")
    assert (caught.value.rank, caught.value.exit_code) == (1, -9)
    with pytest.raises(RankError, match=r"(?s)ranks \[0, 1\] did not end in 8 s.*fail_on_one"):
        run_ranks(fail_on_one, 2, "hang", timeout=8)
