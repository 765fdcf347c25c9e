"""Gradients that are whole, averaged or sharded: their global norm, clipping, steps that all ranks skip together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

GROWTH_INTERVAL = 2000
"""Steps without an overflow after which the loss scale doubles, as ``torch.amp.GradScaler`` has it."""


class LossScale:
    """The factor that keeps small fp16 gradients from rounding to zero: halved by an overflow, doubled now and then.

    It does what ``torch.amp.GradScaler`` does for a fused optimiser, but takes an overflow from the global gradient
    norm, which is computed anyway and is the same on all ranks. GradScaler reads all gradients once more, and agrees
    on shards by a collective of its own.

    Args:
        device: of the loss.
        initial: the scale to begin with.
        growth_interval: steps without an overflow until it doubles.
    """

    def __init__(self, device: torch.device, initial: float = 2.0**16, growth_interval: int = GROWTH_INTERVAL) -> None:
        self.value = torch.tensor(initial, device=device)
        self._good_steps = torch.zeros((), device=device)
        self._growth_interval = growth_interval

    def update(self, skipped: Tensor) -> None:
        """Follow a step: 1.0 for an overflow, 0.0 for none. Nothing waits for the device.

        In place, so that a captured step reads and writes the same memory each time.
        """
        self._good_steps.add_(1).mul_(1 - skipped)
        grows = (self._good_steps >= self._growth_interval).float()
        self.value.mul_((1 - 0.5 * skipped) * (1 + grows))
        self._good_steps.mul_(1 - grows)

    def state(self) -> Tensor:
        """(2,): for a checkpoint."""
        return torch.stack([self.value, self._good_steps])

    def restore(self, state: Tensor) -> None:
        """Go on from what :meth:`state` returned."""
        self.value.copy_(state[0])
        self._good_steps.copy_(state[1])


@torch.no_grad()
def global_grad_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients over all shards: a float32 scalar on the device, the same on every rank.

    One collective of one number where gradients are sharded, none where they are whole. All of one kind.
    """
    norm = torch.nn.utils.get_total_norm([_local(g) for g in gradients])
    if not isinstance(gradients[0], DTensor):
        return norm
    # Not DTensor's own reduction: what it runs on, functional collectives, now and then crashes with gloo (2.14).
    square, mesh = norm.square(), gradients[0].device_mesh
    for dim, placement in enumerate(gradients[0].placements):
        if placement.is_shard():
            dist.all_reduce(square, group=mesh.get_group(dim))
    return square.sqrt()


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


@torch.no_grad()
def step_unless_non_finite(
    optimizer: torch.optim.Optimizer, clip_grad: float | None = None, loss_scale: LossScale | None = None
) -> tuple[Tensor, Tensor]:
    """Clip by the global norm, and take the step unless it is not finite; on the device, without a synchronisation.

    A gradient that is not finite on one rank makes the norm so on all: averaging spreads it, and so does the sum over
    shards. Fused AdamW reads ``found_inf`` as a gradient scaler would set it: where it is 1, weights, moments and step
    counts stay as they are, bit for bit. It also divides gradients by ``grad_scale``.

    Args:
        optimizer: fused.
        clip_grad: largest norm; None for no clipping.
        loss_scale: what the loss was multiplied by; it is updated.

    Returns:
        The norm before clipping, of the loss as it was before scaling, and 1.0 if the step was skipped or else 0.0;
        float32 scalars on the device of the gradients, equal on all ranks.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = global_grad_norm(gradients)
    skipped = norm.isfinite().logical_not().float()
    if loss_scale is not None:
        norm = norm / loss_scale.value
        optimizer.grad_scale = loss_scale.value
    if clip_grad is not None:
        # The formula of torch.nn.utils.clip_grads_with_norm_, for shards where there are any.
        torch._foreach_mul_([_local(g) for g in gradients], (clip_grad / (norm + 1e-6)).clamp(max=1.0))
    optimizer.found_inf = skipped
    optimizer.step()
    if loss_scale is not None:
        loss_scale.update(skipped)
    return norm, skipped
