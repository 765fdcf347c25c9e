"""Signals, what the ranks agree on between steps, and a watchdog that names the rank that all others wait for.

PyTorch is imported only where it is needed: signals are handled while its import runs, which takes seconds.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from fastmae.train.ranks import Ranks

EXIT_ERROR, EXIT_PREEMPTED = 2, 75
"""Exit codes: an error that the user can fix, such as a lost rank; and EX_TEMPFAIL of sysexits.h for a run that saved
and left on a signal."""

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

    Args:
        quiet: print nothing, because another process of the job does.
        process_ends: the process ends after this context, and ignores signals from then on, so that a repeated one does
            not kill it while it shuts down. Otherwise, as in a notebook, the previous handlers come back, and a second
            SIGINT raises KeyboardInterrupt.
    """

    repeats: ClassVar = {signal.SIGINT: 1.0, signal.SIGTERM: 15.0}

    def __init__(self, quiet: bool = False, process_ends: bool = False) -> None:
        self._quiet, self._process_ends = quiet, process_ends
        self.requested: str | None = None  # name of the first signal
        self._first: tuple[int, float] | None = None  # of SIGINT and SIGTERM: number and time
        self._raises, self._restore, self._woken = False, ExitStack(), None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            # Python calls handlers once the main thread leaves C++, which a hung collective never does. It writes the
            # signal's number to this socket at once, and the watchdog reads it.
            self._woken, wake = (self._restore.enter_context(end) for end in socket.socketpair())
            self._woken.setblocking(False)
            wake.setblocking(False)
            previous = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
            self._restore.callback(signal.set_wakeup_fd, previous)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                previous = signal.signal(number, self._handle)
                self._restore.callback(signal.signal, number, signal.SIG_IGN if self._process_ends else previous)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore.close()

    def arrived(self) -> bool:
        """Whether a signal has arrived since the last call, even if the main thread could not handle it yet."""
        with suppress(OSError):  # there is nothing to read, or the context was left
            return self._woken is not None and bool(self._woken.recv(64))
        return False

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Context in which a signal, also one that came before, raises :class:`StoppedEarly` at once."""
        if self.requested:
            raise StoppedEarly(self.requested)
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGUSR1:
            if self.requested:
                return
        elif self._first is None:
            self._first = number, now
        else:
            first, at = self._first
            if number == first and now - at < self.repeats[number]:
                return
            if number == signal.SIGINT and not self._process_ends:
                raise KeyboardInterrupt
            os._exit(128 + number)
        name = signal.Signals(number).name
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

_ELSEWHERE = "a signal to another rank"


class Agreement:
    """When to save by the clock and when to leave, decided by all ranks at the same step and without waiting.

    Every k-th step starts an asynchronous all-reduce of the flags on the side group; its result is read k steps later.
    k is the number of steps per second of the slowest rank, 1 to 20, from the same all-reduce, hence equal on all
    ranks. A single process looks at its flags at every step.

    Args:
        deadline: when to leave, of ``time.monotonic()``.
        save_every: seconds between two checkpoints; None for none by the clock.
        saving: whether this rank's background save is still running.
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
        self._save_every, self._saving = save_every or math.inf, saving
        self._interval, self._steps, self._looked_at = 1, 0, -math.inf
        self._pending: Callable[[], list[float]] = lambda: [0.0, 0.0, 0.0, 0.0, math.inf]
        self.signal: str | None = None  # for which all ranks leave
        self.saved()

    def saved(self) -> None:
        """A checkpoint was saved or begun. All ranks call it at the same step; requests made before it are void."""
        self._saved_at, self._void = time.monotonic(), True
        self.save_due = self.all_saved = False  # of this step: time for a checkpoint; nobody's save is running

    def must_leave(self) -> bool:
        """Called by all ranks before each step: whether a signal has come to one of them, or the time is over."""
        self.save_due = self.all_saved = False
        self._steps += 1
        if self._steps < self._interval:
            return False
        now = time.monotonic()
        flags = bool(self._stop.requested), now >= self._deadline, now - self._saved_at >= self._save_every
        asked = self._ranks.maximum(*flags, self._saving(), (now - self._looked_at) / self._steps)
        self._looked_at, self._steps = now, 0
        if self._ranks.size == 1:
            signalled, over, save, saving, _ = asked()
        else:
            signalled, over, save, saving, seconds = self._pending()
            save, saving = save and not self._void, saving or self._void
            self._interval = min(max(1, int(1 / max(seconds, 1e-9))), self.max_steps)
        self._pending, self._void = asked, False
        self.save_due, self.all_saved = bool(save), not saving
        if signalled:
            self.signal = self._stop.requested or _ELSEWHERE
        return bool(signalled or over)


