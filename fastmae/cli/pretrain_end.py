"""The end of ``fastmae pretrain``: weights, a picture, a summary."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from rich.console import Console
from torch import nn

from fastmae.cli.evaluations import newest_values, reconstruction_sets
from fastmae.evaluate import evaluate_sets
from fastmae.train.config import to_json
from fastmae.train.loop import Trainer
from fastmae.train.parallel import DTYPES
from fastmae.train.run_folder import RunFolder
from fastmae.train.telemetry.metrics import without_nan
from fastmae.train.weights import export_weights, load_model

_NEW_CROPS, _ROWS = 256, 12
_BASELINES = {"the mean visible colour": "mse_mean_color", "inverse-distance filling": "mse_inverse_distance"}


def export(trainer: Trainer, run: RunFolder) -> tuple[nn.Module, Path]:
    """Write the final weights, before the evaluation, which a signal may end; return the whole model and the file."""
    # Of shards there is one whole copy: the checkpoint that was just saved.
    sharded = trainer.parallelism.sharded
    model = load_model(run.path)[0].to(trainer.device) if sharded else trainer.model.eval()
    path, config = run.path / "model.safetensors", to_json(trainer.config)
    return model, export_weights(model, path, step=trainer.step, config=config)


def finish(
    trainer: Trainer, model: nn.Module, weights: Path, run: RunFolder, console: Console, seconds: float, steps: int
) -> None:
    """Reconstruct crops and photographs that were not trained on, write the summary.

    Args:
        model, weights: of :func:`export`.
        seconds, steps: of the training that has just ended.
    """
    config = trainer.config
    console.print("Evaluating: reconstructing images that were not trained on")
    sets, names = reconstruction_sets(config, trainer.dataset, _NEW_CROPS)
    picture = run.reconstructions / "final.png"
    errors = evaluate_sets(
        model,
        sets,
        mask_ratio=config.model.mask_ratio,
        mask_strategy=config.model.mask_strategy,
        seed=config.train.seed,
        path=picture,
        dtype=DTYPES[config.train.precision],
        names=names,
        num_rows=_ROWS,
        when=f"after {trainer.step:,} steps",
    )
    for values in errors.values():
        values["worse_than"] = [name for name, key in _BASELINES.items() if not values["mse"] < values[key]]
    rows = run.read_metrics()
    summary = {
        "steps": trainer.step,
        "samples": trainer.samples,
        "seconds": seconds,
        "images_per_second": steps * config.train.global_batch_size / seconds,
        "first_loss": rows[0]["loss"] if rows else None,
        "last_loss": rows[-1]["loss"] if rows else None,
        "device": str(trainer.device),
        "precision": config.train.precision,
        "num_threads": trainer.num_threads,
        "loader": trainer.loader.kind,
        "bad_files": len(trainer.bad_files),
        "sets": errors,
        "evaluations": newest_values(run),
        "picture": str(picture),
        "weights": str(weights),
    }
    run.write_json("summary.json", without_nan(summary))
    if bad := len(trainer.bad_files):
        console.print(f"{bad:,} bad file{'s' * (bad > 1)}, replaced by others: {run.path / 'bad_files.jsonl'}")
    for name, values in errors.items():
        console.print(
            f"{name}, {values['mask_strategy']} masks: error {values['mse']:.3f}  "
            f"(mean colour {values['mse_mean_color']:.3f}, inverse distance {values['mse_inverse_distance']:.3f})"
        )
        if values["worse_than"]:
            console.print(f"{name}: WORSE THAN {' and '.join(values['worse_than'])}, without a model")
    console.print(f"Weights: {weights}\nPicture: {picture}")
    if not all(math.isfinite(values["mse"]) for values in errors.values()):
        print("WARNING: THE MODEL'S PREDICTIONS ARE NOT FINITE: its weights are of no use", file=sys.stderr)
