"""Checks on all ranks before step 1, for what would otherwise end a run hours later or silently spoil it."""

from __future__ import annotations

import platform
import secrets
import shutil
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import fastmae
from fastmae.data import Dataset
from fastmae.train.checkpoint import list_checkpoints, step_of
from fastmae.train.config import PretrainConfig, TrainConfig, flatten, to_json
from fastmae.train.parallel import Parallelism
from fastmae.train.ranks import Ranks

PATIENCE, TIMEOUT = 1800.0, 120.0
"""Seconds to wait for the slowest rank, and that the collectives may take."""
_PACKAGES = ("triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
_SHOWN = 3


class PreflightError(ValueError):
    """Ranks differ, cannot communicate, or cannot save; the message is one line that names ranks and hosts."""


def preflight(
    config: PretrainConfig, parallelism: Parallelism, ranks: Ranks, *, run: Path, dataset: Dataset, model: nn.Module
) -> None:
    """Check that all ranks can train together and save; every rank calls it.

    Several ranks must have the same versions, configuration and data set, and their collectives must add up, on the
    device and over every group of the mesh. Each must be able to write to the run folder, with room for checkpoints.

    Args:
        run: the run folder, which exists where rank 0 is.
        dataset: this rank's.
        model: gives the size of a checkpoint; on any device, "meta" included.

    Raises:
        PreflightError: the same on every rank that has come.
        CheckpointError: on the remaining ranks, if one ends meanwhile.
    """
    host, several = socket.gethostname(), ranks.size > 1
    if several:
        try:
            dist.monitored_barrier(ranks.group, timedelta(seconds=PATIENCE), wait_all_ranks=True)
        except RuntimeError as error:
            text = f"not all ranks came in {PATIENCE:g} s (rank {ranks.rank} on {host}: {_one_line(error)})"
            raise PreflightError(f"preflight: {text}") from error
    answers = ranks.gather("comparing the ranks", lambda: (host, _facts(config, dataset)))
    hosts, facts = zip(*answers, strict=True)
    _raise(differences(facts, hosts))

    def make_mark() -> str:
        with suppress(OSError):  # check_folder reports it
            (folder / name).touch()
        return name

    folder, name = run / "checkpoints", f".preflight-{secrets.token_hex(8)}"
    space = required_bytes(model, folder, config.train)
    mark = folder / ranks.first("checking the run folder", make_mark)
    try:
        failures = ranks.gather(
            "checking collectives and run folder",
            lambda: (several and _limited(lambda: _add_up(parallelism))) or check_folder(mark, space, ranks.rank),
        )
    finally:
        if ranks.rank == 0:
            with suppress(OSError):
                mark.unlink()
    _raise([f"rank {rank} ({hosts[rank]}): {text}" for rank, text in enumerate(failures) if text])


def _facts(config: PretrainConfig, dataset: Dataset) -> dict[str, str]:
    """What must be the same on all ranks."""
    # Rank 0's run folder and index count, and images are compared by hash.
    settings = {n: v for n, v in flatten(to_json(config)).items() if n not in ("out", "data.path", "data.index")}
    facts = {"fastmae": fastmae.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["data set"] = f"{len(dataset):,} images, hash {dataset.hash}"
    return facts | {f"--{name}".replace("_", "-"): str(value) for name, value in settings.items()}


def differences(facts: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """Where ranks differ from the majority, one text per fact; facts and hosts are indexed by rank."""
    found = []
    for name in sorted(set().union(*facts)):
        seen = [own.get(name, "unknown") for own in facts]
        usual = max(seen, key=seen.count)
        odd = [f"{value} on rank {rank} ({hosts[rank]})" for rank, value in enumerate(seen) if value != usual]
        if odd:
            more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
            others = f"but {usual} on the other {len(seen) - len(odd)}"
            found.append(f"{name} is {', '.join(odd[:_SHOWN])}{more}, {others}")
    return found


def required_bytes(model: nn.Module, checkpoints: Path, train: TrainConfig) -> int:
    """Free bytes that a run needs: float32 weights and two moments per checkpoint, and the weights exported at the end.

    The oldest checkpoint is deleted once the newest is written, so one more exists at a time than is kept. Those that
    are there already need no more room, unless ``keep_every_steps`` keeps them beside the others.
    """
    saved, forever = [step_of(path) for path in list_checkpoints(checkpoints)], train.keep_every_steps
    replaced = sum(not (forever and step and step % forever == 0) for step in saved)
    weights = sum(4 * p.numel() for p in model.parameters())
    checkpoint = weights + sum(8 * p.numel() for p in model.parameters() if p.requires_grad)
    return checkpoint * max(train.keep_checkpoints + 1 - replaced, 1) + weights


def check_folder(mark: Path, space: int, rank: int) -> str | None:
    """Why this rank cannot save beside ``mark``, a file that rank 0 made; None if it can."""
    folder, own = mark.parent, mark.with_name(f"{mark.name}-{rank}")
    if not mark.exists():
        return f"{folder}: the file that rank 0 wrote is not there; expected a folder on a shared file system"
    try:
        own.write_bytes(b"1")
        own.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{folder}: expected a folder that can be written, got {error}"
    if free < space:
        needed = f"expected {space / 1e9:.3g} GB for checkpoints and weights"
        return f"{folder}: {free / 1e9:.3g} GB free, {needed}; --train.keep-checkpoints keeps fewer"
    return None


def _add_up(parallelism: Parallelism) -> str | None:
    """All-reduce on the device over every group of the training; what is wrong, or None."""
    groups = [dist.group.WORLD]
    if parallelism.mesh is not None and parallelism.mesh.ndim > 1:
        groups += parallelism.mesh.get_all_groups()
    for group in groups:
        # Each rank adds another number, so that one that is missing or counted twice shows.
        values = torch.full((1024,), float(parallelism.rank + 1), device=parallelism.device)
        dist.all_reduce(values, group=group)
        expected = float(sum(rank + 1 for rank in dist.get_process_group_ranks(group)))
        low, high = (value.item() for value in values.aminmax())
        if not low == high == expected:
            return f"all-reduce ({dist.get_backend(group)}): {low:g} to {high:g} instead of {expected:g}"
    return None


def _limited(function: Callable[[], str | None]) -> str | None:
    """The function's result, or that it failed or took too long. In a thread, since a collective may hang anywhere."""
    outcome = []

    def run() -> None:
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(f"all-reduce: {_one_line(error)}")

    thread = threading.Thread(target=run, name="preflight", daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return outcome[0] if outcome else f"all-reduce: not done after {TIMEOUT:g} s"


def _raise(found: Sequence[str]) -> None:
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise PreflightError(f"preflight: {'; '.join(found[:_SHOWN])}{more}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
