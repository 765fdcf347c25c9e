"""Weights of a Hugging Face ViTMAE from its folder, under facebookresearch/mae's names. Needs no transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastmae.interop.hugging_face import facebook_name

_TABLES = {"vit.embeddings.position_embeddings": "pos_embed", "decoder.decoder_pos_embed": "decoder_pos_embed"}
_PARTS = re.compile(r"\.(?:attention\.(query|key|value)|([qkv])_proj)\.")
_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")


def is_hugging_face(path: Path) -> bool:
    """Whether this is a folder that ``save_pretrained`` of a transformers model has written."""
    try:
        return "model_type" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False


def read_hugging_face(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a ``ViTMAEForPreTraining`` or a ``ViTMAEModel`` (which has no decoder), on the CPU.

    Args:
        folder: what ``save_pretrained`` wrote, or a local copy of a model from the hub: ``config.json`` with
            ``model.safetensors``, its shards, or ``pytorch_model.bin`` (read without executing anything in it).

    Returns:
        Weights under facebookresearch/mae's names, and what their shapes do not say of the architecture.

    Raises:
        ValueError: if it is another kind of model, or its files cannot be read.
    """
    config = json.loads((folder / "config.json").read_text())
    for key, expected in (("model_type", "vit_mae"), ("hidden_act", "gelu")):
        if config.get(key, expected) != expected:
            raise ValueError(f"{folder / 'config.json'}: expected {key} {expected}, got {config[key]}")
    named = _read_files(folder)
    if not any(name.startswith("vit.") for name in named):
        named = {f"vit.{name}": tensor for name, tensor in named.items()}
    weights: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        # transformers 5 takes its decoder's layers for an encoder's when it gives them the names of version 4.
        name = name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")
        part = _PARTS.search(name)
        if part:
            packed.setdefault(facebook_name(name), {})[(part[1] or part[2])[0]] = tensor
        else:
            weights[_TABLES.get(name) or facebook_name(name)] = tensor
    for name, parts in packed.items():
        if parts.keys() != set("qkv"):
            raise ValueError(f"{folder}: {name}: expected queries, keys and values, got {', '.join(sorted(parts))}")
        weights[name] = torch.cat([parts[key] for key in "qkv"])
    for name in _TABLES.values():
        if name in weights and not weights[name].any():
            # transformers 5 leaves them so in a model that is built from a config.
            raise ValueError(f"{folder}: {name} is all zeros, so no patch can be told from another")
    # Where a config does not say, these are the defaults of transformers.ViTMAEConfig.
    return weights, {
        "num_heads": config.get("num_attention_heads", 12),
        "decoder_num_heads": config.get("decoder_num_attention_heads", 16),
        "norm_pix_loss": config.get("norm_pix_loss", False),
    }


def _read_files(folder: Path) -> dict[str, Tensor]:
    found = next((name for name in _FILES if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder}: expected one of {', '.join(_FILES)}, found none")
    try:
        if found.endswith(".bin"):
            return torch.load(folder / found, map_location="cpu", weights_only=True)
        if found.endswith(".safetensors"):
            return load_file(folder / found)
        shards = set(json.loads((folder / found).read_text())["weight_map"].values())
        return {name: tensor for shard in sorted(shards) for name, tensor in load_file(folder / shard).items()}
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{folder / found}: unreadable: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
