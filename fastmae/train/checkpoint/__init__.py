"""Checkpoints: tensors in safetensors, everything else in a manifest that is written last, and nothing pickled.

``state`` collects what goes into a checkpoint, ``save`` and ``load`` do the work on any number of ranks, and ``format``
is what is on the disk.
"""

from fastmae.train.checkpoint.format import (
    MANIFEST,
    clean,
    list_checkpoints,
    refuse_url,
    set_aside_after,
    step_of,
)
from fastmae.train.checkpoint.load import (
    Checkpoint,
    consolidate,
    open_checkpoint,
    open_folder,
    open_latest,
    read_together,
)
from fastmae.train.checkpoint.save import CheckpointManager
from fastmae.train.ranks import CheckpointError, LostRankError, Ranks

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "CheckpointError",
    "CheckpointManager",
    "LostRankError",
    "Ranks",
    "clean",
    "consolidate",
    "list_checkpoints",
    "open_checkpoint",
    "open_folder",
    "open_latest",
    "read_together",
    "refuse_url",
    "set_aside_after",
    "step_of",
]
