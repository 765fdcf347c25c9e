"""Training: configuration, recipes, the optimiser and its schedule, checkpoints, metrics and the loop.

The names below are imported when first used, so that ``fastmae --help`` does not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "CheckpointError": "checkpoint",
    "DataConfig": "config",
    "ModelConfig": "config",
    "Callback": "callbacks",
    "PretrainConfig": "config",
    "ReportConfig": "config",
    "RunFolder": "run_folder",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "consolidate": "checkpoint",
    "export_weights": "weights",
    "latest_checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "load_model": "weights",
    "save_checkpoint": "checkpoint",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
