"""``fastmae reconstruct``: masked, reconstructed and original images side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastmae.cli.errors import UsageError, mistakes
from fastmae.data import read_images
from fastmae.evaluate import evaluate_sets
from fastmae.train.weights import load_model


def reconstruct(checkpoint: Path, images: Sequence[Path], out: Path, mask_ratio: float, seed: int) -> int:
    """Draw the figure of some images and print their errors; return the exit code."""
    if not images:
        raise UsageError("IMAGES: expected at least one image file, got none")
    model, _ = load_model(checkpoint)
    with mistakes():
        sets = {"images": read_images(images, model.img_size)}
        out.parent.mkdir(parents=True, exist_ok=True)
        names = {"images": [path.stem for path in images]}
        summary = evaluate_sets(model, sets, mask_ratio=mask_ratio, seed=seed, path=out, names=names)
    for name, values in summary.items():
        print(name, *(f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float)), sep="  ")
    print(f"Picture: {out}")
    return 0
