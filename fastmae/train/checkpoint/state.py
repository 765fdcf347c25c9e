"""A run's state in a checkpoint: model and optimiser as tensors, the run's description, and whether a run may continue
from it.

Names of tensors are those of the bare model, which ``parallelize`` keeps in every mode.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from fastmae.data import Dataset
from fastmae.train.checkpoint.load import Checkpoint, read_together
from fastmae.train.config import FIXED, FREE, PretrainConfig, flatten, policies, to_json, updated
from fastmae.train.ranks import CheckpointError, Ranks

_NOT_WEIGHTS = {"seed", "attention", "residual_dtype"}
"""Constructor arguments that do not change what a checkpoint's weights mean."""


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``model.<name>`` and ``optimizer.<name>.{step,exp_avg,exp_avg_sq}``; DTensors where the model has them.

    The optimiser is asked for the state that it has. ``get_optimizer_state_dict`` would make one by a step with zero
    gradients where there is none, and that step counts.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    parts: Collection[str] = (),
) -> dict[str, Tensor]:
    """Put weights and optimiser state back; return the tensors named ``<part>.<key>``, on the CPU. Every rank calls it.

    Raises:
        CheckpointError: on all ranks alike, if names, shapes or types are not the model's, or a file cannot be read;
            the model may then be half loaded.
    """
    targets: dict[str, Tensor] = {}
    ranks.gather("reading a checkpoint", lambda: targets.update(_targets(checkpoint, model, optimizer)))
    wanted = {name: entry.whole for name, entry in checkpoint.tensors.items() if name.split(".")[0] in parts}
    plain = {name: torch.empty(whole.shape, dtype=whole.dtype) for name, whole in wanted.items()}
    read_together(checkpoint, targets | plain, ranks)
    if "loss_scale" in plain:  # as version 0.1.0 names it
        plain["loss_scale.value_and_good_steps"] = plain.pop("loss_scale")
    return plain


def _targets(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The weights, and the optimiser's state, which is replaced by uninitialised tensors as the checkpoint has them."""
    targets = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    saved = {name for name in checkpoint.tensors if name.startswith("model.")}
    if saved != targets.keys():
        here, there = sorted(targets.keys() - saved)[:3], sorted(saved - targets.keys())[:3]
        raise CheckpointError(f"{checkpoint.path}: the weights do not fit the model: missing {here}, unknown {there}")
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name in (name for name in checkpoint.tensors if name.startswith("optimizer.")):
        name, key = full_name.removeprefix("optimizer.").rsplit(".", 1)
        if name not in parameters:
            raise CheckpointError(f"{checkpoint.path}: {full_name}: the model has no parameter {name}")
        parameter, whole = parameters[name], checkpoint.tensors[full_name].whole
        if whole.shape == tuple(parameter.shape):
            # Like the parameter: memory format decides the order of a fused kernel's arithmetic.
            own = torch.empty_like(parameter, dtype=whole.dtype, requires_grad=False)
        else:
            own = torch.empty(whole.shape, dtype=whole.dtype, device=parameter.device)  # where fused optimisers count
        optimizer.state[parameter][key] = targets[full_name] = own
    return targets


def describe_run(config: PretrainConfig, model: nn.Module, dataset: Dataset, world_size: int) -> dict[str, Any]:
    """What a manifest says beside the tensors of how they came about; JSON-able."""
    return {
        "architecture": model.architecture,
        "config": to_json(config),
        "dataset": {"name": dataset.name, "hash": dataset.hash, "samples": len(dataset)},
        "world_size": world_size,
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what a checkpoint's exact continuation depends on."""
    from fastmae import __version__

    packages = {name: version(name) for name in ("torch", "numpy", "safetensors")}
    return {"fastmae": __version__, "python": platform.python_version(), **packages}


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise if a manifest lacks what resuming reads, or has it in another form."""
    config = manifest["config"]
    for values in (manifest["architecture"], manifest["versions"], config["model"], config["data"], config["train"]):
        if not isinstance(values, dict):
            raise TypeError(f"expected an object, got {values!r}")
    _ = config["train"]["global_batch_size"], config["train"]["precision"], manifest["dataset"]["hash"]
    _ = manifest["num_threads"]


def compare(manifest: Mapping[str, Any], here: Mapping[str, Any], kind: type = PretrainConfig) -> list[str]:
    """How a run (:func:`describe_run`) differs from the one that a manifest describes, where that makes the
    continuation inexact: one text each. ``kind`` is the class of their configurations.

    Raises:
        CheckpointError: if it cannot be continued: another architecture, or a ``Fixed`` field that differs.
    """
    here = json.loads(json.dumps(here))  # tuples become lists, as in a manifest
    was, now = manifest["architecture"], here["architecture"]
    names = [name for name in {**was, **now} if name not in _NOT_WEIGHTS and was.get(name) != now.get(name)]
    if names:
        differ = "; ".join(f"{name} {was.get(name)} there, {now.get(name)} here" for name in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(f"the checkpoint is of another architecture: {differ}{more}")
    differences = compare_configs(manifest["config"], here["config"], kind)
    before, after = (
        {"world_size": run.get("world_size", 1), "num_threads": run["num_threads"]}
        | {"dataset.hash": run["dataset"]["hash"]}
        | run["versions"]
        for run in (manifest, here)
    )
    return differences + [f"{key} was {before.get(key)}, is {v}" for key, v in after.items() if before.get(key) != v]


def compare_configs(saved: Mapping[str, Any], here: Mapping[str, Any], kind: type = PretrainConfig) -> list[str]:
    """How a resumed run's configuration differs from the saved one, where that changes the results: one text per field.

    A configuration of an earlier version lacks fields, which then had what is their default now.

    Raises:
        CheckpointError: if a ``Fixed`` field differs: the order of samples depends on it, or the initial weights.
    """
    defaults, may, differences = flatten(to_json(kind())), flatten(policies(kind)), []
    before, after = defaults | flatten(updated(dict(saved))), defaults | flatten(dict(here))
    for name in sorted(before.keys() | after.keys()):
        was, now, policy = before.get(name), after.get(name), may.get(name)
        if was == now or policy == FREE:
            continue
        if policy == FIXED or (name == "train.optimizer" and "muon" in (was, now)):  # another state of the matrices
            flag = f"--{name}".replace("_", "-")
            raise CheckpointError(f"{flag}: a resumed run needs the value it started with, {was}, got {now}")
        differences.append(f"{name} was {was}, is {now}")
    return differences


def of_this_version(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the names of this version: 0.1.0 had other ones for some parts of the state."""
    older = {
        "positions": {"jumps": manifest["jumps"]} if "jumps" in manifest else None,
        "guard": manifest.get("divergence"),
        "bad_files": {"late": manifest["late_bad"]} if "late_bad" in manifest else None,
    }
    return {name: value for name, value in older.items() if value is not None} | dict(manifest)
