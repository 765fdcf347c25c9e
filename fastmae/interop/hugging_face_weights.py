"""Weights of a Hugging Face ViTMAE or ViT folder, under facebookresearch/mae's names. Needs no transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmae.interop.files import read_folder, read_json
from fastmae.interop.hugging_face import facebook_name

TABLES = {"vit.embeddings.position_embeddings": "pos_embed", "decoder.decoder_pos_embed": "decoder_pos_embed"}
PARTS = re.compile(r"\.(?:attention\.(query|key|value)|([qkv])_proj)\.")


def is_hugging_face(path: Path) -> bool:
    """Whether this is a folder that ``save_pretrained`` of a transformers model has written."""
    return is_config(path, "model_type")


def is_config(path: Path, key: str) -> bool:
    """Whether this is a folder whose ``config.json`` has some text under a key."""
    try:
        return isinstance(read_json(path / "config.json").get(key), str)
    except ValueError:
        return False


def read_hugging_face(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a ``ViTMAEForPreTraining``, ``ViTMAEModel``, ``ViTModel`` or ``ViTForImageClassification``, on the
    CPU. A ``ViTModel``'s pooler, a layer that its users train, is left out.

    Args:
        folder: what ``save_pretrained`` wrote, or a local copy of a model from the hub: ``config.json`` with
            ``model.safetensors``, its shards, or ``pytorch_model.bin`` (read without executing anything in it).

    Returns:
        Weights under facebookresearch/mae's names, and what their shapes do not say of the architecture.

    Raises:
        ValueError: if it is another kind of model, or its files cannot be read.
    """
    config = read_json(folder / "config.json")
    for key, expected in (("model_type", ("vit_mae", "vit")), ("hidden_act", ("gelu",))):
        if config.get(key, expected[0]) not in expected:
            raise ValueError(f"{folder / 'config.json'}: expected {key} {' or '.join(expected)}, got {config[key]}")
    named = read_folder(folder)
    if not any(name.startswith("vit.") for name in named):
        named = {f"vit.{name}": tensor for name, tensor in named.items()}
    weights: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        # transformers 5 takes its decoder's layers for an encoder's when it gives them the names of version 4.
        name = name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")
        part = PARTS.search(name)
        if name.startswith("vit.pooler."):
            continue
        if part:
            packed.setdefault(facebook_name(name), {})[(part[1] or part[2])[0]] = tensor
        else:
            weights[TABLES.get(name) or facebook_name(name)] = tensor
    for name, parts in packed.items():
        if parts.keys() != set("qkv"):
            raise ValueError(f"{folder}: {name}: expected queries, keys and values, got {', '.join(sorted(parts))}")
        weights[name] = torch.cat([parts[key] for key in "qkv"])
    for name in TABLES.values():
        if name in weights and not weights[name].any():
            # transformers 5 leaves them so in a model that is built from a config.
            raise ValueError(f"{folder}: {name} is all zeros, so no patch can be told from another")
    # Where a config does not say, these are the defaults of transformers' ViTMAEConfig and ViTConfig.
    told = {
        "img_size": _image_size(folder, config, weights),
        "num_heads": config.get("num_attention_heads", 12),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
    }
    if "decoder_pred.weight" in weights:
        told["decoder_num_heads"] = config.get("decoder_num_attention_heads", 16)
        told["norm_pix_loss"] = config.get("norm_pix_loss", False)
    return weights, told | _statistics(folder)


def _image_size(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> list[int] | None:
    """[height, width] by the config; None where the weights do not have these tensors, which is reported elsewhere."""
    size, shapes = config.get("image_size", 224), [weights.get(n) for n in ("patch_embed.proj.weight", "pos_embed")]
    size = size if isinstance(size, list) else [size, size]
    if any(tensor is None for tensor in shapes):
        return None
    (_, _, height, width), (_, positions, _) = (tensor.shape for tensor in shapes)
    numbers = len(size) == 2 and all(isinstance(length, int) for length in size)
    if not numbers or (size[0] // height) * (size[1] // width) + 1 != positions:
        raise ValueError(f"{folder}: image_size {size} does not fit the {positions - 1} patches of the position table")
    return size


def _statistics(folder: Path) -> dict[str, Any]:
    """Mean and standard deviation of the pixels that the folder's image processor subtracts and divides by."""
    file = folder / "preprocessor_config.json"
    processor = read_json(file) if file.exists() else {}
    if not processor.get("do_normalize", True):
        return {}
    return {name: processor[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in processor}
