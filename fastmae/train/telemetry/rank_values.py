"""What each rank measures of itself, brought together an interval at a time without one waiting for another."""

from __future__ import annotations

import logging
import math
import resource
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastmae.train.checkpoint import LostRankError, Ranks
from fastmae.train.liveness.collectives import reason_of
from fastmae.train.telemetry.block_timer import BlockTimer
from fastmae.train.telemetry.peak import peak_flops
from fastmae.train.telemetry.stragglers import Stragglers, summarize

logger = logging.getLogger(__name__)

SHOWN_RANKS = 16
"""Ranks up to which each one's values are in the rows, and each one logs every interval."""
MINUTE = 60.0
"""Seconds between two lines in a rank's log where there are more."""

NAMES = ("block_time", "data_time", "peak_memory_gib", "host_memory_gib")
_TIMES = ("block_time", "data_time")
_TIMED_STEPS = 8
"""Of an interval, at most."""


Shared = Callable[[], tuple[dict[str, Any], list[str]]]
"""Waits for all ranks; what a row says of them, and lines for the terminal."""


class RankValues:
    """The ranks' own times and memory, for the rows of metrics.

    Args:
        ranks: all of them; each makes one of these.
        device: of this rank.
        interval: steps between two rows.
        block: whose forward says how fast a rank computes; None for no such time, nor is there one of a rank alone.
        forwards: times that forward that the blocks like it take in a step, forward and backward.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        interval: int,
        block: nn.Module | None = None,
        forwards: float = 1.0,
    ) -> None:
        self._ranks, self._device, self._interval, self._block = ranks, device, interval, block
        self._forwards = forwards
        self._timer: BlockTimer | None = None
        self._logged_at = -math.inf

    @property
    def are_several(self) -> bool:
        """Whether there is more than one rank."""
        return self._ranks.size > 1

    def open(self, dtype: torch.dtype) -> float | None:
        """Begin, on all ranks together, before the first step; return what they can compute at best.

        Args:
            dtype: of the matrix products.

        Returns:
            FLOP/s of a large matrix product, the sum over the ranks; None if one could not measure it.
        """
        met = self._ranks.gather("measuring the devices", lambda: (_host(), peak_flops(self._device, dtype)))
        self._hosts = [host for host, _ in met]
        self._stragglers = Stragglers(self._hosts, self._forwards)
        if self._ranks.size > 1 and self._block is not None:
            self._timer = BlockTimer(self._block, self._device, math.ceil(self._interval / _TIMED_STEPS))
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)  # the measurement's
        peaks = [peak for _, peak in met]
        return None if None in peaks else math.fsum(peaks)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.close()

    def next_step(self) -> None:
        """A step is done."""
        if self._timer is not None:
            self._timer.next_step()

    def share(self, row: Mapping[str, Any]) -> Shared:
        """Send this rank's values of an interval on their way; each rank has to, with every row, and none waits.

        Args:
            row: has ``step``, ``step_time`` and ``data_time``.

        Returns:
            A function that waits until all ranks have done so, and returns what the row says of them (the largest
            memory, the longest wait for images, and of times the smallest, the median and the largest) and lines that
            name stragglers. It raises LostRankError if a rank has gone.
        """
        own = {"data_time": row["data_time"], "host_memory_gib": host_memory_gib()}
        if self._timer is not None:
            own["block_time"] = self._timer.take()
        if self._device.type == "cuda":
            own["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        self._log(row, own)
        if self._ranks.size == 1:
            return lambda: (own, [])
        gathered = _gather(self._ranks, [own.get(name, math.nan) for name in NAMES])
        return lambda: self._combine(row["step_time"], gathered())

    def _combine(self, step_time: float, gathered: list[list[float]]) -> tuple[dict[str, Any], list[str]]:
        values = {name: [one[index] for one in gathered] for index, name in enumerate(NAMES)}
        found: dict[str, Any] = {}
        for name in ("peak_memory_gib", "host_memory_gib"):
            if finite := [value for value in values[name] if math.isfinite(value)]:
                found[name] = max(finite)
        for name in _TIMES:
            found |= summarize(name, values[name], self._hosts)
        # The others wait for the one that waits longest.
        found["data_time"] = max(values["data_time"])
        found["data_share"] = found["data_time"] / step_time
        if self._ranks.size <= SHOWN_RANKS:
            found["ranks"] = {name: [_or_none(value) for value in values[name]] for name in _TIMES}
        lines = self._stragglers.look(values["block_time"], values["data_time"], step_time)
        for line in lines:
            if self._ranks.rank == 0 or line.startswith(f"rank {self._ranks.rank} "):
                logger.info(line)
        return found, lines

    def _log(self, row: Mapping[str, Any], own: Mapping[str, float]) -> None:
        now = time.monotonic()
        if self._ranks.size > SHOWN_RANKS and now - self._logged_at < MINUTE:
            return
        self._logged_at = now
        text = f"step {row['step']}: {1e3 * row['step_time']:.1f} ms a step, {1e3 * own['data_time']:.1f} ms for images"
        if math.isfinite(own.get("block_time", math.nan)):
            text += f", {1e3 * own['block_time']:.2f} ms a block"
        if "peak_memory_gib" in own:
            text += f", {own['peak_memory_gib']:.2f} GiB of device memory at most"
        logger.info("%s, %.2f GiB of host memory at most", text, own["host_memory_gib"])


def host_memory_gib() -> float:
    """The most memory that this process has held at once (resident set size), in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _gather(ranks: Ranks, values: list[float]) -> Callable[[], list[list[float]]]:
    """Begin to send a few numbers to all ranks; the result waits for those of all, in the order of ranks."""
    own = torch.tensor(values, dtype=torch.float64)
    gathered = [torch.empty_like(own) for _ in range(ranks.size)]
    work = dist.all_gather(gathered, own, ranks.group, async_op=True)

    def wait() -> list[list[float]]:
        try:
            work.wait()
        except RuntimeError as error:  # gloo: a connection was closed, or the time is over
            raise LostRankError(
                f"collecting times: a rank has ended or does not answer ({reason_of(error)})"
            ) from error
        return torch.stack(gathered).tolist()

    return wait


def _host() -> str:
    return socket.gethostname()


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
