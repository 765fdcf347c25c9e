"""How much room a run folder must have, and whether this process can write there."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fastmae.train.checkpoint import list_checkpoints
from fastmae.train.checkpoint.format import step_of
from fastmae.train.config import TrainConfig
from fastmae.train.optim import create_schedule

_NUMBERS_BYTES, _ADAM_MOMENTS = 4, 2


@dataclass(frozen=True)
class Space:
    """Free bytes that a run folder must have.

    Attributes:
        checkpoint: bytes of one checkpoint.
        count: checkpoints that are still to be written before old ones are deleted.
        weights: bytes of the weights that are exported at the end.
        kept_for_ever: checkpoints that are still to be written and never deleted, beside those.
    """

    checkpoint: int
    count: int
    weights: int
    kept_for_ever: int = 0

    @property
    def total(self) -> int:
        """Bytes of what has to be there at once, without what is kept for ever."""
        return self.checkpoint * self.count + self.weights


def required_space(model: nn.Module, checkpoints: Path, train: TrainConfig, num_samples: int) -> Space:
    """What a run is going to write: float32 weights, two moments of those that are trained, and the export.

    As many checkpoints as are kept and one more, since the oldest is deleted when the newest is there, less those that
    are there already; and those of ``keep_every_steps``.

    Args:
        model: on any device, "meta" included.
        checkpoints: the folder of those that are there.
        train: how long the run is, how often it saves and what it keeps.
        num_samples: images of the data set, which the length of a run may hang on.
    """
    there = list_checkpoints(checkpoints)
    later = _count_kept_for_ever(train, num_samples, max(map(step_of, there), default=0))
    for_ever = train.keep_every_steps
    deleted = sum(not (for_ever and step_of(path) and step_of(path) % for_ever == 0) for path in there)
    sizes = [(p.numel() * _NUMBERS_BYTES, p.requires_grad) for p in model.parameters()]
    weights = sum(size for size, _ in sizes)
    moments = sum(_ADAM_MOMENTS * size for size, trained in sizes if trained)
    return Space(weights + moments, max(train.keep_checkpoints + 1 - deleted, 1), weights, later)


def crowded(checkpoints: Path, space: Space) -> str | None:
    """That not all checkpoints which are kept for ever will fit beside the others; None if they will."""
    free = shutil.disk_usage(checkpoints).free
    if free >= space.total + space.checkpoint * space.kept_for_ever:
        return None
    return (
        f"{checkpoints}: {_gigabytes(free)} free, enough for {(free - space.total) // space.checkpoint} of the "
        f"{space.kept_for_ever} checkpoints of {_gigabytes(space.checkpoint)} that --train.keep-every-steps will keep "
        "for ever: move them elsewhere in time, or keep fewer"
    )


def check_folder(mark: Path, space: Space, rank: int) -> str | None:
    """What keeps this rank from saving beside ``mark``, a file that rank 0 made there; None if nothing does."""
    folder = mark.parent
    if not mark.exists():
        return f"{folder}: what rank 0 wrote is not there; expected a folder on a file system that all ranks share"
    own = mark.with_name(f"{mark.name}-{rank}")
    try:
        own.write_bytes(b"1")
        own.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{folder}: expected a folder that can be written, got {error}"
    if free < space.total:
        return (
            f"{folder}: {_gigabytes(free)} free, expected {_gigabytes(space.total)} for {space.count} checkpoints of "
            f"{_gigabytes(space.checkpoint)} and the weights; fewer with --train.keep-checkpoints"
        )
    return None


def _count_kept_for_ever(train: TrainConfig, num_samples: int, begun: int) -> int:
    """Checkpoints after step ``begun`` that are kept for ever, but those that are among the newest at the end.

    Where steps decide when to save. By the clock it is chance whether one is saved at such a step.
    """
    if train.keep_every_steps is None or train.checkpoint_every_steps is None:
        return 0
    between = math.lcm(train.keep_every_steps, train.checkpoint_every_steps)
    total = create_schedule(train, num_samples).total_steps
    old = total - train.keep_checkpoints * train.checkpoint_every_steps
    return max(old // between - begun // between, 0)


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB"
