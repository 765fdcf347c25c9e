"""Steps without a finite gradient: skipped on the device, and after too many in a row the run goes back.

A skipped step leaves weights and moments as they are, so many in a row mean that the same weights fail on batch after
batch, and more batches will not help. Older weights on other images may: Chowdhery et al., "PaLM" (arXiv 2204.02311,
section 5.1), restart from a checkpoint before the trouble and leave out the batches around it. :class:`Guard` decides
when and how far, :class:`SamplePositions` leaves the images out, and ``Trainer.roll_back`` does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastmae.data.sampler import Order
from fastmae.train.config import TrainConfig

NAMED = 32  # samples in a message; metrics.jsonl has all


class LossScale:
    """The factor that keeps small fp16 gradients from rounding to zero: an overflow halves it, good steps double it.

    As ``torch.amp.GradScaler`` with its defaults, but an overflow is read off the global gradient norm, which is
    computed anyway and equal on all ranks. GradScaler reads all gradients once more and needs a collective for shards.
    """

    def __init__(self, device: torch.device, initial: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.value = torch.tensor(initial, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self._growth_interval = growth_interval

    def update(self, skipped: Tensor) -> None:
        """Follow a step: 1.0 for an overflow, 0.0 for none. In place and on the device, as a CUDA graph needs it."""
        torch._amp_update_scale_(self.value, self._good_steps, skipped, 2.0, 0.5, self._growth_interval)

    def state_dict(self) -> dict[str, Tensor]:
        return {"value_and_good_steps": torch.stack([self.value, self._good_steps.float()])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`; a checkpoint of another precision has none, and the scale starts anew."""
        if "value_and_good_steps" in state:
            for own, saved in zip((self.value, self._good_steps), state["value_and_good_steps"], strict=True):
                own.copy_(saved)


