"""What a checkpoint holds of a trainer, and putting it back: all that the following steps hang on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastmae.train import model_state, state
from fastmae.train.checkpoint import Checkpoint, open_checkpoint, set_aside_after
from fastmae.train.config import to_json

if TYPE_CHECKING:
    from fastmae.train.loop import Trainer


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    """Weights and optimiser state, the values of the steps since the last row of metrics, and the loss scale."""
    tensors = model_state.collect(trainer.model, trainer.optimizer)
    tensors |= {f"metrics.{name}": tensor for name, tensor in trainer.reporter.values.state_dict().items()}
    if trainer.loss_scale:
        tensors |= trainer.loss_scale.state_dict()
    return tensors


def manifest_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that is not a tensor; JSON-able."""
    return state.describe_run(trainer.config, trainer.model, trainer.optimizer, trainer.dataset) | {
        "samples_consumed": trainer.samples,
        "positions": trainer.positions.state_dict(),
        "guard": trainer.guard.state_dict(),
        "world_size": trainer.ranks.size,
        "num_threads": trainer.num_threads,
        "late_bad": trainer.bad_files.state(),
    }


def resume(trainer: Trainer, saved: Path | Checkpoint) -> list[str]:
    """As :meth:`Trainer.resume`."""
    saved = open_checkpoint(saved, ranks=trainer.ranks) if isinstance(saved, Path) else saved
    manifest = saved.manifest
    state.check_architecture(manifest["architecture"], trainer.model.architecture)
    differences = state.compare_configs(manifest["config"], to_json(trainer.config))
    here = trainer.num_threads, trainer.dataset.hash, trainer.ranks.size
    differences += state.compare_circumstances(manifest, *here)
    restore(trainer, saved)
    go_on_from(trainer, saved)
    return differences


def restore(trainer: Trainer, saved: Checkpoint) -> None:
    """Put weights and optimiser back, and the other tensors of a checkpoint."""
    trainer.watchdog.at("reading a checkpoint", trainer.step)
    if trainer.step_graph:
        trainer.step_graph.reset()
    names = ["metrics.interval", *(["loss_scale"] if trainer.loss_scale else [])]
    others = model_state.restore(saved, trainer.model, trainer.optimizer, trainer.ranks, names)
    trainer.reporter.values.load_state_dict({"interval": others["metrics.interval"]})
    if trainer.loss_scale:
        trainer.loss_scale.load_state_dict(others)


def go_on_from(trainer: Trainer, saved: Checkpoint, suffix: str = "damaged") -> None:
    """Take over what a checkpoint's manifest says, and have the run folder know of no later step: later checkpoints
    are renamed to ``step-N.<suffix>``."""
    manifest = saved.manifest
    trainer.step, trainer.saves.newest = manifest["step"], saved.path
    # Version 0.1.0 has "jumps" and "divergence".
    trainer.positions.load_state_dict(manifest.get("positions", manifest))
    trainer.guard.load_state_dict(manifest.get("guard", manifest.get("divergence", {})))
    if manifest["dataset"]["hash"] == trainer.dataset.hash:  # else its sample ids mean other files
        trainer.bad_files.restore(manifest.get("late_bad", []))
    if trainer.parallelism.is_main:
        set_aside_after(trainer.run.checkpoints, trainer.step, suffix)
    trainer.run.cut_metrics(trainer.step)
