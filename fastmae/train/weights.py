"""Weights without a training run: exporting them at its end, and building a model from any of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from fastmae.train.checkpoint import CheckpointError, Ranks, latest_checkpoint, load_checkpoint
from fastmae.train.checkpoint.format import save_tensors
from fastmae.train.state import load_weights


def export_weights(model: nn.Module, path: Path, **metadata: Any) -> Path:
    """Write the weights alone, under facebookresearch/mae's keys, with the architecture in the file's metadata.

    Args:
        model: a ``MaskedAutoencoderViT``.
        path: a ``.safetensors`` file; replaced atomically.
        **metadata: JSON-able values to store beside ``architecture``.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    texts = {key: json.dumps(value) for key, value in {"architecture": model.architecture, **metadata}.items()}
    partial = path.with_name(f".{path.name}.tmp")
    try:
        save_tensors(partial, model.state_dict(), {"format": "pt", **texts})
        return partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error}") from error


def load_model(path: Path | str, *, need_decoder: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """A model with the weights of a run folder, a checkpoint folder or an exported ``.safetensors`` file.

    Args:
        path: a run folder gives its newest undamaged checkpoint.
        need_decoder: refuse weights of an encoder alone; otherwise the decoder keeps its initial values.

    Returns:
        The model, on the CPU and in evaluation mode, and the manifest (of a file: its metadata), with
        ``"has_decoder"`` added.

    Raises:
        CheckpointError: if nothing usable is there, or it has no decoder though one is needed.
    """
    from fastmae.model import MaskedAutoencoderViT

    path = Path(path)
    if path.is_dir():
        is_checkpoint = path.name.startswith("step-")
        folder = path if is_checkpoint else latest_checkpoint(path, ranks=Ranks())
        weights, manifest = load_checkpoint(folder, prefix="model.", verify=is_checkpoint)
    else:
        weights, manifest = _read_file(path)
    has_decoder = any(name.startswith("decoder_pred.") for name in weights)
    if need_decoder and not has_decoder:
        raise CheckpointError(f"{path}: has no decoder (no decoder_pred.* weights); it cannot reconstruct images")
    try:
        model = MaskedAutoencoderViT(**manifest["architecture"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its architecture is not one of this version: {error}") from error
    if not has_decoder:
        decoder = {n: t for n, t in model.state_dict().items() if n.startswith("decoder_") or n == "mask_token"}
        weights = {**decoder, **weights}
    load_weights(model, weights)
    return model.eval(), {**manifest, "has_decoder": has_decoder}


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; expected a run folder, a checkpoint or a .safetensors file"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a .safetensors file: {error}") from error
    if "architecture" not in metadata:
        raise CheckpointError(f"{path}: its metadata has no architecture; it was not exported by fastmae")
    return weights, {key: json.loads(value) for key, value in metadata.items() if key != "format"}
