"""Commands on the weights of a run: ``fastmae reconstruct`` and ``fastmae consolidate``."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmae.cli.commands import ConsolidateConfig, ReconstructConfig
from fastmae.cli.evaluate import on_device
from fastmae.data import DataError, read_images
from fastmae.data.formats import IMAGE_SUFFIXES
from fastmae.data.index import check_value_range
from fastmae.data.sources import list_files
from fastmae.errors import UsageError, usage_errors
from fastmae.evaluate import evaluate_sets
from fastmae.evaluate.sets import compare_masks
from fastmae.loading import load
from fastmae.train import checkpoint

_MEASURED = 256
"""Most images to measure errors on; they are held in memory at the model's size."""
_FLAGS = {"mask_ratio": "--mask-ratio", "strategy": "--mask-strategy", "grid_size": "--mask-strategy",
          "bands": "--bands", "value_range": "--value-range"}  # fmt: skip


def consolidate(config: ConsolidateConfig) -> int:
    """Write a checkpoint of any number of processes as one file; return the exit code."""
    out = config.out
    if out.suffix != ".safetensors":
        raise UsageError(f"OUT: expected a .safetensors file, got {out}")
    saved = checkpoint.open_folder(config.checkpoint)
    checkpoint.consolidate(saved, out, optimizer=config.optimizer)
    print(f"{saved.path} -> {out}  ({out.stat().st_size / 2**20:,.1f} MiB)")
    return 0


def reconstruct(config: ReconstructConfig) -> int:
    """Draw masked, reconstructed and original images side by side and print their errors; return the exit code."""
    if config.show < 1:
        raise UsageError(f"--show: expected at least 1, got {config.show}")
    model, info = load(config.checkpoint, return_info=True)
    if not info.has_decoder:
        raise UsageError(f"{config.checkpoint}: has no decoder, so it cannot reconstruct images")
    if config.bands is not None and model.in_chans <= 3:
        raise UsageError(f"--bands: expected a model of more than 3 channels, got one of {model.in_chans}")
    run_model, run_data = info.config.get("model", {}), info.config.get("data", {})
    reading = {
        "channels": model.in_chans,
        "value_range": config.value_range or run_data.get("value_range"),
        "channels_first": config.channels_first or run_data.get("channels_first", False),
    }
    ratios = config.mask_ratio or (run_model.get("mask_ratio", 0.75),)
    masks = [
        (ratio, strategy)
        for ratio in ratios
        for strategy in config.mask_strategy or (run_model.get("mask_strategy", "random"),)
    ]
    drawing = {
        "seed": config.seed,
        "num_rows": config.show,
        "visible": config.visible,
        "bands": config.bands or (0, 1, 2),
        "when": f"after {info.step:,} steps" if info.step is not None else "",
    }
    with usage_errors(_FLAGS):
        if reading["value_range"] is not None:
            check_value_range(reading["value_range"], model.in_chans)
        paths = _find_images(config.images)
        if config.draw_seed is not None:
            random.Random(config.draw_seed).shuffle(paths)
        model = on_device(model, config.device)
        images, names = _read(_shown_first(paths, config.show), set(config.images), model.img_size, reading)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        if len(masks) > 1:
            found = compare_masks(model, images, masks, config.out, names=names, **drawing)
        else:
            ((ratio, strategy),) = masks
            drawing |= {"path": config.out, "names": {"images": names}, "mask_ratio": ratio, "mask_strategy": strategy}
            found = evaluate_sets(model, {"images": images}, **drawing).values()
    measured = f", errors over {len(images)}" if len(images) < len(paths) else ""
    for numbers in found:
        print("images", *(f"{key} {value:.4f}" for key, value in numbers.items() if isinstance(value, float)), sep="  ")
        print(
            f"{numbers['num_shown']} of {len(paths):,} images shown{measured}; "
            f"{numbers['mask_ratio']:.0%} of patches masked, {numbers['mask_strategy']} masks"
        )
    print(f"Picture: {config.out}")
    return 0


def _find_images(given: Sequence[Path]) -> list[Path]:
    """The given files, and all image files in the given folders."""
    paths: list[Path] = []
    for path in given:
        if not path.is_dir():
            paths.append(path)
            continue
        files = [path / name for name in list_files(path) if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        if not files:
            raise UsageError(f"{path}: expected a folder with image files, found none")
        paths += files
    if not paths:
        raise UsageError("IMAGES: expected at least one image file or folder, got none")
    return paths


def _shown_first(paths: Sequence[Path], show: int) -> list[Path]:
    """The images to measure, spread evenly over all. Those to show, spread evenly over these, come first."""
    measured = [paths[i] for i in _spread(len(paths), max(_MEASURED, show))]
    shown = _spread(len(measured), show)
    return [measured[i] for i in shown] + [path for i, path in enumerate(measured) if i not in set(shown)]


def _spread(total: int, count: int) -> list[int]:
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _read(
    paths: Sequence[Path], named: set[Path], img_size: tuple[int, int], options: dict[str, Any]
) -> tuple[Tensor, list[str]]:
    """Images and their names. An unreadable file is skipped with a warning, but raises if it was given by name."""
    images, names = [], []
    for path in paths:
        try:
            images.append(read_images([path], img_size, **options))
        except DataError as error:
            # The messages name flags of fastmae pretrain; here the model is given.
            text = re.sub("; set --model.in-chans.*", ", as the model takes", str(error)).replace("--data.", "--")
            if path in named:
                raise UsageError(text) from error
            print(f"WARNING: skipped {text}", file=sys.stderr)
            continue
        names.append(path.stem)
    if not images:
        raise UsageError(f"IMAGES: none of {len(paths)} files can be read")
    return torch.cat(images), names
