"""``logs/rank-N.log``: what each process of a run did, saw and died of; the console shows the first one's alone."""

from __future__ import annotations

import faulthandler
import logging
import os
import platform
import socket
import sys
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

import torch

import fastmae

FOLDER = "logs"
"""Of a run folder."""

_APART = ("torch", "torch.distributed")
"""Loggers that may pass nothing on to the root one."""


class RankLog:
    """A process's log file while a run lasts: use as a context manager, on every rank.

    It gets a line when the run begins and when it ends, with the traceback of an error; what fastmae logs, and warnings
    of other libraries, by ``logging`` and by ``warnings``; and the stack of a crash below Python, unless
    ``faulthandler`` is on already and writes elsewhere. All of it goes where else it went as well, except that what
    comes by ``warnings`` is shown by rank 0 alone: every rank has the same. A resumed run appends. A file that cannot
    be written is said once on the standard error, and the run goes on without.

    Args:
        run: the run folder, which exists.
        rank, world_size: of this process, and how many there are.
        device: that it trains on.
    """

    def __init__(self, run: Path, rank: int = 0, world_size: int = 1, device: torch.device | None = None) -> None:
        self.path = run / FOLDER / f"rank-{rank}.log"
        self._rank, self._world_size, self._device = rank, world_size, device
        self._file: TextIO | None = None

    def __enter__(self) -> RankLog:
        try:
            self.path.parent.mkdir(exist_ok=True)
            self._file = self.path.open("a", errors="backslashreplace")
        except OSError as error:
            print(f"WARNING: no log file for rank {self._rank}: {error}", file=sys.stderr)
            return self
        self._handler = _Handler(self._file)
        self._loggers = [logging.getLogger()]
        self._loggers += [logger for logger in map(logging.getLogger, _APART) if not logger.propagate]
        for logger in self._loggers:
            logger.addHandler(self._handler)
        ours = logging.getLogger("fastmae")
        self._level = ours.level
        ours.setLevel(min(ours.getEffectiveLevel(), logging.INFO))
        self._show, warnings.showwarning = warnings.showwarning, self._show_warning
        self._has_faults = not faulthandler.is_enabled()
        if self._has_faults:
            faulthandler.enable(self._file)
        self._handler.say(f"begins: {self._circumstances()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        if error is None:
            self._handler.say("ends")
        else:
            self._handler.say("ends by an error:\n" + "".join(traceback.format_exception(error)).rstrip())
        if self._has_faults:
            faulthandler.disable()
        warnings.showwarning = self._show
        logging.getLogger("fastmae").setLevel(self._level)
        for logger in self._loggers:
            logger.removeHandler(self._handler)
        self._handler.close()
        with suppress(OSError):  # what was left to write did not fit on the disk
            self._file.close()

    def _show_warning(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object
    ) -> None:
        self._handler.say(f"{category.__name__} ({filename}:{lineno}): {message}")
        if self._rank == 0:
            self._show(message, category, filename, lineno, *rest)

    def _circumstances(self) -> str:
        device = str(self._device or "no device")
        if self._device is not None and self._device.type == "cuda":
            device += f" ({torch.cuda.get_device_name(self._device)})"
        return (
            f"rank {self._rank} of {self._world_size}, process {os.getpid()} on {socket.gethostname()}, {device}; "
            f"fastmae {fastmae.__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
            f"{' '.join(sys.argv)}"
        )


class _Handler(logging.Handler):
    """Records of fastmae, and warnings of anybody, as lines of a file; never an error."""

    def __init__(self, file: TextIO) -> None:
        super().__init__()
        self._file = file

    def say(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a full disk, or a thread that outlives the run
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._file.flush()

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.partition(".")[0] == "fastmae"
        if ours or record.levelno >= logging.WARNING:
            level = "" if record.levelno == logging.INFO else f"{record.levelname} "
            self.say(f"{level}{self.format(record)}")
        # logging shows a warning that no handler takes on the standard error, and does not once this one does.
        last = logging.lastResort
        if last is not None and record.levelno >= last.level and not self._has_others(record.name):
            last.handle(record)

    def _has_others(self, name: str) -> bool:
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False
