"""Questions to all ranks before the first step: what would end a run hours later, or spoil it without a word."""

from __future__ import annotations

import platform
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fastmae
from fastmae.data import Dataset
from fastmae.train.config import PretrainConfig, to_json
from fastmae.train.disk_space import check_folder, crowded, required_space
from fastmae.train.parallel import Parallelism
from fastmae.train.ranks import Ranks

_PACKAGES = ("triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
_MAY_DIFFER = ("out", "data.path")
"""Settings that may differ: of the run folder it is rank 0's that counts, and of the images their hash is compared."""
_SHOWN = 3


class PreflightError(ValueError):
    """Ranks differ, cannot talk to each other, or cannot save; the message is one line that says what and where."""


def preflight(
    config: PretrainConfig,
    parallelism: Parallelism,
    ranks: Ranks,
    *,
    run: Path,
    dataset: Dataset,
    model: nn.Module,
    patience: float = 1800.0,
    timeout: float = 120.0,
) -> None:
    """Ask all ranks whether they can train together and save; every one of them calls it.

    A process alone is only asked whether it can save. Several are compared: versions of Python and of the libraries
    that decide about numbers and order, the configuration, length and hash of the data set; and they add up small
    numbers on the backend and over the groups that the training will use. That checkpoints which are kept for ever will
    not all fit is only a warning on the standard error, since they may be moved elsewhere meanwhile.

    Args:
        run: the run folder, which exists where rank 0 is.
        dataset: this rank's.
        model: gives the size of a checkpoint; on any device, "meta" included.
        patience: seconds to wait for the slowest rank, which may have had to list its images first.
        timeout: seconds that adding up may take.

    Raises:
        PreflightError: on every rank, naming ranks and their hosts; of the same words, once all ranks have come.
        CheckpointError: on the ranks that are left, if one ends meanwhile.
    """
    host = socket.gethostname()
    if ranks.size > 1:
        _meet(ranks, host, patience)
        answers = ranks.gather("comparing the ranks", lambda: (host, describe(config, dataset)))
        hosts = [host for host, _ in answers]
        _raise(differences([facts for _, facts in answers], hosts))
        failures = ranks.gather("adding up", lambda: _limited(lambda: _add_up(parallelism), timeout))
        _raise(_located(failures, hosts))
    else:
        hosts = [host]
    space = required_space(model, run / "checkpoints", config.train, len(dataset))
    name = ranks.first("looking at the run folder", lambda: f".preflight-{uuid.uuid4().hex}")
    mark = run / "checkpoints" / name
    try:
        ranks.gather("looking at the run folder", lambda: ranks.rank == 0 and _attempt(mark.touch))
        failures = ranks.gather("looking at the run folder", lambda: check_folder(mark, space, ranks.rank))
    finally:
        if ranks.rank == 0:
            with suppress(OSError):
                mark.unlink()
    _raise(_located(failures, hosts))
    if ranks.rank == 0 and (text := crowded(mark.parent, space)):
        print(f"WARNING: {text}", file=sys.stderr, flush=True)


def describe(config: PretrainConfig, dataset: Dataset) -> dict[str, str]:
    """What has to be the same on all ranks, by the name to give it in a message."""
    facts = {"fastmae": fastmae.__version__, "python": platform.python_version(), "torch": torch.__version__}
    facts |= {package: _version(package) for package in _PACKAGES}
    facts["data set"] = f"{len(dataset):,} images, hash {dataset.hash}"
    settings = {name: str(value) for name, value in _flat(to_json(config)).items() if name not in _MAY_DIFFER}
    return facts | {f"--{name.replace('_', '-')}": value for name, value in settings.items()}


def differences(facts: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """Where ranks differ from the most, in words.

    Args:
        facts: of each rank, from :func:`describe`.
        hosts: of each rank.
    """
    found = []
    for name in sorted(set().union(*facts)):
        seen = [own.get(name, "unknown") for own in facts]
        usual = max(seen, key=seen.count)
        odd = [f"{value} on {_place(rank, hosts)}" for rank, value in enumerate(seen) if value != usual]
        if odd:
            found.append(f"{name} is {_some(odd)}, but {usual} on the other {len(seen) - len(odd)}")
    return found


def _meet(ranks: Ranks, host: str, timeout: float) -> None:
    """Wait for all ranks; the first one's message names those that did not come."""
    try:
        dist.monitored_barrier(ranks.group, timedelta(seconds=timeout), wait_all_ranks=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise PreflightError(
            f"preflight: not all ranks came in {timeout:g} s (rank {ranks.rank} on {host}: {reason})"
        ) from error


def _add_up(parallelism: Parallelism) -> str | None:
    """All-reduce on the device and over the groups of the training; what is wrong, or None."""
    groups = [dist.group.WORLD]
    if parallelism.mesh is not None and parallelism.mesh.ndim > 1:
        groups += parallelism.mesh.get_all_groups()
    for group in groups:
        members = dist.get_process_group_ranks(group)
        # Of every rank another number, so that one that is missing or comes twice shows.
        values = torch.full((1024,), float(parallelism.rank + 1), device=parallelism.device)
        dist.all_reduce(values, group=group)
        expected, (low, high) = float(sum(members) + len(members)), values.aminmax()
        if not low.item() == high.item() == expected:
            backend = dist.get_backend(group)
            return f"all-reduce ({backend}): {low.item():g} to {high.item():g} instead of {expected:g}"
    return None


def _limited(function: Callable[[], str | None], timeout: float) -> str | None:
    """What a function returns, or that it failed or took too long: in a thread, since a collective that hangs may do so
    anywhere."""
    outcome: list[str | None] = []

    def run() -> None:
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(" ".join(f"all-reduce: {error}".split())[:300])

    thread = threading.Thread(target=run, name="preflight", daemon=True)
    thread.start()
    thread.join(timeout)
    return outcome[0] if outcome else f"all-reduce: not done after {timeout:g} s"


def _attempt(function: Callable[[], object]) -> None:
    with suppress(OSError):  # check_folder finds that it is not there, or cannot be written
        function()


def _raise(found: Sequence[str]) -> None:
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise PreflightError(f"preflight: {'; '.join(found[:_SHOWN])}{more}")


def _located(failures: Sequence[str | None], hosts: Sequence[str]) -> list[str]:
    return [f"{_place(rank, hosts)}: {text}" for rank, text in enumerate(failures) if text]


def _place(rank: int, hosts: Sequence[str]) -> str:
    return f"rank {rank} ({hosts[rank]})"


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
