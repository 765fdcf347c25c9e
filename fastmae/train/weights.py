"""Weights without a training run: exported, and put into a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastmae.model.image_model import NORM_EPS, check_weights
from fastmae.train.checkpoint import CheckpointError
from fastmae.train.checkpoint.format import Chunk, replace_file

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
