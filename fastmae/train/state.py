"""What a checkpoint's manifest says of a training run, and whether another one may go on from it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from fastmae.data import Dataset
from fastmae.train.checkpoint import CheckpointError
from fastmae.train.config import PretrainConfig, compare, to_json
from fastmae.train.rules import FIXED


def describe_run(
    config: PretrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, dataset: Dataset
) -> dict[str, Any]:
    """What a manifest says beside the tensors of how they came about; JSON-able."""
    return {
        "architecture": model.architecture,
        "config": to_json(config),
        "dataset": {"name": dataset.name, "hash": dataset.hash, "samples": len(dataset)},
        "param_groups": [
            {k: v for k, v in group.items() if k != "params" and not isinstance(v, Tensor)}
            for group in optimizer.param_groups
        ],
        "versions": versions(),
    }


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """``load_state_dict`` whose failure is a :class:`CheckpointError`."""
    try:
        model.load_state_dict(weights, strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit the model: {' '.join(str(error).split())[:300]}") from error


def check_architecture(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another architecture.

    Raises:
        CheckpointError: naming the first three fields that differ.
    """
    differ = [
        f"{key} {_plain(saved.get(key))} there, {_plain(here.get(key))} here"
        for key in {**saved, **here}
        if key not in _NOT_WEIGHTS and _plain(saved.get(key)) != _plain(here.get(key))
    ]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise CheckpointError(f"the checkpoint is of another architecture: {'; '.join(differ[:3])}{more}")


_NOT_WEIGHTS = {"seed", "attention", "residual_dtype"}
"""Constructor arguments that do not change what a checkpoint's weights mean."""


def compare_configs(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """How the configuration of a resumed run differs from the saved one, where that changes the results.

    Returns:
        One text per field, for a warning.

    Raises:
        CheckpointError: if a ``Fixed`` field differs: the order of samples depends on it, or the initial weights.
    """
    differences = []
    for name, was, now, policy in compare(dict(saved), dict(here)):
        if policy == FIXED:
            flag = f"--{name}".replace("_", "-")
            raise CheckpointError(f"{flag}: a resumed run needs the value it started with, {was}, got {now}")
        if policy is None:
            differences.append(f"{name} was {was}, is {now}")
    return differences


def compare_circumstances(
    manifest: Mapping[str, Any], num_threads: int, dataset_hash: str, world_size: int = 1
) -> list[str]:
    """How processes, threads, data and versions differ from those that a checkpoint was written with, one text each."""
    saved = {
        "world_size": manifest.get("world_size", 1),
        "num_threads": manifest["num_threads"],
        "dataset.hash": manifest["dataset"]["hash"],
        **manifest["versions"],
    }
    here = {"world_size": world_size, "num_threads": num_threads, "dataset.hash": dataset_hash, **versions()}
    return [f"{key} was {saved.get(key)}, is {value}" for key, value in here.items() if saved.get(key) != value]


def versions() -> dict[str, str]:
    """Versions of what a checkpoint's exact continuation depends on."""
    packages = {name: version(name) for name in ("torch", "numpy", "safetensors")}
    from fastmae import __version__

    return {"fastmae": __version__, "python": platform.python_version(), **packages}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
