"""An error that all processes of a run meet is printed by the first of them alone."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PATIENCE = 5.0
"""Seconds that the other ranks give the first one to say the same."""


def rank_and_size() -> tuple[int, int]:
    """This process among those that torchrun started; (0, 1) for one that it did not start."""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1


def say_once(text: str, patience: float = PATIENCE) -> None:
    """Print an error on stderr, unless another rank prints the same.

    Rank 0 prints at once. The others wait for it to do so, and print what it does not, with their rank; of several with
    the same words, the first one does. They meet at torchrun's store, and where that does not answer, everyone prints.

    Args:
        patience: seconds to wait for rank 0.
    """
    rank, _ = rank_and_size()
    if rank == 0:
        print(f"fastmae: error: {text}", file=sys.stderr, flush=True)
    if not _is_said(text, patience):
        print(f"fastmae: error: rank {rank} ({socket.gethostname()}): {text}", file=sys.stderr, flush=True)


def _is_said(text: str, patience: float) -> bool:
    """Whether this rank need not print a text: rank 0 has, or another one does."""
    rank, size = rank_and_size()
    if size == 1:
        return True
    with _undisturbed():
        return _limited(lambda: _is_known(text, rank, patience), 5 * patience) or rank == 0


def _is_known(text: str, rank: int, patience: float) -> bool:
    """Ask the store whether rank 0 has printed a text, or another one does; rank 0 tells that it has."""
    from datetime import timedelta

    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Hundreds of ranks that connect at once keep each other waiting.
    limit = timedelta(seconds=4 * patience)
    store = dist.TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
    # The store may outlive a command. All ranks have met as many errors, this one included.
    count = store.add(f"fastmae/errors-of/{rank}", 1)
    key = f"fastmae/error-{count}/{hashlib.sha256(text.encode()).hexdigest()}"
    if rank == 0:
        store.set(key, "said")
        return True
    with suppress(dist.DistStoreError):
        store.wait([key], timedelta(seconds=patience))
        return True
    return store.add(f"{key}/first", 1) > 1


def _limited(function: Callable[[], bool], seconds: float) -> bool:
    """In a thread, since a store whose host hangs keeps its clients; False if it fails or takes longer."""
    outcome: list[bool] = []

    def run() -> None:
        with suppress(Exception):  # whatever the matter is, the error is printed
            outcome.append(function())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(outcome and outcome[0])


@contextmanager
def _undisturbed() -> Iterator[None]:
    """torchrun sends SIGTERM to the other ranks as soon as one has ended: not before this one has said its error."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
