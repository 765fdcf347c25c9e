"""Checkpoints: tensors in safetensors, everything else in a manifest that is written last, and nothing pickled.

A checkpoint is a folder ``checkpoints/step-N``. Each rank writes what it holds into a file of its own; when all are on
the disk, rank 0 lists them with sizes and SHA-256 in ``manifest.json`` and renames ``step-N.tmp``. So a folder of that
name is whole, and damage that comes later is seen before anything is read. One process without ``torch.distributed``
is one rank. Any number of ranks reads what any other has written.

The tensor files are those of ``torch.distributed.checkpoint`` (DCP) with safetensors storage: its
``HuggingFaceStorageReader`` reads and reshards them. Its writer is not used, since it holds a rank's file in memory
twice and takes no checksums; neither is its reader, which opens every file on every rank.
"""

from fastmae.train.checkpoint.background import BackgroundSaver
from fastmae.train.checkpoint.consolidation import consolidate
from fastmae.train.checkpoint.folder import (
    MANIFEST,
    CheckpointError,
    as_url,
    clean,
    list_checkpoints,
    read_manifest,
    refuse_url,
    set_aside_after,
)
from fastmae.train.checkpoint.ranks import LostRankError, Ranks
from fastmae.train.checkpoint.read import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    open_checkpoint,
    open_latest,
    verify_checkpoint,
)
from fastmae.train.checkpoint.replicas import read_together
from fastmae.train.checkpoint.write import save_checkpoint

__all__ = [
    "MANIFEST",
    "BackgroundSaver",
    "Checkpoint",
    "CheckpointError",
    "LostRankError",
    "Ranks",
    "as_url",
    "clean",
    "consolidate",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "open_checkpoint",
    "open_latest",
    "read_manifest",
    "read_together",
    "refuse_url",
    "save_checkpoint",
    "set_aside_after",
    "verify_checkpoint",
]
