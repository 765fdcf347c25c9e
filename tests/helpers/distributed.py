"""Processes that train together, for tests: start n ranks, wait with a time limit, collect what each returns."""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

GRACE = 3.0
"""Seconds that the other ranks are given to end, once one has failed or died, before they are killed."""


class RankError(AssertionError):
    """A rank raised, died or did not end in time; the message holds its traceback and what it printed.

    Attributes:
        rank: the rank that failed first, or the lowest that did not end in time.
        exit_code: negative: the number of the signal that killed it; None: it did not end in time.
    """

    def __init__(self, message: str, rank: int, exit_code: int | None):
        super().__init__(message)
        self.rank, self.exit_code = rank, exit_code


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    init_group: bool = True,
    ranks_per_node: int | None = None,
) -> list[Any]:
    """Call ``function(rank, *args)`` in as many processes as ``world_size`` says, and return what each one returned.

    The environment is torchrun's: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Every
    process has one thread, and fills fresh memory with NaN, as the suite's own does.

    Args:
        function: of a module (spawned processes import it); so are its arguments and results (pickled).
        timeout: seconds until all ranks are killed; each then shows where it was.
        init_group: make the default process group, of gloo, for the function.
        ranks_per_node: pretend that nodes have so many; None: all on one.

    Raises:
        RankError: if a rank raises, dies or does not end in time.
    """
    options = {"timeout": timeout, "init_group": init_group, "ranks_per_node": ranks_per_node}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with start_ranks(function, world_size, *args, folder=folder, **options) as processes:
            _wait(processes, folder, timeout)
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


@contextmanager
def start_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    folder: Path,
    timeout: float = 60.0,
    init_group: bool = True,
    ranks_per_node: int | None = None,
) -> Iterator[list[BaseProcess]]:
    """The processes of :func:`run_ranks` while they run, for tests that kill some; all are dead afterwards.

    ``folder`` then holds, a file a rank, ``N.log`` (what it printed), ``N.result`` (pickled) and ``N.error`` (its
    traceback) where there are any.
    """
    per_node = ranks_per_node or world_size
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        # This process holds the store, as torchrun's agent does, so that no port has to be guessed.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(per_node),
        "OMP_NUM_THREADS": "1",
    }
    try:
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank % per_node), "GROUP_RANK": str(rank // per_node)}
            arguments = (function, args, rank, folder, timeout, init_group, common | own)
            processes.append(start_process(_run, *arguments, name=f"rank {rank}"))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def start_process(
    function: Callable[..., Any], *args: Any, name: str | None = None, daemon: bool = True
) -> BaseProcess:
    """Call a function of a module in a process of its own, a fork of one that has imported what takes long.

    That one has one thread and has used neither a GPU nor PyTorch's thread pools, so that it may be forked.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "fastmae.pretraining"])
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        process = context.Process(target=function, args=args, name=name, daemon=daemon)
        process.start()
    return process


def _run(
    function: Callable[..., Any],
    args: tuple,
    rank: int,
    folder: Path,
    timeout: float,
    init_group: bool,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)
    log = (folder / f"{rank}.log").open("wb", buffering=0)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR2, log)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    try:
        if init_group:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        result = function(rank, *args)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        if dist.is_initialized():
            dist.barrier()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # without waiting for the others, as the end of the process group would
    os._exit(0)  # gloo's threads now and then abort in the destructor of a group that DTensors used (torch 2.14)


def _wait(processes: list[BaseProcess], folder: Path, timeout: float) -> None:
    deadline, failed = time.monotonic() + timeout, False
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        if not failed and any(p.exitcode for p in processes):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        time.sleep(0.02)
    first = min(
        (r for r, p in enumerate(processes) if p.exitcode), key=lambda r: _when(r, processes, folder), default=None
    )
    if first is not None:
        raise RankError(_message(first, processes, folder), first, processes[first].exitcode)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    if late:
        for rank in late:
            os.kill(processes[rank].pid, signal.SIGUSR2)  # prints where it is
        time.sleep(0.2)
        texts = "".join(f"\nrank {rank}:\n{_tail(folder / f'{rank}.log')}" for rank in late)
        raise RankError(f"ranks {late} did not end in {timeout:g} s{texts}", late[0], None)


def _when(rank: int, processes: list[BaseProcess], folder: Path) -> float:
    """For the order in which ranks failed. One that was killed was the first, the others have failed for want of it;
    one that raised says so on the disk before its connections close."""
    if processes[rank].exitcode == -signal.SIGKILL:
        return -math.inf
    error = folder / f"{rank}.error"
    return error.stat().st_mtime_ns if error.exists() else math.inf


def _message(first: int, processes: list[BaseProcess], folder: Path) -> str:
    parts = [f"rank {first} failed first"]
    for rank, process in enumerate(processes):
        error = folder / f"{rank}.error"
        if error.exists():
            parts.append(f"rank {rank}:\n{error.read_text()}")
        elif process.exitcode:
            parts.append(f"rank {rank} ended with exit code {process.exitcode}:\n{_tail(folder / f'{rank}.log')}")
    return "\n".join(parts)


def _tail(path: Path, lines: int = 60) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""
