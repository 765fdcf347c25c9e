"""AdamW and its learning rate, as in Table 8 of the paper and facebookresearch/mae."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from fastmae.train.apex_adam import create_apex_adam
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


def create_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Fused AdamW, PyTorch's or apex's; :func:`set_learning_rate` comes before each step.

    Raises:
        ValueError: apex is asked for and does not load.
    """
    groups = parameter_groups(model, train.weight_decay)
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
