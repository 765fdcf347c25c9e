"""Robustness of a classifier (paper, table 13): images of other kinds of some of its classes, and corrupted images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmae.evaluate.features import encode_images, pool_tokens
from fastmae.evaluate.labelled import LabelledImages

_TOP = 5


def read_class_names(path: Path) -> list[str]:
    """Names of a classifier's outputs in their order: a file's lines, or the folders in a training folder, sorted."""
    if path.is_dir():
        return sorted(folder.name for folder in _folders(path))
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def number_classes(images: LabelledImages, names: Sequence[str]) -> LabelledImages:
    """Images with their classes numbered as in ``names``.

    Raises:
        ValueError: a class that is not among them.
    """
    own = images.dataset.classes
    numbers = {name: number for number, name in enumerate(names)}
    used = [own[label] if label < len(own) else str(label) for label in range(images.labels.max() + 1)]
    strange = [used[label] for label in np.unique(images.labels) if used[label] not in numbers]
    if strange:
        more = f", ... ({len(strange)} in all)" if len(strange) > 3 else ""
        raise ValueError(
            f"{images.dataset.root}: expected classes that the classifier has ({', '.join(names[:3])}, ...), got "
            f"{', '.join(strange[:3])}{more}"
        )
    return images._replace(labels=np.array([numbers.get(name, -1) for name in used])[images.labels])


def classify(model: nn.Module, images: LabelledImages, **options: Any) -> dict[str, Any]:
    """Accuracy of a classifier on images of some or all of its classes.

    Args:
        model: a ``VisionTransformer`` with a head.
        images: classes numbered as the head's outputs.
        options: of :func:`fastmae.evaluate.features.encode_images`.

    Returns:
        ``top1`` and, with more than five classes, ``top5`` among the classes that the images have, as ImageNet-A and
        ImageNet-R are evaluated; ``top1_all_classes`` among all; shares of the ``images``, the number of readable ones.

    Raises:
        ValueError: no image could be read.
    """
    classes = torch.from_numpy(np.unique(images.labels)).to(model.mean.device)

    def best(tokens: Tensor) -> Tensor:
        logits = model.head(pool_tokens(model, tokens, model.pool))
        among = classes[logits[:, classes].topk(min(_TOP, len(classes))).indices]
        return torch.cat([logits.argmax(1, keepdim=True), among], 1)

    found, readable = encode_images(model, images.dataset, images.sample_ids, best, **options)
    if not bool(readable.any()):
        raise ValueError(f"{images.dataset.root}: none of the {len(readable)} images could be read")
    hits = (found == torch.from_numpy(images.labels).to(found.device)[:, None])[readable].double()
    top5 = {"top5": float(hits[:, 1:].sum(1).mean())} if len(classes) > _TOP else {}
    accuracies = {"top1": float(hits[:, 1].mean()), **top5, "top1_all_classes": float(hits[:, 0].mean())}
    return accuracies | {"images": len(hits), "classes": len(classes)}


def corruption_folders(root: Path) -> dict[str, list[Path]]:
    """The folders of each corruption's severities, below which there is a folder per class, as in ImageNet-C.

    Raises:
        ValueError: a folder of a corruption without any, or no corruption.
    """
    found = {folder.name: _folders(folder) for folder in _folders(root)}
    empty = [name for name, severities in found.items() if not all(map(_folders, severities)) or not severities]
    if empty or not found:
        raise ValueError(f"{root / empty[0] if found else root}: expected folders corruption/severity/class/image")
    return found


def read_reference(path: Path, corruptions: Sequence[str]) -> dict[str, float]:
    """The errors of the reference classifier by corruption: a JSON object of shares, means over the severities.

    Raises:
        ValueError: not such a file, or a corruption is missing.
    """
    try:
        errors = {name: float(error) for name, error in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a JSON object of an error per corruption: {error}") from error
    for name in corruptions:
        if not 0 < errors.get(name, math.nan) <= 1:
            raise ValueError(f"{path}: expected an error of {name} in (0, 1], got {errors.get(name, 'none')}")
    return errors


def mean_corruption_error(errors: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """The mean over corruptions of the error relative to a reference classifier's; 1 is as robust as that.

    Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
    ICLR 2019, whose reference is AlexNet.
    """
    return float(np.mean([error / reference[name] for name, error in errors.items()]))


def _folders(path: Path) -> list[Path]:
    return sorted(inner for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith("."))
