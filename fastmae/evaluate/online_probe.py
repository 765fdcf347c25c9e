"""How good features are: nearest neighbours and a linear classifier on frozen features of labelled images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from fastmae.evaluate.features import Features, join_ranks, pooled_features
from fastmae.evaluate.frozen import accuracies, split_of
from fastmae.evaluate.knn import knn_scores
from fastmae.evaluate.labelled import LabelledImages
from fastmae.evaluate.linear import fit_linear

_KINDS = {"": "pooled", "_class_token": "class_token"}
"""Behind the name of each number: what was pooled stands for the model, as it has no token of its own to learn."""

Gather = Callable[[Features], list[Features] | None]


def probe(
    model: nn.Module,
    known: LabelledImages,
    tests: LabelledImages,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
    num_threads: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
    timeout: float = 600.0,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float] | None:
    """Classify test images by the frozen encoder's features, two ways; the model is afterwards as it was before.

    Args:
        model: a ``MaskedAutoencoderViT``, in any state of its training, sharded or not.
        known: the images to learn from.
        tests: the images to classify, of another data set or the same; labels by the numbers of ``known``'s.
        dtype, batch_size, num_threads, timeout, on_batch: as for :func:`encode_images`.
        rank, world_size: of the processes that share the images; each of them calls this.
        gather: given this rank's features, those of all ranks on the first one, and None on the others.

    Returns:
        The numbers of :func:`judge`; None where ``gather`` gave None.

    Raises:
        ValueError: what :func:`encode_images` and :func:`judge` refuse.
    """
    options = {"dtype": dtype, "batch_size": batch_size, "num_threads": num_threads, "timeout": timeout}
    options |= {"rank": rank, "world_size": world_size, "on_batch": on_batch}
    extract = partial(pooled_features, model, **options)
    found = []
    for images in (known, tests):
        own = extract(images.dataset, images.sample_ids)
        parts = [own] if gather is None else gather(own)
        found.append(join_ranks(parts) if parts else None)
    if None in found:
        return None
    return judge(found[0], known.labels, found[1], tests.labels)


def judge(known: Features, labels: np.ndarray, tests: Features, test_labels: np.ndarray) -> dict[str, float]:
    """Accuracies of classifying by features.

    Images that could not be read are left out. Test images of a class that is not among the known ones count as
    misclassified.

    Args:
        known, labels: n features to learn from and their classes, int64 (n,), any numbers.
        tests, test_labels: m features to classify, and their classes.

    Returns:
        ``knn_top1``, ``linear_top1`` (:func:`knn_scores` with its defaults, :func:`fit_linear`) of the pooled patch
        tokens, ``knn_top5`` with more than five classes; the same of the class token, with ``_class_token`` behind the
        name. Shares of the test images, from 0 to 1. Also ``unreadable``, the number of images left out, if any was.

    Raises:
        ValueError: what :func:`split_of` refuses.
    """
    values: dict[str, float] = {}
    for suffix, kind in _KINDS.items():
        bank, queries = getattr(known, kind), getattr(tests, kind)
        if not bank.shape[1]:  # the encoder has no class token
            continue
        split = split_of(bank, labels, known.readable, queries, test_labels, tests.readable)
        votes = accuracies(knn_scores(split.inputs, split.labels, split.tests), split)
        values |= {f"knn_{name}{suffix}": value for name, value in votes.items()}
        classifier = fit_linear(split.inputs, split.labels)
        values[f"linear_top1{suffix}"] = accuracies(classifier.scores(split.tests), split)["top1"]
    unreadable = sum(int((~part.readable).sum()) for part in (known, tests))
    return values | ({"unreadable": unreadable} if unreadable else {})
