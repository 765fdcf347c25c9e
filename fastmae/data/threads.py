"""Threads that a file system cannot hold hostage.

The standard library's pool waits for its threads when the interpreter ends, for ever if one of them reads a file on a
server that does not answer. These threads are waited for a few seconds, which is plenty for whatever computes, and then
left behind.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future, InvalidStateError, ThreadPoolExecutor
from functools import cache
from itertools import islice
from queue import SimpleQueue
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
PATIENCE = 3.0
"""Seconds that ending waits for a thread in the middle of something."""
_all: weakref.WeakSet[Threads] = weakref.WeakSet()


def in_order(
    action: Callable[[Item], Result], items: Iterable[Item], num_threads: int | None = None
) -> Iterator[Result]:
    """Results in the order of the items, computed in threads that run ahead by a bounded number of items."""
    num_threads = num_threads or min(32, 4 * (os.cpu_count() or 1))
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(action, item))
                if len(pending) > 2 * num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items, the last of fewer."""
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


class Threads(Executor):
    """A pool of daemon threads.

    Args:
        count: how many.
        name: prefix of the threads' names.
        initializer: what each thread calls first.
    """

    def __init__(self, count: int, name: str, initializer: Callable[[], None] | None = None):
        self._tasks: SimpleQueue = SimpleQueue()
        self._state = _State()
        arguments = self._tasks, self._state, initializer
        self._threads = [
            threading.Thread(target=_work, args=arguments, name=f"{name}_{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()
        _all.add(self)
        _end_at_exit()

    def submit(self, function, /, *args, **kwargs) -> Future:
        with self._state.lock:
            if self._state.stopped:
                raise CancelledError("the threads have been stopped")
            future: Future = Future()
            self._tasks.put((future, function, args, kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """Start nothing any more. Whoever waits for a result gets ``CancelledError``, at once.

        Args:
            wait: give what is running ``PATIENCE`` seconds to end.
            cancel_futures: only True is possible.
        """
        with self._state.lock:
            if not self._state.stopped:
                self._state.stopped = True
                for future in self._state.running:
                    _settle(future.set_exception, CancelledError("the threads have been stopped"))
                for _ in self._threads:
                    self._tasks.put(None)
        if wait:
            join([self])

    @property
    def alive(self) -> list[threading.Thread]:
        """The threads that have not ended."""
        return [thread for thread in self._threads if thread.is_alive()]


class _State:
    def __init__(self):
        self.lock = threading.Lock()
        self.stopped = False
        self.running: set[Future] = set()


def join(pools: list[Threads]) -> bool:
    """Wait for the threads of stopped pools, ``PATIENCE`` seconds at most; whether they have all ended."""
    deadline = time.monotonic() + PATIENCE
    threads = [thread for pool in pools for thread in pool.alive if thread is not threading.current_thread()]
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    return not any(thread.is_alive() for thread in threads)


@cache
def _end_at_exit() -> None:
    atexit.register(_end)


def _end() -> None:
    # Threads inside a decoder while its library is being unloaded would crash the process.
    pools = list(_all)
    for pool in pools:
        pool.shutdown(wait=False)
    join(pools)


def _work(tasks: SimpleQueue, state: _State, initializer: Callable[[], None] | None) -> None:
    if initializer is not None:
        initializer()
    while (task := tasks.get()) is not None:
        future, function, args, kwargs = task
        with state.lock:
            if state.stopped or not future.set_running_or_notify_cancel():
                future.cancel()
                _settle(future.set_exception, CancelledError("the threads have been stopped"))
                continue
            state.running.add(future)
        try:
            result, settle = function(*args, **kwargs), future.set_result
        except BaseException as error:
            result, settle = error, future.set_exception
        with state.lock:
            state.running.discard(future)
        _settle(settle, result)
        del future, function, args, kwargs, result, settle, task


def _settle(settle: Callable[[object], None], value: object) -> None:
    with contextlib.suppress(InvalidStateError):  # stopped in the meantime, and settled then
        settle(value)
