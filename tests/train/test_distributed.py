"""The helper that starts ranks: failures name the rank, nothing outlives its time limit."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist
from distributed import RankError, run_ranks


def fail_on_one(rank: int, how: str) -> None:
    if rank == 1 and how == "raise":
        raise ValueError("one two three")
    if rank == 1 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(60)
    dist.barrier()


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
