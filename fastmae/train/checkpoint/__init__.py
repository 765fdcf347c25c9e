"""Checkpoints: tensors in safetensors, everything else in a manifest that is written last, and nothing pickled.

``state`` collects what goes into a checkpoint, ``save`` and ``load`` do the work on any number of ranks, and ``format``
is what is on the disk.
"""

from fastmae.train.checkpoint.format import list_checkpoints, step_of
from fastmae.train.checkpoint.load import Checkpoint, consolidate, open_checkpoint, open_folder, open_latest
from fastmae.train.checkpoint.save import CheckpointManager
from fastmae.train.ranks import CheckpointError, LostRankError, Ranks

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointManager",
    "LostRankError",
    "Ranks",
    "consolidate",
    "list_checkpoints",
    "open_checkpoint",
    "open_folder",
    "open_latest",
    "step_of",
]