def leave_if_asked(ranks: Ranks, stop: StopRequest) -> None:
    """Raise :class:`StoppedEarly` on all ranks if a signal has come to any; every rank calls it."""
    if ranks.any(bool(stop.requested)):
        raise StoppedEarly(stop.requested or _ELSEWHERE)


# ---------------------------------------------------------------------------------------------------------------------
# Lost and lagging ranks

_FAILED, _ENDED, _WAITING = "failed", "ended", "waiting for other ranks"
_SILENT_BEATS = 6  # beats that a rank may miss
_NO_STORE = "the store of the process group does not answer, so lost ranks cannot be named"
_TRANSPORT = re.compile(
    r"(?s)(?!.*enforce fail).*(\bgloo/(transport|rendezvous)/|Gloo connectFullMesh failed|Application timeout|"
    r"NCCL communicator was aborted)"
)
"""gloo raises plain RuntimeErrors that begin with the source file in which the connection broke. With "enforce fail"
ranks sent tensors of different sizes, which is a bug."""


def is_broken(error: BaseException | None) -> bool:
    """Whether an error, or its cause, says that another rank could not be reached in time."""
    from torch.distributed import DistError

    from fastmae.train.ranks import CheckpointError, LostRankError

    if isinstance(error, LostRankError | DistError):
        return True
    if isinstance(error, RuntimeError) and _TRANSPORT.match(str(error)):
        return True
    return isinstance(error, RuntimeError | CheckpointError) and is_broken(error.__cause__)


class RankState(NamedTuple):
    """What a rank publishes once per second."""

    step: int
    phase: str
    host: str
    seconds: float  # since this step and phase began
    beat: int  # counts

    @property
    def progress(self) -> tuple[int, bool]:
        """For comparison: at the same step, a rank with work of its own is behind those that wait or compute."""
        return self.step, self.phase.startswith((_WAITING, "computing"))


class Finding(NamedTuple):
    """What the states of all ranks say."""

    text: str  # one line about the rank that all wait for
    rank: int  # that rank
    lost: bool  # whether it failed or fell silent
    speaker: int  # the lowest rank that is not lost, which prints


def find_lost(before: Sequence[RankState | None], after: Sequence[RankState | None]) -> Finding:
    """Whom all ranks wait for: one that failed, else one that is silent, else the one furthest behind.

    A rank is silent if its counter stood still between two readings of all states (clocks of machines differ), or if it
    has never published (None).
    """
    pairs = list(enumerate(zip(before, after, strict=True)))
    failed = [rank for rank, (_, new) in pairs if new and new.phase.startswith(_FAILED)]
    still = [rank for rank, (old, new) in pairs if not new or (old and old.beat == new.beat and new.phase != _ENDED)]
    silent = [rank for rank in still if rank not in failed]
    alive = {r: new for r, (_, new) in pairs if r not in failed and r not in silent and new.phase != _ENDED}
    behind = min((state.progress for state in alive.values()), default=None)
    named = failed or silent or [rank for rank, state in alive.items() if state.progress == behind] or [0]
    text, state = f"rank {named[0]}", after[named[0]]
    if state is None:
        text += " has never been heard from"
    elif failed:
        text += f" ({state.host}) at step {state.step} {state.phase}"
    elif silent:
        text += f" ({state.host}) is not heard from any more, last at step {state.step}, {state.phase}"
    else:
        text += f" ({state.host}) is at step {state.step}, {state.phase} for {state.seconds:.0f} s"
    text += f", and {len(named) - 1} more ranks like it" if len(named) > 1 else ""
    if others := Counter((state.step, state.phase) for rank, state in alive.items() if rank not in named):
        (step, phase), _ = others.most_common(1)[0]
        text += f"; {'most of ' * (len(others) > 1)}the other {others.total()} at step {step}, {phase}"
    return Finding(text, named[0], bool(failed or silent), min(alive, default=-1))


