"""Threads that cannot keep the process from ending.

The standard library's pool waits for its threads when the interpreter exits, forever if one of them reads from a file
server that does not answer. These threads get a few seconds to finish and are then left behind.
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
from functools import cache, partial
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
PATIENCE = 3.0
"""Seconds that a thread gets to finish what it is doing."""
_all: weakref.WeakSet[Threads] = weakref.WeakSet()


def in_order(
    action: Callable[[Item], Result], items: Iterable[Item], num_threads: int | None = None
) -> Iterator[Result]:
    """Results in the order of the items, computed in threads that run ahead by a bounded number of items."""
    num_threads = num_threads or min(32, 4 * (os.cpu_count() or 1))
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        for item in items:
            pending.append(pool.submit(action, item))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C and errors do not wait for calls that are under way


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items; the last may be shorter."""
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


class Threads(Executor):
    """A pool of daemon threads, which call ``initializer`` first."""

    def __init__(self, count: int, name: str, initializer: Callable[[], None] | None = None):
        self._tasks: SimpleQueue[tuple[Future, Callable] | None] = SimpleQueue()
        self._lock, self._stopped = threading.Lock(), False
        self._current: set[Future] = set()
        self._threads = [
            threading.Thread(target=self._work, args=(initializer,), name=f"{name}_{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()
        _all.add(self)
        _end_at_exit()

    def submit(self, function, /, *args, **kwargs) -> Future:
        future: Future = Future()
        with self._lock:
            if self._stopped:
                raise CancelledError("the threads have been stopped")
            self._tasks.put((future, partial(function, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """Start no more tasks; whoever waits for a result gets ``CancelledError`` at once. ``wait`` gives what is
        running ``PATIENCE`` seconds to finish."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                for future in self._current:
                    _settle(future.set_exception, CancelledError("the threads have been stopped"))
                with contextlib.suppress(Empty):
                    while True:
                        self._tasks.get_nowait()[0].cancel()
                for _ in self._threads:
                    self._tasks.put(None)
        if wait:
            join([self])

    @property
    def alive(self) -> list[threading.Thread]:
        """The threads that have not ended."""
        return [thread for thread in self._threads if thread.is_alive()]

    def _work(self, initializer: Callable[[], None] | None) -> None:
        if initializer is not None:
            initializer()
        while (task := self._tasks.get()) is not None:
            self._run(*task)
            del task  # the next one may be long in coming

    def _run(self, future: Future, call: Callable[[], object]) -> None:
        with self._lock:
            if self._stopped or not future.set_running_or_notify_cancel():
                future.cancel()
                return
            self._current.add(future)
        try:
            result, settle = call(), future.set_result
        except BaseException as error:
            result, settle = error, future.set_exception
        with self._lock:
            self._current.discard(future)
        _settle(settle, result)


def _settle(settle: Callable[[object], None], value: object) -> None:
    with contextlib.suppress(InvalidStateError):  # shutdown has settled it
        settle(value)


def join(pools: Iterable[Threads]) -> bool:
    """Wait for the threads of stopped pools, at most ``PATIENCE`` seconds; return whether all have ended."""
    deadline = time.monotonic() + PATIENCE
    threads = [thread for pool in pools for thread in pool.alive if thread is not threading.current_thread()]
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    return not any(thread.is_alive() for thread in threads)


@cache
def _end_at_exit() -> None:
    atexit.register(_end)


def _end() -> None:
    # A thread inside a decoder would crash the process when the decoder's library is unloaded.
    pools = list(_all)
    for pool in pools:
        pool.shutdown(wait=False)
    join(pools)
