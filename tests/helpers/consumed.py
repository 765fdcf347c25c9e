"""What a run that was killed and resumed has consumed, sample by sample: each process writes it down as it goes."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from fastmae import data
from fastmae.data.sampler import permuted_ids

Sample = tuple[int, int]
"""Epoch and number of an image."""


class _Recorded:
    """A loader that writes down every batch it gives, whole lines at a time, so that a kill cuts none."""

    def __init__(self, loader: Any, file: int) -> None:
        self._loader, self._file = loader, file

    def __next__(self) -> Any:
        batch = next(self._loader)
        _write(self._file, list(zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True)))
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def record(folder: Path, attempt: int) -> AbstractContextManager[Any]:
    """A context in which this process's ``data.create_loader`` appends to a file of its rank in a folder.

    Args:
        attempt: the same number on all ranks, another one after each kill, and larger.
    """
    create = data.create_loader

    def recorded(*args: Any, position: int = 0, rank: int = 0, world_size: int = 1, **options: Any) -> _Recorded:
        file = os.open(folder / f"{rank}.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        _write(file, {"attempt": attempt, "position": position, "world_size": world_size})
        return _Recorded(create(*args, position=position, rank=rank, world_size=world_size, **options), file)

    folder.mkdir(parents=True, exist_ok=True)
    return patch.object(data, "create_loader", recorded)


@dataclass
class Attempt:
    """What the processes consumed between a start and the end or kill that came next."""

    first_step: int
    steps: dict[int, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    """Of all ranks together."""


def attempts(folder: Path, samples_per_step: int) -> list[Attempt]:
    """What was written down, start by start; one that was killed before any loader was there is not among them.

    Raises:
        AssertionError: if ranks began at different places.
    """
    found: dict[int, Attempt] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for entry in map(json.loads, path.read_text().splitlines()):
            if isinstance(entry, dict):
                first, rest = divmod(entry["position"], samples_per_step)
                attempt, count = found.setdefault(entry["attempt"], Attempt(first)), 0
                assert (attempt.first_step, rest) == (first, 0), f"{path}: begins at {entry}"
                own = samples_per_step // entry["world_size"]
                continue
            for sample in entry:
                attempt.steps[first + count // own].append(tuple(sample))
                count += 1
    return [found[number] for number in sorted(found)]


def check(found: list[Attempt], wanted: dict[int, set[Sample]], begins: list[int] | None = None) -> int:
    """Compare attempts with what each step has to consume; return the steps that were done again.

    Args:
        begins: where each attempt has to begin: at the checkpoint that was the newest.

    Raises:
        AssertionError: if a sample was lost, repeated after its step was saved, or came in another step.
    """
    assert begins is None or [attempt.first_step for attempt in found] == begins
    reached, again = 0, 0
    for attempt in found:
        assert attempt.first_step <= reached, f"steps {reached} to {attempt.first_step} were lost"
        again += reached - attempt.first_step
        reached = attempt.first_step
        for step in sorted(attempt.steps):
            assert step == reached, f"step {step} came where step {reached} was due"
            samples = attempt.steps[step]
            complete = len(samples) == len(wanted[step])
            assert complete or step == max(attempt.steps), f"step {step} is not whole"
            assert len(set(samples)) == len(samples), f"step {step} has a sample twice"
            assert set(samples) <= wanted[step], f"step {step}: {samples}, expected {sorted(wanted[step])}"
            reached = step + complete
    assert reached == len(wanted), f"ended after {reached} of {len(wanted)} steps"
    return again


def expected(steps: int, samples_per_step: int, num_samples: int, seed: int = 0) -> dict[int, set[Sample]]:
    """What each step of a run has to consume, from the samples' positions alone."""
    ids, epochs = permuted_ids(np.arange(steps * samples_per_step), num_samples, seed)
    samples = list(zip(epochs.tolist(), ids.tolist(), strict=True))
    return {step: set(samples[step * samples_per_step : (step + 1) * samples_per_step]) for step in range(steps)}


def _write(file: int, entry: Any) -> None:
    os.write(file, (json.dumps(entry) + "\n").encode())