class Watchdog:
    """One thread per rank that publishes what the rank is doing, and names the rank that all wait for.

    - After ``stall_seconds`` without progress, then after twice the time and so on, one rank prints who is furthest
      behind; it and that one print their stacks.
    - When a collective fails (:meth:`explaining`), one rank prints which rank is lost, and the process is ended.
    - So is, after a signal, one that makes no progress because a rank is lost. ``torchrun`` sends SIGTERM to the other
      ranks when one dies, so this covers collectives that hang instead of failing.

    The ranks exchange their states through the store of the process group. Only the thread uses it, since a client of a
    store whose host hangs blocks its caller.

    Args:
        stall_seconds: less than the time-out of collectives.
        stop: whose signals to watch for.
    """

    interval, signal_seconds = 1.0, 8.0  # interval: between two beats

    def __init__(
        self, rank: int = 0, world_size: int = 1, stall_seconds: float = 300.0, stop: StopRequest | None = None
    ) -> None:
        self._rank, self._world_size, self._stall, self._stop = rank, world_size, stall_seconds, stop
        self._interval, self._host = min(self.interval, stall_seconds / 4), socket.gethostname()
        self._point: tuple[int, str] = (0, "starting")  # a new tuple is progress, even if it equals the last
        self._since, self._beat = time.monotonic(), 0
        self._has_store, self._store = world_size > 1 and "MASTER_ADDR" in os.environ, None
        self._broken, self._left = "", False  # the error of a collective that failed; whether the context was left
        self._wake = threading.Event()
        self._on_lost: Callable[[str], object] = lambda text: None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def at(self, phase: str, step: int | None = None) -> None:
        """A phase begins, at a step or the same as before. An assignment: it costs nothing in a step."""
        self._point = (self._point[0] if step is None else step, phase)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around what waits for other ranks; ignored in other threads than the main one."""
        main = threading.current_thread() is threading.main_thread()
        before = self._point[1]
        if main:
            self.at(f"{_WAITING} ({what})")
        yield
        if main:
            self.at(before)

    @contextmanager
    def explaining(self, on_lost: Callable[[str], object] | None = None) -> Iterator[None]:
        """Context whose errors are published, and in which a broken collective (:func:`is_broken`) ends the process.

        Args:
            on_lost: called from now on, in another thread, before the watchdog ends the process, with what it prints.
        """
        self._on_lost = on_lost or self._on_lost
        try:
            yield
        except BaseException as error:
            if self._has_store and not self._broken and not self._point[1].startswith(_FAILED):
                if is_broken(error):
                    _log.info("a collective failed", exc_info=error)
                    self._broken = _one_line(_root(error))
                else:
                    self.at(f"{_FAILED} while {self._point[1]}: {type(error).__name__}: {_one_line(error)}")
                self._wake.set()
                if self._broken:
                    self._thread.join(20.0)  # which ends the process, unless the store's host hangs
            raise

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._point[1].startswith(_FAILED):
            self.at(_ENDED)  # so that the others do not take the silence that follows for a death
        self._left = True
        self._wake.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        if self._has_store:
            self._guarded(self._open)
        seen, signalled = None, False
        while not self._left:
            if self._point is not seen:
                seen, due, readings, self._since = self._point, self._stall, [], time.monotonic()
            self._publish()
            signalled = signalled or bool(self._stop and self._stop.arrived())
            broken, still = self._broken, time.monotonic() - self._since
            hangs = signalled and still >= self.signal_seconds
            if broken or hangs or still >= due:
                readings.append(self._guarded(self._read))
                found = self._judge(readings)
                if found and broken:
                    answer = self._store is not None and not found.lost
                    network = "all ranks answer, so it may be the network; " if answer else ""
                    self._end(found, f"a collective failed: {network}{found.text} ({broken})")
                elif found and hangs and found.lost:
                    self._end(found, found.text)
                elif found and still >= due:
                    due *= 2
                    self._report(found, f"no progress for {still:.0f} s: {found.text}")
                readings = [] if found else readings
            self._wake.wait(self._interval)
            self._wake.clear()
        self._publish()

    def _judge(self, readings: Sequence[list[RankState | None] | None]) -> Finding | None:
        """What readings of the states, a beat apart, say; None as long as a rank may only be late."""
        before, after = readings[0], readings[-1]
        if not before or not after:
            return Finding(f"at step {self._point[0]}, {self._point[1]}; {_NO_STORE}", -1, False, self._rank)
        found = find_lost(before, after)
        silent = found.lost and not any(state and state.phase.startswith(_FAILED) for state in after)
        return found if len(readings) > (_SILENT_BEATS if silent else 1) else None

    def _report(self, found: Finding, text: str) -> None:
        _log.info(text)
        if found.speaker == self._rank:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
        if self._rank in (found.speaker, found.rank):
            faulthandler.dump_traceback(2)

    def _end(self, found: Finding, text: str) -> None:
        """End the process at once: the main thread may hang in a collective, other threads or NCCL would hold it."""
        with suppress(OSError, ValueError):  # nobody reads what is printed
            if found.speaker == self._rank:
                print(f"fastmae: error: {text}", file=sys.stderr, flush=True)
            else:
                time.sleep(self._interval)  # for the rank that prints
            sys.stdout.flush()
        noting = threading.Thread(target=self._on_lost, args=(text,), daemon=True)
        noting.start()
        noting.join(5.0)  # its disk may hang
        os._exit(EXIT_ERROR)

    def _read(self) -> list[RankState | None] | None:
        if self._store is None:
            return [self._state()] if self._world_size == 1 else None
        keys = [str(rank) for rank in range(self._world_size)]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        states = {int(k): RankState(*json.loads(v)) for k, v in zip(keys, self._store.multi_get(keys), strict=True)}
        return [states.get(rank) for rank in range(self._world_size)]

    def _state(self) -> RankState:
        return RankState(*self._point, self._host, time.monotonic() - self._since, self._beat)

    def _publish(self) -> None:
        self._beat += 1
        if self._store is not None:
            self._guarded(lambda: self._store.set(str(self._rank), json.dumps(self._state())))

    def _open(self) -> None:
        from torch.distributed import PrefixStore, TCPStore

        # A client of its own, since one that waits keeps others from using it. The limit: of hundreds of ranks that
        # connect at once most are kept waiting.
        address, port, limit = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=30)
        store = TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
        store.set_timeout(timedelta(seconds=5))
        # The store outlives the processes, which torchrun restarts, and a process may train more than once.
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


def _root(error: BaseException) -> BaseException:
    return _root(error.__cause__) if error.__cause__ else error


def _one_line(error: BaseException) -> str:
    """At most 200 characters of an error, without the place in gloo's source."""
    return re.sub(r"^\[\S*\] ", "", " ".join(str(error).split())).partition(" This is typically caused")[0][:200]
