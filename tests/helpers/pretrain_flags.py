"""Flags of a small run of ``fastmae pretrain``, for tests of several processes, signals and output."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from fastmae import pretraining

SIZES = {"img-size": 32, "patch-size": 8, "embed-dim": 32, "depth": 2, "num-heads": 2}
SIZES |= {"decoder-embed-dim": 16, "decoder-depth": 2, "decoder-num-heads": 2}
TRAIN = {"global-batch-size": 8, "batch-size": 8, "steps": 12, "warmup-steps": 3, "base-lr": 0.03, "device": "cpu"}
TRAIN |= {"precision": "fp32", "log-every-steps": 5, "checkpoint-every-steps": 8, "num-threads": 1}
DATA = {"loader": "torch", "num-threads": 1}
SECTIONS = {"model": SIZES, "train": TRAIN, "data": DATA}
FLAGS = [
    "pretrain",
    "--recipe",
    "photographs",
    "--train.optimizer",
    "adamw",
    *(text for s, v in SECTIONS.items() for k, x in v.items() for text in (f"--{s}.{k}", str(x))),
]


def no_evaluation() -> Any:
    """A context in which runs end without the final evaluation, which takes longer than a small run's training."""
    return patch.object(pretraining, "evaluate_sets", lambda *args, **options: {})
