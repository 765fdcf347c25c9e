"""Signals, what the ranks agree on between steps, and a watchdog that names the rank that all others wait for.

Nothing here imports PyTorch before it is needed: signals are handled while PyTorch is imported, which takes seconds.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from fastmae.train.ranks import Ranks

EXIT_ERROR, EXIT_PREEMPTED = 2, 75
"""Exit codes: an error that the user can fix, a lost rank included; and a run that saved and left on a signal, which is
``EX_TEMPFAIL`` of sysexits.h, "try again later"."""

_log = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# Signals


class StoppedEarly(Exception):
    """A signal came before the first step, or during the final evaluation; the message is its name."""


class StopRequest:
    """Context in which SIGINT, SIGTERM and SIGUSR1 only set ``requested``; the training loop reads it between steps.

    A second SIGINT or SIGTERM ends the process at once, but not within ``repeats`` seconds of the first: a batch system
    signals every process of a job, launchers included, and launchers pass signals on. SIGUSR1 is a notice: a SIGTERM
    after it counts as the first. Outside the main thread, where Python allows no handlers, ``requested`` stays None.
    Where the process does not end with this context, such as in a notebook, a second SIGINT raises KeyboardInterrupt.

    Args:
        quiet: print nothing, because another process of the job does.
        process_ends: the process ends after this context. From its exit on the signals are ignored, so that a repeated
            one does not kill the process while it shuts down. Otherwise the previous handlers come back.

    Attributes:
        requested: name of the first signal, or None.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    repeats: ClassVar[dict[int, float]] = {signal.SIGINT: 1.0, signal.SIGTERM: 15.0}

    def __init__(self, quiet: bool = False, process_ends: bool = False) -> None:
        self._quiet, self._process_ends = quiet, process_ends
        self.requested: str | None = None
        self._first: tuple[int, float] | None = None  # of SIGINT and SIGTERM: number and time
        self._raises = False
        self._previous: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            # Python runs handlers in the main thread once that leaves C++, which a hung collective never does. The
            # number of the signal is written to this pipe at once, and the watchdog reads it.
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._previous = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._process_ends else handler)
        if self._pipe:
            signal.set_wakeup_fd(self._wakeup)
            for end in self._pipe:
                os.close(end)
            self._pipe = None

    def arrived(self) -> bool:
        """Whether a signal has arrived since the last call, even if the main thread could not handle it yet."""
        if self._pipe is None or not select.select([self._pipe[0]], [], [], 0)[0]:
            return False
        return any(number in self.signals for number in os.read(self._pipe[0], 64))

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, a signal raises :class:`StoppedEarly` at once, and so does one that came before."""
        if self.requested:
            raise StoppedEarly(self.requested)
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGUSR1 and self.requested:
            return
        if number in self.repeats:
            if self._first:
                first, at = self._first
                if number == first and now - at < self.repeats[number]:
                    return
                if number == signal.SIGINT and not self._process_ends:
                    raise KeyboardInterrupt
                os._exit(128 + number)
            self._first = number, now
        self.requested = self.requested or name
        if not self._quiet:
            action = "ending the evaluation" if self._raises else "saving and leaving"
            # Not print: a handler may interrupt a write to the same buffered stream, which raises when re-entered.
            with suppress(OSError):  # the reader of the pipe may have ended on the same signal
                os.write(2, f"\n{name}: {action}; once more to leave at once\n".encode())
        if self._raises:
            self._raises = False  # not again while this one unwinds
            raise StoppedEarly(name)


# ---------------------------------------------------------------------------------------------------------------------
# Agreement of the ranks


class Agreement:
    """When to save by the clock and when to leave, decided by all ranks at the same step and without waiting.

    Every k-th step starts an asynchronous all-reduce of the flags on the side group; its result is read k steps later.
    k is the number of steps in a second, 1 to 20, by the slowest rank's step time in the same all-reduce, so it is the
    same on all ranks. A process alone looks at its flags at every step.

    Args:
        ranks: who has to agree.
        stop: this process's signals.
        deadline: when to leave, of ``time.monotonic()``.
        save_every: seconds between two checkpoints; None for none by the clock.
        saving: whether this rank's background save is still running.

    Attributes:
        save_due: whether it is time for a checkpoint, according to this step's result.
        all_saved: whether no rank's background save is running, according to this step's result.
    """

    max_steps = 20

    def __init__(
        self,
        ranks: Ranks,
        stop: StopRequest,
        deadline: float = math.inf,
        save_every: float | None = None,
        saving: Callable[[], bool] = lambda: False,
    ) -> None:
        self._ranks, self._stop, self._deadline = ranks, stop, deadline
        self._save_every, self._saving = save_every, saving
        self._interval, self._steps, self._looked_at = 1, 0, -math.inf
        self._result: Callable[[], list[float]] = lambda: [0.0, 0.0, 1.0, math.inf]
        self.saved()

    def saved(self) -> None:
        """A checkpoint was saved or begun. All ranks call it at the same step; requests made before it are void."""
        self._saved_at, self.save_due, self.all_saved = time.monotonic(), False, False
        result = self._result
        self._result = lambda: [result()[0], 0.0, 1.0, result()[3]]

    def must_leave(self) -> bool:
        """Called by all ranks before each step: whether a signal has come to one of them, or the time is over."""
        self.save_due = self.all_saved = False
        self._steps += 1
        if self._steps < self._interval:
            return False
        now = time.monotonic()
        leave = bool(self._stop.requested) or now >= self._deadline
        save = bool(self._save_every and now - self._saved_at >= self._save_every)
        pending = self._ranks.maximum(leave, save, self._saving(), (now - self._looked_at) / self._steps)
        self._looked_at, self._steps = now, 0
        if self._ranks.size == 1:
            leave, save, saving, _ = pending()
        else:
            leave, save, saving, seconds = self._result()
            self._result = pending
            self._interval = min(max(1, int(1 / max(seconds, 1e-9))), self.max_steps)
        self.save_due, self.all_saved = bool(save), not saving
        return bool(leave)


def leave_if_asked(ranks: Ranks, stop: StopRequest) -> None:
    """Between two stages of the set-up; every rank calls it.

    Raises:
        StoppedEarly: on all ranks, if a signal has come to any.
    """
    if name := any_signal(ranks, stop):
        raise StoppedEarly(name)


def any_signal(ranks: Ranks, stop: StopRequest) -> str | None:
    """The signal that came to this rank or another; every rank calls it, and waits for the others."""
    anywhere = ranks.any(bool(stop.requested))
    return stop.requested or ("a signal to another rank" if anywhere else None)


# ---------------------------------------------------------------------------------------------------------------------
# Lost and lagging ranks

_FAILED, _ENDED = "failed", "ended"
_WAITING = "waiting for other ranks"
_SILENT_BEATS = 6
"""Beats that a rank may miss."""
_NO_STORE = "the store of the process group does not answer, so lost ranks cannot be named"


class CollectiveError(RuntimeError):
    """A collective failed because a rank ended, hangs or cannot be reached; the message names it in one line.

    Attributes:
        speaks: whether this is the rank that prints it.
    """

    def __init__(self, message: str, speaks: bool = True) -> None:
        super().__init__(message)
        self.speaks = speaks


class RankState(NamedTuple):
    """What a rank publishes once a second: its step and phase, the seconds it has been there, and a counter."""

    step: int
    phase: str
    host: str
    seconds: float
    beat: int


class Finding(NamedTuple):
    """What the states of all ranks say."""

    text: str  # one line about the rank that all wait for
    named: list[int]  # that rank and others like it
    lost: list[int]  # ranks that failed or fell silent
    speaker: int  # the lowest of the other ranks, which prints


def find_lost(before: Sequence[RankState | None], after: Sequence[RankState | None]) -> Finding:
    """Whom all ranks wait for: one that failed, else one that is silent, else the one furthest behind.

    A rank is silent if its counter stood still between the readings: clocks of machines differ.

    Args:
        before, after: states of all ranks, read several beats apart; None for a rank that has never published.
    """
    failed = [rank for rank, state in enumerate(after) if state and state.phase.startswith(_FAILED)]
    silent = [
        rank
        for rank, (old, new) in enumerate(zip(before, after, strict=True))
        if new is None or (old and old.beat == new.beat and not new.phase.startswith((_FAILED, _ENDED)))
    ]
    lost = sorted({*failed, *silent})
    alive = {rank: state for rank, state in enumerate(after) if rank not in lost and state.phase != _ENDED}
    behind = min((_progress(state) for state in alive.values()), default=None)
    named = failed or silent or [rank for rank, state in alive.items() if _progress(state) == behind]
    if not lost and len(named) == len(alive):
        texts = {f"at step {state.step}, {state.phase}" for state in alive.values()}
        text = (f"all {len(alive)} ranks are " if len(after) > 1 else "") + " or ".join(sorted(texts))
        named = []
    else:
        text = _describe(named[0], after[named[0]], lost)
        text += f", and {len(named) - 1} more ranks like it" if len(named) > 1 else ""
        if others := [(state.step, state.phase) for rank, state in alive.items() if rank not in named]:
            (step, phase), _ = Counter(others).most_common(1)[0]
            text += f"; {'most of ' * (len(set(others)) > 1)}the other {len(others)} at step {step}, {phase}"
    return Finding(text, named, lost, min(alive, default=-1))


def _describe(rank: int, state: RankState | None, lost: Sequence[int]) -> str:
    if state is None:
        return f"rank {rank} has never been heard from"
    place = f"rank {rank} ({state.host})"
    if state.phase.startswith(_FAILED):
        return f"{place} at step {state.step} {state.phase}"
    if rank in lost:
        return f"{place} is not heard from any more, last at step {state.step}, {state.phase}"
    return f"{place} is at step {state.step}, {state.phase} for {state.seconds:.0f} s"


def _progress(state: RankState) -> tuple[int, bool]:
    """Of two ranks at the same step, the one with work of its own is behind the one that waits or computes with all."""
    return state.step, state.phase.startswith((_WAITING, "computing"))


class Watchdog:
    """One thread per rank that publishes what the rank is doing, and names the rank that all wait for.

    - After ``stall_seconds`` without progress, then after twice the time and so on, one rank prints who is furthest
      behind; that one, and the one that prints, show their stacks.
    - When a collective fails, :meth:`explaining` raises an error that names the lost rank. A process that has not ended
      ``unwind_seconds`` later is ended.
    - After a signal, a process that makes no progress because a rank is lost is ended. ``torchrun`` sends SIGTERM to
      the other ranks when one dies, so this covers the set-up, and collectives that no exception can reach.

    Args:
        rank, world_size: of this process.
        stall_seconds: less than the time-out of collectives.
        stop: whose signals to watch for.
        connect: opens the store of the ranks; None for torchrun's, if there is one. Only the thread uses it, since a
            client of a store whose host hangs blocks its caller.
        interval: seconds between two beats.
    """

    signal_seconds, unwind_seconds = 8.0, 20.0

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        stall_seconds: float = 300.0,
        stop: StopRequest | None = None,
        connect: Callable[[], Any] | None = None,
        interval: float = 1.0,
    ) -> None:
        self._rank, self._world_size, self._stall, self._stop = rank, world_size, stall_seconds, stop
        self._connect = connect or (_connect if world_size > 1 and "MASTER_ADDR" in os.environ else None)
        self._interval, self._host = min(interval, stall_seconds / 4), socket.gethostname()
        self._point: tuple[int, str] = (0, "starting")  # a new tuple is progress, even if it equals the last
        self._since, self._beat, self._store = time.monotonic(), 0, None
        self._broken_at, self._done = math.inf, False
        self._requests: SimpleQueue[tuple[Callable[[], Any], Future]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def at(self, phase: str, step: int | None = None) -> None:
        """A phase begins, at a step or the same as before. An assignment: it costs nothing in a step."""
        self._point = (self._point[0] if step is None else step, phase)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around what waits for other ranks; ignored in other threads than the main one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = self._point[1]
        self.at(f"{_WAITING} ({what})")
        yield
        self.at(before)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Replace the error of a broken collective by one that names the rank; publish any other error.

        Raises:
            CollectiveError: instead of errors of which :func:`is_broken` is true.
        """
        try:
            yield
        except BaseException as error:
            explained = isinstance(error, CollectiveError) or self._point[1].startswith(_FAILED)
            if explained or self._connect is None:
                raise
            if not is_broken(error):
                words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                self.at(f"{_FAILED} while {self._point[1]}: {words}")
                self._ask(self._publish, 2.0)
                raise
            _log.info("a collective failed", exc_info=error)
            self._broken_at = time.monotonic()
            found = self._ask(self._look, self.unwind_seconds)
            text, speaks = (found.text, found.speaker == self._rank) if found else (_NO_STORE, True)
            if found and not found.lost and self._store:
                text = f"all ranks answer, so it may be the network; {text}"
            raise CollectiveError(f"a collective failed: {text} ({reason_of(error)})", speaks) from error

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._point[1].startswith(_FAILED):
            self.at(_ENDED)  # so that the others do not take the silence that follows for a death
        self._done = True
        self._ask(self._publish, 2.0)

    def _ask(self, function: Callable[[], Any], seconds: float) -> Any:
        """What a function returns that the thread calls; None if it does not in time."""
        future: Future = Future()
        self._requests.put((function, future))
        with suppress(TimeoutError):
            return future.result(seconds)

    def _run(self) -> None:
        if self._connect:
            self._guarded(self._open)
        seen, reports, signalled = self._point, 0, False
        while not self._done or not self._requests.empty():
            now, point = time.monotonic(), self._point
            signalled = signalled or bool(self._stop and self._stop.arrived())
            if point is not seen:
                if reports:
                    self._say(f"goes on after {now - self._since:.0f} s, at step {point[0]}", self._rank == 0)
                seen, reports, self._since = point, 0, now
            self._publish()
            still = now - self._since
            if now - self._broken_at > 2 * self.unwind_seconds:
                self._end("the process does not end by itself")
            elif still >= self._stall * 2**reports:
                found = self._look()
                if self._point is not point:
                    continue
                reports += 1
                speaks = found.speaker == self._rank
                self._say(f"no progress for {still:.0f} s: {found.text}", speaks)
                if speaks or self._rank in found.named:
                    faulthandler.dump_traceback(2)
            elif signalled and still >= self.signal_seconds and self._broken_at == math.inf:
                found = self._look()
                if found.lost and self._point is point and self._broken_at == math.inf:
                    self._end(found.text if found.speaker == self._rank else None)
            with suppress(Empty):
                function, future = self._requests.get(timeout=self._interval)
                future.set_result(function())

    def _look(self) -> Finding:
        """Read the states twice; the second time once all have beaten, one has failed, or six beats are over."""
        before = after = self._read()
        for _ in range(_SILENT_BEATS):
            time.sleep(self._interval)
            self._publish()
            after = self._read()
            failed = any(state and state.phase.startswith(_FAILED) for state in after or ())
            if after is None or failed or not find_lost(before, after).lost:
                break
        if before and after:
            return find_lost(before, after)
        return Finding(f"at step {self._point[0]}, {self._point[1]}; {_NO_STORE}", [], [], self._rank)

    def _read(self) -> list[RankState | None] | None:
        def read() -> list[RankState | None]:
            keys = [str(rank) for rank in range(self._world_size)]
            if not self._store.check(keys):
                keys = [key for key in keys if self._store.check([key])]
            states = {int(k): RankState(*json.loads(v)) for k, v in zip(keys, self._store.multi_get(keys), strict=True)}
            return [states.get(rank) for rank in range(self._world_size)]

        if self._world_size == 1:
            return [self._state()]
        return self._guarded(read) if self._store else None

    def _state(self) -> RankState:
        return RankState(*self._point, self._host, time.monotonic() - self._since, self._beat)

    def _publish(self) -> None:
        self._beat += 1
        if self._store:
            self._guarded(lambda: self._store.set(str(self._rank), json.dumps(self._state())))

    def _open(self) -> None:
        from torch.distributed import PrefixStore

        store = self._connect()
        store.set_timeout(timedelta(seconds=5))
        # The store outlives the process group that torchrun restarts, and in tests also a run.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        run = store.add(f"fastmae/{restart}/{self._rank}", 1)
        self._store = PrefixStore(f"fastmae/{restart}/run-{run}", store)

    def _guarded(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except RuntimeError as error:  # DistStoreError, DistNetworkError
            self._store = None
            _log.info("%s: %s", _NO_STORE, error)
            return None

    def _say(self, text: str, speaks: bool = True) -> None:
        _log.info(text)
        if speaks:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def _end(self, text: str | None) -> None:
        """End the process at once: other threads or NCCL would hold it."""
        if text is None:
            time.sleep(self._interval)  # for the rank that prints
        else:
            print(f"fastmae: error: {text}", file=sys.stderr, flush=True)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(EXIT_ERROR)


def _connect() -> Any:
    """A client of torchrun's store of this thread's own, since one that waits keeps others from using it."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=30)  # of hundreds of ranks that connect at once most are kept waiting
    return TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)


_TRANSPORT = re.compile(
    r"\bgloo/(transport|rendezvous)/|Gloo connectFullMesh failed|Application timeout|NCCL communicator was aborted"
)
"""gloo raises plain RuntimeErrors that begin with the source file in which the connection broke."""


def is_broken(error: BaseException | None) -> bool:
    """Whether an error, or its cause, says that another rank could not be reached in time."""
    from torch.distributed import DistError

    from fastmae.train.ranks import CheckpointError, LostRankError

    while isinstance(error, RuntimeError | CheckpointError):
        if isinstance(error, CollectiveError | LostRankError | DistError):
            return True
        # "enforce fail" in the same files: ranks sent tensors of different sizes, which is a bug.
        if isinstance(error, RuntimeError) and _TRANSPORT.search(str(error)) and "enforce fail" not in str(error):
            return True
        error = error.__cause__
    return False


def reason_of(error: BaseException) -> str:
    """The transport's message in one line of at most 200 characters, without the place in its source."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return re.sub(r"^\[\S*\] ", "", text).partition(" This is typically caused")[0][:200]
