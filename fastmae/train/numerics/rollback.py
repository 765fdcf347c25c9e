"""Going back after a divergence: dump the batch it began with, take an earlier checkpoint, go on with later images."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from fastmae.data import Batch
from fastmae.data.plan import Plan
from fastmae.ops import Masking
from fastmae.train import model_state
from fastmae.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    LostRankError,
    list_checkpoints,
    open_checkpoint,
    set_aside_after,
)
from fastmae.train.checkpoint.format import discard, step_of
from fastmae.train.continuation import go_on_from, restore
from fastmae.train.feed import draw_masks
from fastmae.train.numerics.batch_dump import Dumped, largest_values, losses_by_mask, write_dump

if TYPE_CHECKING:
    from fastmae.train.loop import Trainer


def roll_back(trainer: Trainer) -> None:
    """Take a trainer whose ``divergence`` is due back to the newest sound checkpoint; every rank calls it.

    The images of the steps since that checkpoint are left out, those of the offending steps among them: on the same
    images the same weights would come to the same end. Later checkpoints are set aside (``step-N.abandoned``, until the
    next time), and rows of metrics after it are cut, as when a run is resumed. The learning rate follows the step.

    Nothing is saved: a run that ends before its next checkpoint goes on from the one that it went back to, comes to the
    same end, and goes back in the same way.

    Raises:
        FloatingPointError: on all ranks alike, if the run has gone back ``max_rollbacks`` times already, or no sound
            checkpoint is left.
        CheckpointError: on all ranks alike, if the run folder cannot be written.
    """
    divergence = trainer.divergence
    first, last = divergence.offending
    trainer.heartbeat.at(trainer.step, "dumping a batch")
    trainer.saves.wait()
    trainer.loader.close()
    dumped = dump(trainer, first)
    steps = f"steps {first} to {last}; all were skipped" if last > first else f"step {first}, which was skipped"
    found = f"no finite gradient in {steps}. "
    found += f"The first one's batch is in {dumped.folder}: {dumped.text}. " if dumped else ""
    record: dict[str, Any] = {"first_step": first, "last_step": last, "noticed_at_step": trainer.step}
    record["dump"] = str(dumped.folder) if dumped else None
    if divergence.rollbacks >= divergence.max_rollbacks:
        raise FloatingPointError(
            f"{found}The run has gone back {divergence.rollbacks} times, as often as --train.max-rollbacks allows. "
            f"To go on, --resume with a larger one and with {_remedies(trainer)}"
        )
    trainer.heartbeat.at(trainer.step, "going back")
    position, rollbacks = trainer.positions.after(last), divergence.rollbacks + 1
    saved = _go_to_newest_sound(trainer, divergence.newest_sound)
    if saved is None:
        raise FloatingPointError(
            f"{found}There is no sound checkpoint of an earlier step that the run has not gone back to already. "
            f"What may help: {_remedies(trainer)}, and checkpoints more often"
        )

    def begin_there() -> None:
        _set_aside(trainer, saved)
        go_on_from(trainer, saved)
        left_out = [trainer.samples, position - 1]
        trainer.positions.jump(trainer.step, position)
        divergence.went_back(trainer.step, rollbacks)
        trainer.bad_files.begin()
        trainer.run.add_rollback(
            record | {"to_step": trainer.step, "checkpoint": str(saved.path), "positions_left_out": left_out}
        )
        trainer.console.print(
            f"WENT BACK TO STEP {trainer.step} ({rollbacks} of at most {divergence.max_rollbacks} times): {found}"
            f"Images {left_out[0]:,} to {left_out[1]:,} of the run's order are left out"
        )
        trainer.loader = trainer.loader_at(trainer.samples)

    trainer.ranks.gather("going back", begin_there)
    trainer.reporter.go_back(trainer.step)


def dump(trainer: Trainer, step: int) -> Dumped | None:
    """Write the batch of a step to ``non_finite/step-N``; a failure is said and otherwise ignored, on all ranks."""
    low_precision = trainer.dtype != torch.float32

    def decode() -> list[tuple[Batch, Plan]]:
        with trainer.loader_at(trainer.positions.after(step - 1)) as loader:
            return [(next(loader), loader.plan(index)) for index in range(trainer.accumulation)]

    def forward(batch: Batch) -> tuple[Masking, torch.Tensor]:
        trainer.fit_input_size(batch)
        masking = draw_masks(batch, trainer.model, trainer.config)
        with (
            torch.compiler.set_stance("force_eager"),  # nothing is compiled for one pass
            trainer.model.cast_weights(trainer.dtype) if low_precision else nullcontext(),
            torch.autocast(trainer.device.type, trainer.dtype, enabled=low_precision),
        ):
            return masking, losses_by_mask(trainer.model, trainer.model.normalized(batch.images), masking)

    state = trainer.dataset, trainer.model, trainer.optimizer, trainer.ranks
    try:
        times = trainer.divergence.rollbacks + 1
        return write_dump(trainer.run.path, step, times, trainer.step, decode, forward, *state)
    except LostRankError:
        raise
    except CheckpointError as error:
        _warn(trainer, f"the batch of step {step} could not be dumped: {error}")
        return None


def _go_to_newest_sound(trainer: Trainer, newest: int) -> Checkpoint | None:
    """Load the newest checkpoint up to a step that is undamaged and finite; None if there is none."""
    folder, ranks = trainer.run.checkpoints, trainer.ranks
    for path in ranks.first("listing checkpoints", lambda: list_checkpoints(folder)):
        if step_of(path) > newest:
            continue
        try:
            saved = open_checkpoint(path, ranks=ranks)
            restore(trainer, saved)
        except LostRankError:  # which says nothing of the checkpoint
            raise
        except CheckpointError as error:
            _warn(trainer, f"damaged checkpoint passed over: {error}")
            continue
        largest = largest_values(model_state.collect(trainer.model, trainer.optimizer))
        if not ranks.any(any(not value < float("inf") for value in largest.values())):
            return saved
        _warn(trainer, f"{path}: passed over, its weights or moments are not all finite")
    return None


def _set_aside(trainer: Trainer, saved: Checkpoint) -> None:
    """Rename later checkpoints; those of the last time are deleted, since they are as large as any."""
    if trainer.ranks.rank == 0:
        for old in trainer.run.checkpoints.glob("step-*.abandoned"):
            discard(old)
        set_aside_after(trainer.run.checkpoints, step_of(saved.path), "abandoned")


def _remedies(trainer: Trainer) -> str:
    train = trainer.config.train
    clip = "--train.clip-grad 1.0" if train.clip_grad is None else "a lower --train.clip-grad"
    return f"a lower --train.base-lr, {clip}" + (" or --train.precision fp32" if train.precision != "fp32" else "")


def _warn(trainer: Trainer, text: str) -> None:
    if trainer.ranks.rank == 0:
        print(f"WARNING: {text}", file=sys.stderr, flush=True)
