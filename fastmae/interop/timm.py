"""Weights as a folder of timm's: ``model.safetensors``, and ``config.json`` with sizes, statistics and pooling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fastmae.interop.facebook import weights_of
from fastmae.interop.files import read_folder, read_json
from fastmae.interop.hugging_face_weights import is_config
from fastmae.model import PRESETS, MaskedAutoencoderViT
from fastmae.model.image_model import ImageModel

_POOLS = {"cls": "token", "avg": "avg"}


def is_timm(path: Path) -> bool:
    """Whether this is a folder that timm has written for the hub, or a local copy of one."""
    return is_config(path, "architecture")


def read_timm(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a timm Vision Transformer on the CPU, and what their shapes do not say of it.

    Raises:
        ValueError: files that cannot be read, or a pooling that fastmae's classifier does not have.
    """
    config = read_json(folder / "config.json")
    weights = read_folder(folder)
    arguments, cfg = (config.get(name, {}) for name in ("model_args", "pretrained_cfg"))
    if not isinstance(arguments, dict) or not isinstance(cfg, dict):
        raise ValueError(f"{folder / 'config.json'}: expected objects model_args and pretrained_cfg")
    pool = arguments.get("global_pool", config.get("global_pool", "token"))
    if "head.weight" in weights and pool != ("avg" if "fc_norm.weight" in weights else "token"):
        raise ValueError(f"{folder}: expected global_pool token, or avg with a norm behind it, got {pool}")
    told = {name: arguments.get(name) for name in ("img_size", "num_heads")}
    return weights, told | {name: cfg.get(name) for name in ("mean", "std")}


def write(model: ImageModel, path: Path) -> None:
    """Write the encoder, or a classifier, as a folder for ``timm.create_model("local-dir:...", pretrained=True)``."""
    known = model.architecture
    sizes = {name: known[name] for name in ("embed_dim", "depth", "num_heads")}
    same = [
        name for name, p in PRESETS.items() if p.items() >= (sizes | {"patch_size": known["patch_size"][0]}).items()
    ]
    name = same[0].removeprefix("mae_") if same else "vit_base_patch16"
    classes, pool = known.get("num_classes", 0), _POOLS[known.get("pool", "cls")]
    arguments = sizes | {key: known[key] for key in ("img_size", "patch_size", "in_chans", "mlp_ratio")}
    config = {
        "architecture": f"{name}_224", "num_classes": classes, "num_features": known["embed_dim"], "global_pool": pool,
        "model_args": arguments | {"global_pool": pool},
        "pretrained_cfg": {
            "num_classes": classes, "input_size": [model.in_chans, *model.img_size], "fixed_input_size": True,
            "pool_size": None, "crop_pct": 0.875, "interpolation": "bicubic", "mean": known["mean"],
            "std": known["std"], "first_conv": "patch_embed.proj", "classifier": "head", "custom_load": False,
        },
    }  # fmt: skip
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in weights_of(model).items()}, path / "model.safetensors")


def outputs(path: Path, model: ImageModel, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """What timm computes from the folder.

    Raises:
        ValueError: timm understands other statistics or another pooling from it.
    """
    import timm

    peer = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    data = timm.data.resolve_data_config(model=peer)
    for name in ("mean", "std"):
        if list(data[name]) != model.architecture[name]:
            raise ValueError(f"timm takes {name} {data[name]} from the folder, not {model.architecture[name]}")
    found = {"encoder tokens": peer.forward_features(images)}
    return found if isinstance(model, MaskedAutoencoderViT) else found | {"logits": peer(images)}