@torch.no_grad()
def global_grad_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients over all shards: a float32 scalar on the device, the same on every rank.

    A collective of one number if gradients are sharded (then all of them are), none otherwise.
    """
    norm, first = torch.nn.utils.get_total_norm([_local(g) for g in gradients]), gradients[0]
    if not isinstance(first, DTensor):
        return norm
    # Not DTensor's own reduction: its functional collectives now and then crash with gloo (torch 2.14).
    square = norm.square()
    for dim, placement in enumerate(first.placements):
        if placement.is_shard():
            dist.all_reduce(square, group=first.device_mesh.get_group(dim))
    return square.sqrt()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def step_unless_non_finite(
    optimizer: torch.optim.Optimizer, clip_grad: float | None = None, loss_scale: LossScale | None = None
) -> tuple[Tensor, Tensor]:
    """Clip by the global norm and take the step unless the norm is not finite, without reading anything on the host.

    A non-finite gradient on one rank makes the norm non-finite on all: averaging spreads it, and so does the sum over
    shards. Fused AdamW takes ``found_inf`` and ``grad_scale`` as a gradient scaler would set them: it divides the
    gradients by the scale, and where ``found_inf`` is 1, weights, moments and step counts stay the same bit for bit.

    Args:
        optimizer: fused.
        loss_scale: what the loss was multiplied by; it is updated.

    Returns:
        The norm before clipping, of the unscaled loss, and 1.0 if the step was skipped, else 0.0: float32 scalars on
        the device, equal on all ranks.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = global_grad_norm(gradients)
    skipped = norm.isfinite().logical_not().float()
    if loss_scale is not None:
        norm = norm / loss_scale.value
        optimizer.grad_scale = loss_scale.value
    if clip_grad is not None:
        # As torch.nn.utils.clip_grads_with_norm_, which would not take local shards with a global norm.
        torch._foreach_mul_([_local(g) for g in gradients], (clip_grad / (norm + 1e-6)).clamp(max=1.0))
    optimizer.found_inf = skipped
    optimizer.step()
    if loss_scale is not None:
        loss_scale.update(skipped)
    return norm, skipped


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every element that this rank holds is finite; waits for the device."""
    return all(bool(_local(tensor).isfinite().all()) for tensor in tensors)


class SamplePositions:
    """Which positions of the run's sample order each step takes: consecutive ones, except after a rollback.

    ``samples_per_step`` counts decoded images on all ranks.
    """

    def __init__(self, samples_per_step: int, order: Order) -> None:
        self.samples_per_step, self._order = samples_per_step, order
        self._jumps = [(0, 0)]  # (step, position), ascending in both: after that step, samples follow from there

    def after(self, step: int) -> int:
        """Images consumed after ``step`` steps, including those left out: the next one's position."""
        begun, position = next(jump for jump in reversed(self._jumps) if jump[0] <= step)
        return position + (step - begun) * self.samples_per_step

    def step_of(self, position: int) -> int:
        """The step, counted from 1, that a position belongs to."""
        begun, first = next(jump for jump in reversed(self._jumps) if jump[1] <= position)
        return begun + (position - first) // self.samples_per_step + 1

    def sample_ids(self, position: int, count: int) -> list[int]:
        """The samples at as many positions."""
        return self._order.ids(position + np.arange(count))[0].tolist()

    def jump(self, step: int, position: int) -> None:
        """Continue from a later position after ``step`` steps; forget what followed before."""
        self._jumps = [jump for jump in self._jumps if jump[0] < step] + [(step, position)]

    def state_dict(self) -> dict[str, Any]:
        return {"jumps": [list(jump) for jump in self._jumps]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._jumps = [(int(step), int(position)) for step, position in state["jumps"]]


class Failure(NamedTuple):
    """The steps that a run rolls back for; taken before a checkpoint's state replaces the present one."""

    first: int  # counted from 1
    last: int
    next_position: int  # of the first image after them
    sample_ids: list[int]
    earlier: list[dict[str, Any]]  # records of the rollbacks before

    def __str__(self) -> str:
        steps = f"steps {self.first} to {self.last}, all skipped" if self.last > self.first else f"step {self.first}"
        ids, more = self.sample_ids, len(self.sample_ids) - NAMED
        text = ", ".join(map(str, ids[:NAMED])) + (f" and {more:,} more in metrics.jsonl" if more > 0 else "")
        return f"no finite gradient in {steps} (sample ids {text})"


class Guard:
    """Counts skipped steps in a row; decides when the run rolls back, and how far.

    The values reach it late, with the rows of metrics. Its decision does not depend on how late: the first
    ``rollback_after`` steps of a streak are left out, whatever was trained since.

    Attributes:
        rollbacks: a record of each rollback: ``first_step`` and ``last_step`` that failed, ``to_step``, and
            ``positions_left_out``, first and last.
    """

    def __init__(self, rollback_after: int, positions: SamplePositions) -> None:
        self._rollback_after, self._positions = rollback_after, positions
        self.load_state_dict({})

    @property
    def due(self) -> bool:
        """Whether the run has to roll back."""
        return self._length >= self._rollback_after

    def observe(self, row: dict[str, Any], values: Mapping[str, Sequence[float]]) -> None:
        """Read an interval's values, one per step up to ``row["step"]``, and add to the row what happened in it.

        ``rollbacks`` is their number so far. Only if there are any, ``skipped_samples`` names the samples of skipped
        steps, and ``rolled_back`` has the records of rollbacks to within the interval.
        """
        begun, size = row["step"] - len(values["skipped"]), self._positions.samples_per_step
        for step, skipped in enumerate(values["skipped"], begun + 1):
            if skipped:
                row.setdefault("skipped_samples", []).append(self._samples(step, self._positions.after(step - 1)))
            if self.due:
                continue  # what the run rolls back for is settled
            if skipped:
                self._first, self._length = self._first if self._length else step, self._length + 1
            else:
                self._last_finite, self._length = step, 0
        row["rollbacks"] = len(self.rollbacks)
        for record in self.rollbacks:
            if begun <= record["to_step"] < row["step"]:
                # Their positions, since the steps' present ones are those after the rollback.
                first, after, end = record["first_step"], record["last_step"] + 1, record["positions_left_out"][1] + 1
                samples = [self._samples(step, end - (after - step) * size) for step in range(first, after)]
                row.setdefault("rolled_back", []).append(record | {"skipped_samples": samples})

    def failure(self) -> Failure:
        """What the run rolls back for."""
        first, last = self._first, self._first + self._rollback_after - 1
        position, end = self._positions.after(first - 1), self._positions.after(last)
        return Failure(first, last, end, self._positions.sample_ids(position, end - position), self.rollbacks)

    def newest_good(self) -> int:
        """The newest step to roll back to: the one before the failure, or one earlier if the last rollback went there,
        since its weights have then failed twice, on different images."""
        again = bool(self.rollbacks) and self.rollbacks[-1]["to_step"] == self._first - 1
        return self._first - 1 - again

    def roll_back(self, step: int, failure: Failure) -> dict[str, Any]:
        """Continue after ``step``, whose state has been loaded, with the images after a failure; return the record."""
        record = {"first_step": failure.first, "last_step": failure.last, "to_step": step}
        record["positions_left_out"] = [self._positions.after(step), failure.next_position - 1]
        self._positions.jump(step, failure.next_position)
        self.rollbacks, self._length = [*failure.earlier, record], 0
        return record

    def newest_taken(self, step: int, pending: Callable[[], Mapping[str, Sequence[float]]]) -> Callable[[], int]:
        """A function that returns the newest step up to ``step`` that was not skipped; it waits for the device if
        ``pending``, which returns the values of the steps that were not observed, does."""
        observed = self._last_finite

        def newest() -> int:
            flags = pending()["skipped"]
            return max((s for s, flag in enumerate(flags, step - len(flags) + 1) if not flag), default=observed)

        return newest

    def state_dict(self) -> dict[str, Any]:
        streak = {"first": self._first, "length": self._length, "last_finite": self._last_finite}
        return streak | {"rollbacks": self.rollbacks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, also that of version 0.1.0; from nothing if it is empty."""
        self._first, self._length = state.get("first", 0), state.get("length", 0)
        self._last_finite = state.get("last_finite", 0)
        self.rollbacks: list[dict[str, Any]] = state.get("rollbacks", [])
        if isinstance(self.rollbacks, int):  # 0.1.0 has only their number
            self.rollbacks = [{"to_step": -1}] * self.rollbacks

    def _samples(self, step: int, position: int) -> dict[str, Any]:
        return {"step": step, "sample_ids": self._positions.sample_ids(position, self._positions.samples_per_step)}


def remedies(train: TrainConfig) -> str:
    """Flags that may keep gradients finite."""
    clip = "--train.clip-grad 1.0" if train.clip_grad is None else "a lower --train.clip-grad"
    return f"a lower --train.base-lr, {clip}" + (" or --train.precision fp32" if train.precision != "fp32" else "")
