"""Weights without a training run: read from any file, put into a model, exported."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastmae.model.image_model import NORM_EPS, check_weights
from fastmae.train.checkpoint import CheckpointError, open_folder
from fastmae.train.checkpoint.format import Chunk, replace_file

_PICKLES = (".pth", ".pt", ".bin")
AVERAGE = "average"
"""Part of a checkpoint: the moving average of the weights, which takes their place outside of training."""


def export_weights(model: nn.Module, path: Path, **metadata: Any) -> Path:
    """Write the weights alone, under facebookresearch/mae's keys, as a ``.safetensors`` file, replaced atomically; the
    architecture and what else is JSON-able is its metadata. Raises CheckpointError if it cannot be written."""
    weights = model.state_dict()
    chunks = {name: Chunk.whole(tensor) for name, tensor in weights.items()}
    return replace_file(path, chunks, weights.__getitem__, {"architecture": model.architecture, **metadata})


def initialize(model: nn.Module, weights: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> str:
    """Put weights into a model, before its first step; return what was loaded, in words.

    The model's parameters may be sharded. Where there is no decoder among the weights, it keeps its own. Of their
    architecture the numbers of heads, which no shape shows, are compared.

    Raises:
        CheckpointError: naming the tensor that is missing, unknown, of another shape or not finite. Nothing is
            interpolated, and nothing was changed.
    """
    parameters = dict(model.named_parameters())
    decoder = {name for name in parameters if name.startswith("decoder_") or name == "mask_token"}
    has_decoder = not decoder.isdisjoint(weights)
    try:
        check_weights(parameters, weights, () if has_decoder else decoder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    for name in ("num_heads", "decoder_num_heads")[: 1 + has_decoder]:
        there, here = architecture.get(name), model.architecture[name]
        if there not in (None, here):
            raise CheckpointError(f"{name}: the weights are of a model with {there}, this one has {here}")
    with torch.no_grad():
        for name, tensor in weights.items():
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                tensor = tensor.to(parameter.device)
                tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(tensor)
    there, here = (known.get("norm_eps", NORM_EPS) for known in (architecture, model.architecture))
    notes = "" if there == here else f"; LayerNorm's epsilon was {there:g} there and is {here:g} here"
    if not has_decoder:
        return f"encoder only; they have no decoder, which is drawn anew{notes}"
    there, here = architecture.get("norm_pix_loss"), model.architecture["norm_pix_loss"]
    if there not in (None, here):
        targets = {True: "normalised pixels", False: "plain pixels"}
        notes += f"; the decoder was trained for {targets[there]} and goes on with {targets[here]}"
    return f"encoder and decoder{notes}"


def read_source(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under the names that the source has, on the CPU, and what it says about them; executes nothing.

    The source is a ``.pth`` file of facebookresearch/mae (weights, or a whole checkpoint with them under ``model``), a
    ``.safetensors`` file, a run folder (its newest undamaged checkpoint) or a checkpoint.

    Raises:
        CheckpointError: there is nothing of the kind, or it is damaged.
    """
    if path.is_dir():
        saved = open_folder(path)
        return saved.read_all("model.") | saved.read_all(f"{AVERAGE}."), dict(saved.manifest)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file or folder; expected a run folder, a checkpoint, or a file .safetensors or "
            f"{', '.join(_PICKLES)} of weights"
        )
    if path.suffix in _PICKLES:
        return _read_pickle(path)
    metadata = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key, text in (file.metadata() or {}).items():
                with suppress(ValueError):  # other libraries store plain text
                    metadata[key] = json.loads(text)
        return load_file(path), metadata
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a .safetensors file: {error}") from error


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        # facebookresearch/mae's training checkpoints hold their command's arguments: a Namespace, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile pickle raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not read, as it is no file of tensors alone: {reason}") from error
    args = {}
    if isinstance(loaded, Mapping) and isinstance(loaded.get("model"), Mapping):
        args = loaded.get("args", {})
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        loaded = loaded["model"]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{path}: expected a state dict, or one under the key model")
    return dict(loaded), {"args": dict(args)} if isinstance(args, Mapping) else {}
