"""The learning rate and AdamW, as in Table 8 of the paper and facebookresearch/mae; as options Muon and apex's Adam."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmae.train.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from zero, then half a cosine: a pure function of the step, so that resuming needs no state.

    facebookresearch/mae's ``adjust_learning_rate``, with ``step / steps an epoch`` as its epoch.
    """

    peak_lr: float
    min_lr: float
    warmup_steps: float
    total_steps: int

    def __call__(self, step: int) -> float:
        """The learning rate of optimiser step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def create_schedule(train: TrainConfig, num_samples: int) -> Schedule:
    """The schedule of a run over ``num_samples`` images; raises ValueError if warm-up is not shorter than the run."""

    def steps_in(epochs: float | None) -> Fraction:
        # Batches straddle epochs, so an epoch need not be a whole number of steps. Floating point would round
        # 30 epochs of 50,000 images in batches of 96 up to 15,626 steps instead of 15,625.
        return Fraction(str(epochs or 0)) * num_samples / train.global_batch_size

    total = train.steps if train.steps is not None else math.ceil(steps_in(train.epochs))
    in_steps = train.warmup_steps is not None
    warmup = float(train.warmup_steps if in_steps else steps_in(train.warmup_epochs))
    if warmup >= total:
        name = "--train.warmup-steps" if in_steps else "--train.warmup-epochs"
        raise ValueError(f"{name}: expected a warm-up shorter than the run of {total} steps, got {warmup:g} steps")
    return Schedule(train.base_lr * train.global_batch_size / 256, train.min_lr, warmup, total)


def parameter_groups(model: nn.Module, weight_decay: float, *, matrices: bool = False) -> list[dict]:
    """Two groups: what decays, and biases and norms, which do not. Frozen parameters are in neither.

    Class and mask token decay, as in facebookresearch/mae, which spares one-dimensional parameters only. ``matrices``
    puts the weight matrices of the blocks into a third group, as :class:`Muon` needs it.
    """
    decayed, exempt, orthogonal = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = matrices and parameter.ndim == 2 and "blocks." in name
            (exempt if parameter.ndim <= 1 else orthogonal if inside else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    if orthogonal:
        groups.append({"params": orthogonal, "weight_decay": weight_decay, "orthogonal": True})
    return groups


def create_optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """Fused AdamW, PyTorch's or apex's, or Muon; :func:`set_learning_rate` comes before each step.

    Raises:
        ValueError: apex is asked for and does not load.
    """
    if train.optimizer == "apex":
        return create_apex_adam(groups, train.betas)
    if train.optimizer == "muon":
        dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        return Muon(groups, train.betas, dtype, lr_ratio=(train.muon_lr or train.base_lr) / train.base_lr)
    if train.cuda_graph:
        # What a graph reads: a rate in memory, and step counts that no Python number mirrors.
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
        groups = [{**group, "lr": torch.zeros((), device=group["params"][0].device)} for group in groups]
        return torch.optim.AdamW(groups, betas=train.betas, fused=True, capturable=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=train.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step, times a group's ``lr_scale``: rounded to float32 for every optimiser, since a CUDA
    graph reads a float32."""
    for group in optimizer.param_groups:
        scaled = rate * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(scaled)
        else:
            group["lr"] = float(np.float32(scaled))


# ---- Muon ------------------------------------------------------------------------------------------------------------

