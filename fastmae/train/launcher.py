"""Which of a run's processes this is, by the variables of torchrun, or of ``srun`` without it. Imports no PyTorch."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from contextlib import suppress

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def place() -> tuple[int, int, int, int]:
    """Rank and number of processes, of all and on this node; (0, 1, 0, 1) without torchrun.

    Raises:
        ValueError: if some of torchrun's variables are set and others are not.
    """
    missing = [name for name in _VARIABLES if name not in os.environ]
    if len(missing) == len(_VARIABLES):
        return 0, 1, 0, 1
    if missing:
        raise ValueError(f"environment: expected torchrun's {', '.join(_VARIABLES)}, got no {', '.join(missing)}")
    return tuple(int(os.environ[name]) for name in _VARIABLES)


def rank_and_size() -> tuple[int, int]:
    """The first two of :func:`place`, for output: (0, 1) where they make no sense."""
    with suppress(KeyError, ValueError):
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def read_slurm(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, MASTER_ADDR and their kin if ``srun`` started several tasks and ``torchrun`` did not.

    Only the variables of a step count: a shell of ``salloc`` and a batch script have the job's SLURM_NTASKS, but are
    one process.
    """
    size = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if size == 1 or "RANK" in environment or "WORLD_SIZE" in environment:
        return
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "")
    # --gpus-per-task=1 shows each task its own GPU only, which PyTorch then numbers 0.
    local_rank = "0" if gpus and "," not in gpus else environment["SLURM_LOCALID"]
    tasks = []  # per node, from text such as "8(x3),4"
    for count, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"]):
        tasks += [count] * int(nodes or 1)
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.sub(r"\[([^],-]+)[^]]*]", r"\1", nodes).split(",")[0]  # of "gpu[003-005,9],cpu1": gpu003
    job, step = (int(environment[name]) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    environment |= {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": tasks[int(environment["SLURM_NODEID"])],
    }
    environment.setdefault("MASTER_ADDR", "127.0.0.1" if first == nodes else first)
    environment.setdefault("MASTER_PORT", str(20000 + (16 * job + step) % 10000))  # below those of outgoing connections
