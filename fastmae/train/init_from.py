"""Starting a run from weights that another one has trained."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastmae.train.checkpoint import CheckpointError, Ranks, latest_checkpoint, load_checkpoint

_PICKLES = (".pth", ".pt", ".bin")


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under facebookresearch/mae's names, on the CPU, from whatever holds them; nothing in it is executed.

    Args:
        path: a ``.pth`` file of facebookresearch/mae (weights, or a whole checkpoint with them under ``model``), a
            ``.safetensors`` file under the same names, a run folder (its newest undamaged checkpoint) or a checkpoint.

    Returns:
        Weights, and the architecture that they belong to as far as the source says it.

    Raises:
        CheckpointError: if there is nothing of the kind, or it is damaged.
    """
    if path.is_dir():
        folder = path if path.name.startswith("step-") else latest_checkpoint(path, ranks=Ranks())
        weights, manifest = load_checkpoint(folder, prefix="model.", verify=folder == path)
        return weights, manifest["architecture"]
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _PICKLES:
        return _read_pickle(path), {}
    expected = ", ".join((".safetensors", *_PICKLES))
    raise CheckpointError(f"{path}: expected a run folder, a folder of a Hugging Face ViTMAE, or a file {expected}")


def initialize(model: nn.Module, weights: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> str:
    """Put weights into a model, before its first step; its parameters may be sharded.

    Args:
        model: a ``MaskedAutoencoderViT``. Where there is no decoder among the weights, it keeps its own.
        weights: of the encoder, or of both, under the model's names.
        architecture: what is known of theirs; numbers of heads, which no shape shows, are compared.

    Returns:
        What was loaded, in words.

    Raises:
        CheckpointError: naming the tensor that is missing, unknown, of another shape or not finite. Nothing is
            interpolated, and nothing was changed.
    """
    parameters = dict(model.named_parameters())
    decoder = {name for name in parameters if name.startswith("decoder_") or name == "mask_token"}
    has_decoder = not decoder.isdisjoint(weights)
    expected = parameters.keys() if has_decoder else parameters.keys() - decoder
    for name in parameters:
        if name in expected and name not in weights:
            raise CheckpointError(f"{name}: missing among the weights")
    unknown = weights.keys() - parameters.keys()
    if unknown:
        raise CheckpointError(f"{min(unknown)}: among the weights, but not a tensor of this model")
    for name in parameters:
        if name in weights:
            _check(name, weights[name], parameters[name])
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
    if not has_decoder:
        return "encoder only; they have no decoder, which is drawn anew"
    there, here = architecture.get("norm_pix_loss"), model.architecture["norm_pix_loss"]
    if there not in (None, here):
        targets = {True: "normalised pixels", False: "plain pixels"}
        return f"encoder and decoder; the decoder was trained for {targets[there]} and goes on with {targets[here]}"
    return "encoder and decoder"


def _check(name: str, tensor: Tensor, parameter: nn.Parameter) -> None:
    there, here = tuple(tensor.shape), tuple(parameter.shape)
    if there != here:
        hint = "; positions are not interpolated: --model.img-size must be that of the weights"
        table = name.endswith("pos_embed") and there[-1] == here[-1]
        raise CheckpointError(f"{name}: the weights' has shape {there}, this model's {here}{hint if table else ''}")
    if not tensor.isfinite().all():
        raise CheckpointError(f"{name}: has values that are not finite")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            architecture = (file.metadata() or {}).get("architecture")
        return load_file(path), _parse(architecture)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a .safetensors file: {error}") from error


def _parse(architecture: str | None) -> dict[str, Any]:
    """What ``export_weights`` stored; other libraries store other things under this name."""
    try:
        parsed = json.loads(architecture or "{}")
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # facebookresearch/mae's training checkpoints hold their command's arguments: a Namespace, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile pickle raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not read, as it is no file of tensors alone: {reason}") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("model"), Mapping):
        loaded = loaded["model"]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{path}: expected a state dict, or one under the key model")
    return dict(loaded)
