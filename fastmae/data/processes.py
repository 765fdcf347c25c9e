"""Worker processes for work that holds the interpreter lock: reading headers, parsing shards.

They are fresh interpreters that import only the module of the function they call. ``multiprocessing`` is not used: its
spawned workers run the caller's script again, which starts a second training unless the script has a ``__main__``
guard, and forking a process that has threads and a CUDA context is unsafe.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from queue import SimpleQueue
from typing import TypeVar

from fastmae.data.threads import in_order

Item, Result = TypeVar("Item"), TypeVar("Result")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    action: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None, *, alone: int = 0
) -> Iterator[Result]:
    """Results in the order of the items, computed ahead by a bounded number of items.

    Args:
        action: a function at the top level of a module; its argument, result and exceptions can be pickled.
        items: consumed as workers become free.
        workers: processes; None for one per core. With 1, threads of this process do the work.
        alone: how many items threads of this process compute before workers are started, which costs 0.2 s each.

    Raises:
        RuntimeError: a worker was killed.
    """
    workers, items = workers or available_cores(), iter(items)
    yield from in_order(action, islice(items, alone) if workers > 1 else items)
    if rest := list(islice(items, 1)):
        pool = Workers(workers)
        try:
            yield from in_order(lambda item: pool.call(action, item), chain(rest, items), workers)
        finally:
            pool.stop()


class Workers:
    def __init__(self, count: int):
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)  # noqa: PTH109
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-c", "from fastmae.data.processes import serve; serve()"]
        options = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "env": os.environ | threads | {"PYTHONPATH": path},
        }
        self._all = [subprocess.Popen(command, **options) for _ in range(count)]
        self._idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        for process in self._all:
            self._idle.put(process)

    def call(self, action: Callable[[Item], Result], item: Item) -> Result:
        process = self._idle.get()
        try:
            pickle.dump((action, item), process.stdin)
            process.stdin.flush()
            good, result = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise RuntimeError(f"a worker process ended with exit code {process.wait()}") from error
        finally:
            self._idle.put(process)
        if not good:
            raise result
        return result

    def stop(self) -> None:
        for process in self._all:
            process.kill()
        for process in self._all:
            process.communicate()


def serve() -> None:
    """Answer calls from stdin until it ends, with the parent process at the latest."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which stops its workers
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    with suppress(EOFError, BrokenPipeError):
        while True:
            action, item = pickle.load(calls)
            try:
                answer = True, action(item)
            except Exception as error:
                answer = False, error
            pickle.dump(answer, answers)
            answers.flush()
    os._exit(0)
