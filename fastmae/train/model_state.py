"""What a checkpoint holds of a model and its optimiser on any number of ranks, and putting it back.

Names are those of the plain model, whatever wraps it: activation checkpointing, compilation, data parallelism, FSDP.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmae.train.checkpoint import Checkpoint, CheckpointError, Ranks, open_checkpoint, read_together
from fastmae.train.ranks import as_ranks

_WRAPPERS = {"_checkpoint_wrapped_module", "_orig_mod"}


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``model.<name>`` and ``optimizer.<name>.{step,exp_avg,exp_avg_sq}``; DTensors where the model has them.

    The optimiser is asked for the state that it has. ``get_optimizer_state_dict`` would make one by a step with zero
    gradients where there is none, and that step counts.
    """
    tensors = {f"model.{name}": tensor for name, tensor in _weights(model).items()}
    for name, parameter in _parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise CheckpointError(f"optimizer.{name}.{key}: expected a tensor, got {type(value).__name__}")
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def load(
    path: Path | Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, *, ranks: Ranks | None = None
) -> Checkpoint:
    """Put a checkpoint into a model and optimiser, on any number of ranks; every rank calls it.

    Args:
        path: a folder ``step-N``, which is verified, or one that is open already.
        model: bare or wrapped; its parameters may be DTensors.
        optimizer: of this model's parameters; its state is replaced.
        ranks: who reads; None makes a group for this call.

    Raises:
        CheckpointError: on all ranks alike, as :func:`~fastmae.train.checkpoint.open_checkpoint`, or if names, shapes
            or types are not the model's.
    """
    with as_ranks(ranks) as ranks:
        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path, ranks=ranks)
        restore(checkpoint, model, optimizer, ranks)
    return checkpoint


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    others: Collection[str] = (),
) -> dict[str, Tensor]:
    """Put weights and optimiser state back; every rank calls it.

    What several ranks hold is read by one of them: see :func:`~fastmae.train.checkpoint.read_together`.

    Args:
        others: names of other tensors, to read along where the checkpoint has them.

    Returns:
        The others, on the CPU.

    Raises:
        CheckpointError: on all ranks alike, if names, shapes or types are not the model's, or a file cannot be read;
            the model may then be half loaded.
    """
    what = "reading a checkpoint"
    targets: dict[str, Tensor] = {}
    ranks.gather(what, lambda: targets.update(_targets(checkpoint, model, optimizer)))
    wholes = {name: checkpoint.tensors[name].whole for name in others if name in checkpoint.tensors}
    plain = {name: torch.empty(whole.shape, dtype=whole.dtype) for name, whole in wholes.items()}
    read_together(checkpoint, targets | plain, ranks)
    for saved_group, group in zip(checkpoint.manifest.get("param_groups", ()), optimizer.param_groups, strict=False):
        if "step" in saved_group:  # where apex's FusedAdam counts
            group["step"] = saved_group["step"]
    return plain


def _targets(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What is to be filled of a model and of its optimiser, whose state is made anew for it."""
    weights = {f"model.{name}": tensor for name, tensor in _weights(model).items()}
    saved = {name for name in checkpoint.tensors if name.startswith("model.")}
    if saved != weights.keys():
        here, there = sorted(weights.keys() - saved)[:3], sorted(saved - weights.keys())[:3]
        raise CheckpointError(f"{checkpoint.path}: the weights do not fit the model: missing {here}, unknown {there}")
    return weights | _allocate(checkpoint, _parameters(model), optimizer)


def _allocate(
    checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Replace the optimiser's state by uninitialised tensors for what the checkpoint has; by the checkpoint's names."""
    on_device = {
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group.get("fused") or group.get("capturable")
    }
    optimizer.state.clear()
    targets = {}
    for full_name in _optimizer_names(checkpoint.tensors):
        name, key = full_name.removeprefix("optimizer.").rsplit(".", 1)
        if name not in parameters:
            raise CheckpointError(f"{checkpoint.path}: {full_name}: the model has no parameter {name}")
        parameter, whole = parameters[name], checkpoint.tensors[full_name].whole
        if whole.shape == tuple(parameter.shape):
            # Like the parameter: memory format decides the order of a fused kernel's arithmetic.
            own: Any = torch.empty_like(parameter, dtype=whole.dtype, requires_grad=False)
        else:
            device = parameter.device if parameter in on_device else "cpu"
            own = torch.empty(whole.shape, dtype=whole.dtype, device=device)
        optimizer.state[parameter][key] = targets[full_name] = own
    return targets


def _optimizer_names(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("optimizer.")]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {_plain(name): tensor for name, tensor in _unwrapped(model).state_dict().items()}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {_plain(name): parameter for name, parameter in _unwrapped(model).named_parameters()}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that ``DistributedDataParallel`` wraps."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
