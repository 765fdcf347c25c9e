"""AdamW and its learning rate, as in Table 8 of the paper and facebookresearch/mae."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmae.train.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from zero, then half a cosine: a pure function of the step, so that resuming needs no state.

    The formula is facebookresearch/mae's ``adjust_learning_rate``, whose fractional epoch is ``step / steps an epoch``:
    the rate moves every step.
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
    """The schedule of a run over a data set of ``num_samples`` images.

    Raises:
        ValueError: if the warm-up is not shorter than the run.
    """

    def steps_in(epochs: float | None) -> Fraction:
        # Batches straddle epochs, so an epoch need not be a whole number of steps. Floating point would round
        # 30 epochs of 50,000 images in batches of 96 up to 15,626 steps instead of 15,625.
        return Fraction(str(epochs or 0)) * num_samples / train.global_batch_size

    total = train.steps if train.steps is not None else math.ceil(steps_in(train.epochs))
    if train.warmup_steps is not None:
        warmup, name, given = float(train.warmup_steps), "--train.warmup-steps", train.warmup_steps
    else:
        given = train.warmup_epochs or 0
        warmup, name = float(steps_in(given)), "--train.warmup-epochs"
    if warmup >= total:
        raise ValueError(
            f"{name}: expected a warm-up shorter than the run of {total} steps, got {given} ({warmup:g} steps)"
        )
    return Schedule(train.base_lr * train.global_batch_size / 256, train.min_lr, warmup, total)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: what decays, and biases and norms, which do not. Frozen parameters are in neither.

    Class and mask token decay, as in facebookresearch/mae, which spares one-dimensional parameters only.
    """
    decayed, exempt = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (exempt if parameter.ndim <= 1 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def create_optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """Fused AdamW, PyTorch's or apex's; :func:`set_learning_rate` comes before each step.

    Raises:
        ValueError: apex is asked for and does not load.
    """
    if train.optimizer == "apex":
        return create_apex_adam(groups, train.betas)
    if train.cuda_graph:
        # What a graph reads: a rate in memory, and step counts that no Python number mirrors.
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
        lr = torch.zeros((), device=groups[0]["params"][0].device)
        return torch.optim.AdamW(groups, lr=lr, betas=train.betas, fused=True, capturable=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=train.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step: rounded to float32 for every optimiser, since a CUDA graph reads a float32."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = float(np.float32(rate))


# ---- NVIDIA apex: source-only and optional; the package of that name on PyPI is unrelated. It knows no shards. -------

_APEX_HINT = "build NVIDIA's apex from its GitHub source with its CUDA extensions, or use adamw"


def create_apex_adam(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """apex's FusedAdam in its capturable form, which reads ``found_inf`` and ``grad_scale`` as PyTorch's AdamW does.

    Its state has the names and meanings of ``torch.optim.AdamW``'s, so that checkpoints of one go on with the other.

    Args:
        groups: parameter groups, whole parameters on a CUDA device.
        betas: decay rates of the moments.

    Raises:
        ValueError: if apex cannot be loaded, whatever the reason.
    """
    try:
        from apex.optimizers import FusedAdam
    except Exception as error:  # extensions built for another PyTorch fail in many ways
        raise ValueError(f"--train.optimizer: apex's FusedAdam does not load ({error}): {_APEX_HINT}") from error

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
            # FusedAdam counts the steps of its first group by the buffer of the step before.
            self._dummy_overflow_buf.copy_(found)
            for group in self.param_groups:
                group["lr"] = torch.full((1,), float(group["lr"]), device=device)
                group["step"] = self._steps(group, device)
            try:
                super().step(grad_scaler=_Scaler(device, found, self.grad_scale))
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


class _Scaler:
    """What FusedAdam asks a gradient scaler."""

    def __init__(self, device: torch.device, found_inf: torch.Tensor, scale: torch.Tensor | None) -> None:
        self._device, self._found_inf = device, found_inf
        self._scale = torch.ones(1, device=device) if scale is None else scale.reshape(1)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, torch.Tensor]:
        return {self._device: self._found_inf}

    def _get_scale_async(self) -> torch.Tensor:
        return self._scale
