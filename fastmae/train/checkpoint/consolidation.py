"""One safetensors file from a checkpoint of any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

from fastmae.train.checkpoint.folder import CheckpointError
from fastmae.train.checkpoint.ranks import Ranks
from fastmae.train.checkpoint.read import open_checkpoint
from fastmae.train.checkpoint.tensor_file import write_tensors


def consolidate(folder: Path, out: Path, *, optimizer: bool = False) -> Path:
    """Write the tensors of a checkpoint into one file, holding one tensor in memory at a time.

    Args:
        folder: a checkpoint, ``step-N``; it is verified first.
        out: a ``.safetensors`` file; replaced atomically.
        optimizer: False writes the weights, under facebookresearch/mae's keys and with the architecture in the
            metadata, as an export does; True writes every tensor, under the names that it has in the checkpoint.

    Raises:
        CheckpointError: if the checkpoint is damaged or the file cannot be written.
    """
    checkpoint = open_checkpoint(folder, ranks=Ranks())
    prefix = "" if optimizer else "model."
    pieces = {
        name.removeprefix(prefix): entry.whole for name, entry in checkpoint.tensors.items() if name.startswith(prefix)
    }
    kept = {key: checkpoint.manifest[key] for key in ("architecture", "step", "config") if key in checkpoint.manifest}
    metadata = {"format": "pt", **{key: json.dumps(value) for key, value in kept.items()}}
    partial = out.with_name(f".{out.name}.tmp")
    try:
        write_tensors(partial, pieces, lambda name: checkpoint.read(prefix + name), metadata)
        return partial.replace(out)
    except OSError as error:
        raise CheckpointError(f"could not write {out}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