_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""Coefficients of each iteration, of Jordan et al.: singular values end between 0.7 and 1.2."""
_AT_ONCE = 1 << 26
"""Most elements of the matrices that are orthogonalised together."""


class Muon(torch.optim.AdamW):
    """AdamW, except that groups marked ``orthogonal`` move along their momentum with all singular values near 1.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The factor 0.2 sqrt(max(rows,
    columns)) is that of Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982): updates then are as
    large as AdamW's, whose rate and decay they share. ``found_inf`` and ``grad_scale`` are read as by fused AdamW.

    Args:
        groups: of :func:`parameter_groups` with ``matrices``; whole parameters.
        betas: of AdamW; the first is also the momentum of the matrices.
        dtype: of the Newton-Schulz iteration, bfloat16 or float32.
        lr_ratio: of the matrices' learning rate to that of their group.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        dtype: torch.dtype = torch.float32,
        lr_ratio: float = 1.0,
    ) -> None:
        super().__init__(groups, lr=0.0, betas=betas, fused=True)
        self._dtype, self._momentum, self._lr_ratio = dtype, betas[0], lr_ratio
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """A step, unless ``found_inf`` is 1."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("orthogonal")]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("orthogonal"):
                for parameters in _of_one_shape(group["params"]):
                    self._step_together(parameters, group["lr"] * self._lr_ratio, group["weight_decay"])

    def _step_together(self, parameters: list[Tensor], lr: float, decay: float) -> None:
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        kept = [self.state[parameter]["momentum"] for parameter in parameters]
        gradient, before, weights = (torch.stack(t) for t in ([p.grad for p in parameters], kept, parameters))
        if self.grad_scale is not None:
            gradient /= self.grad_scale
        momentum = before.lerp(gradient, 1 - self._momentum)
        direction = orthogonalized(gradient.lerp(momentum, self._momentum).to(self._dtype)).to(weights.dtype)
        moved = weights * (1 - lr * decay) - direction * (lr * 0.2 * max(weights.shape[1:]) ** 0.5)
        if self.found_inf is not None:
            taken = self.found_inf == 0
            momentum, moved = torch.where(taken, momentum, before), torch.where(taken, moved, weights)
        torch._foreach_copy_(kept, list(momentum.unbind()))
        torch._foreach_copy_(parameters, list(moved.unbind()))


def _of_one_shape(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of parameters that have gradients, of one shape each and of ``_AT_ONCE`` elements or one matrix."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            shapes.setdefault(parameter.shape, []).append(parameter)
    for same in shapes.values():
        count = max(1, _AT_ONCE // same[0].numel())
        yield from (same[start : start + count] for start in range(0, len(same), count))


def orthogonalized(matrices: Tensor) -> Tensor:
    """U V^T of the singular value decompositions U S V^T of matrices (N, rows, columns), nearly, by Newton-Schulz.

    In float32 the iteration runs on X X^T and multiplies X once, which saves a third of the products of the blocks'
    matrices; in bfloat16 that is unstable.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    if x.dtype == torch.float32:
        gram, factor, product = x @ x.mT, None, None
        for a, b, c in _NEWTON_SCHULZ:
            if product is not None:
                gram = factor @ gram @ factor
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor if product is None else factor @ product
        x = product @ x
    else:
        for a, b, c in _NEWTON_SCHULZ:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# ---- NVIDIA apex: source-only and optional; the package of that name on PyPI is unrelated. It knows no shards. -------


def create_apex_adam(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """apex's FusedAdam in its capturable form, which reads ``found_inf`` and ``grad_scale`` as PyTorch's AdamW does.

    Its state has the names and meanings of ``torch.optim.AdamW``'s, so that checkpoints of one go on with the other.
    Parameters are whole and on a CUDA device. Raises ValueError if apex cannot be loaded, whatever the reason.
    """
    try:
        from apex.optimizers import FusedAdam
    except Exception as error:  # extensions built for another PyTorch fail in many ways
        hint = "build NVIDIA's apex from its GitHub source with its CUDA extensions, or use adamw"
        raise ValueError(f"--train.optimizer: apex's FusedAdam does not load ({error}): {hint}") from error

    class ApexAdam(FusedAdam):
        found_inf: torch.Tensor | None = None
        grad_scale: torch.Tensor | None = None

        def zero_grad(self, set_to_none: bool = True) -> None:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            """A step, unless ``found_inf`` is 1. ``lr`` of the groups may be a number, as elsewhere."""
            device = self.param_groups[0]["params"][0].device
            rates = [group["lr"] for group in self.param_groups]
            found = torch.zeros(1, device=device) if self.found_inf is None else self.found_inf.reshape(1)
            scale = torch.ones(1, device=device) if self.grad_scale is None else self.grad_scale.reshape(1)
            # What FusedAdam asks a gradient scaler.
            scaler = SimpleNamespace(_check_inf_per_device=lambda _: {device: found}, _get_scale_async=lambda: scale)
            # FusedAdam counts the steps of its first group by the buffer of the step before.
            self._dummy_overflow_buf.copy_(found)
            for group in self.param_groups:
                group["lr"] = torch.full((1,), float(group["lr"]), device=device)
                group["step"] = self._steps(group, device)
            try:
                super().step(grad_scaler=scaler)
            finally:
                for group, rate in zip(self.param_groups, rates, strict=True):
                    group["lr"], steps = rate, group.pop("step")
                    for parameter in group["params"]:
                        if parameter in self.state:
                            self.state[parameter]["step"] = steps.float().reshape(())

        def _steps(self, group: dict[str, Any], device: torch.device) -> torch.Tensor:
            known = (self.state[p]["step"] for p in group["params"] if "step" in self.state.get(p, {}))
            return next(known, torch.zeros((), device=device)).to(device, torch.int32).reshape(1)

    for group in groups:
        group["lr"] = torch.zeros(1, device=group["params"][0].device)
    optimizer = ApexAdam(groups, lr=0.0, betas=betas, adam_w_mode=True, capturable=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer
