"""``fastmae.load``: a model from any weights that it can run. One door for every command that takes WEIGHTS."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from math import isfinite, isqrt
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fastmae.interop.adapt import SIZES, STATISTICS, adapt
from fastmae.interop.facebook import ARGS, is_decoder
from fastmae.interop.files import PICKLES, first_line, read_file, read_json
from fastmae.interop.hugging_face_weights import is_hugging_face, read_hugging_face
from fastmae.interop.timm import is_timm, read_timm
from fastmae.model import PRESETS, MaskedAutoencoderViT, build_model
from fastmae.model.ablations import OPTIONS
from fastmae.model.classifier import VisionTransformer, create_vision_transformer
from fastmae.model.image_model import check_weights
from fastmae.train.checkpoint import CheckpointError, open_folder
from fastmae.train.weights import AVERAGE

HUB = "hf-hub:"
"""Before the name of a model on the Hugging Face hub; without it nothing is fetched."""
_NO_DECODER = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 1}
"""Of an encoder alone: the smallest, since it is never used."""
_HEADS = "a positive integer", lambda value: isinstance(value, int) and value > 0
_FINITE = "finite numbers", lambda values: all(isinstance(v, float | int) and isfinite(v) for v in values)
_UNBOUNDED = {
    "num_heads": _HEADS, "decoder_num_heads": _HEADS, "mean": _FINITE, "std": _FINITE,
    "mlp_ratio": ("a number below 1000", lambda value: isinstance(value, float | int) and 0 < value < 1000),
    "norm_pix_loss": ("True or False", lambda value: isinstance(value, bool)),
    "norm_eps": ("a number in (0, 1)", lambda value: isinstance(value, float | int) and 0 < value < 1),
}  # fmt: skip
"""Of an architecture, what no shape of a tensor contradicts."""


@dataclass(frozen=True)
class WeightsInfo:
    """What is known of some weights.

    Attributes:
        path: where they are.
        source: "fastmae", "transformers", "timm", or "facebookresearch/mae or timm" of files, whose names are the same.
        architecture: the arguments that build the model: of ``MaskedAutoencoderViT``, or of ``VisionTransformer`` if
            there is a head.
        assumed: numbers of heads that neither shapes nor source tell, and that are those of the preset of this width.
        has_decoder: whether images can be reconstructed.
        num_classes: of the head; None without one.
        norm_pix_loss: whether the decoder predicts normalised pixels; None: unknown.
        step: optimiser steps of the training; None: unknown.
        config: the configuration of a run of fastmae; empty for others.
    """

    path: Path
    source: str
    architecture: Mapping[str, Any]
    assumed: tuple[str, ...]
    has_decoder: bool
    num_classes: int | None
    norm_pix_loss: bool | None
    step: int | None
    config: Mapping[str, Any]

    @property
    def known(self) -> dict[str, Any]:
        """The architecture without what is assumed."""
        return {name: value for name, value in self.architecture.items() if name not in self.assumed}


@overload
def load(path: Path | str, *, return_info: Literal[False] = False, **architecture: Any) -> nn.Module: ...
@overload
def load(path: Path | str, *, return_info: Literal[True], **architecture: Any) -> tuple[nn.Module, WeightsInfo]: ...
def load(
    path: Path | str,
    *,
    return_info: bool = False,
    positions: str | None = "recompute",
    patches: str | None = None,
    channels: str | None = None,
    **architecture: Any,
) -> Any:
    """A model with the weights of a run, a checkpoint, or a file or folder of another library.

    Nothing in the source is executed. The architecture comes from the weights.

    Args:
        path: a run folder (its newest undamaged checkpoint), a checkpoint folder, a ``.safetensors`` file, a ``.pth``
            file of facebookresearch/mae or a state dict of timm's, or a folder: ``save_pretrained``'s of
            transformers' ViTMAE or ViT, timm's of a ViT, or :mod:`fastmae.hub`'s. "hf-hub:owner/name" is one of these
            folders on the Hugging Face hub, and the only source for which the network is used.
        return_info: return ``(model, WeightsInfo)``.
        positions, patches, channels: rules for weights of another ``img_size``, ``patch_size`` or ``in_chans`` than is
            asked for: "recompute" or "interpolate", "pseudo-inverse", and "repeat", "average" or "first-layer"; see
            :func:`fastmae.interop.adapt.adapt`.
        architecture: arguments of the model: what the weights do not tell (``num_heads``), what has no weights
            (``mean``, ``std``, ``norm_pix_loss``), or sizes for which there is a rule.

    Returns:
        On the CPU, in evaluation mode: a ``VisionTransformer`` for weights with a classifier's head, else a
        ``MaskedAutoencoderViT``. One of an encoder alone encodes, and raises where its decoder is needed.

    Raises:
        CheckpointError: nothing of the kind is there, or what is there does not fit together; names it.
    """
    weights, info = read_weights(path, positions=positions, patches=patches, channels=channels, **architecture)
    for name in ("img_size", "num_heads", "decoder_num_heads")[: 2 + info.has_decoder]:
        if name not in info.architecture:
            raise CheckpointError(f"{path}: neither its shapes nor its metadata tell {name}; give {name}=")
    try:
        with torch.device("meta"):
            model = _build(info)
        optional = () if info.has_decoder else {name for name in model.state_dict() if is_decoder(name)}
        check_weights(dict(model.named_parameters()), weights, optional)
        model.to_empty(device="cpu")  # only now, as large as the weights
        if optional:
            model.initialize_weights(0)
            model.decoder_pos_embed.zero_()
        model.load_state_dict(weights, strict=False)
    except Exception as error:  # sizes that a source tells can be anything
        raise _failure(info.path, error) from error
    if info.num_classes is None:
        model.has_decoder = info.has_decoder
    model.eval()
    return (model, info) if return_info else model


def create_classifier(
    name: str | None,
    num_classes: int,
    *,
    checkpoint: Path | str | None = None,
    positions: str = "recompute",
    patches: str | None = None,
    channels: str | None = None,
    **options: Any,
) -> VisionTransformer:
    """An encoder with a head for ``num_classes``, for fine-tuning.

    Args:
        name: ``vit_{tiny,small,base,large}_patch16`` or ``vit_huge_patch14``; None: what the checkpoint has.
        num_classes: classes of the head; 0 for the pooled feature.
        checkpoint: weights of the encoder, whatever :func:`load` takes; statistics of the pixels come from there too.
            None: all are drawn.
        positions, patches, channels: rules for a checkpoint of other images than ``options`` ask for, as for
            :func:`load`.
        options: arguments of ``VisionTransformer``, such as ``pool``, ``drop_path`` and ``img_size``.

    Raises:
        ValueError: an unknown name or option out of range.
        CheckpointError: the weights cannot be read or do not fit; names the first tensor.
    """
    if checkpoint is None:
        return create_vision_transformer(name, num_classes, **options)
    sizes = {name: options.get(name) for name in SIZES}
    weights, info = read_weights(checkpoint, positions=positions, patches=patches, channels=channels, **sizes)
    told = ("img_size", "patch_size", "in_chans", "mean", "std", "norm_eps", "class_token")
    told += ("embed_dim", "depth", "num_heads", "mlp_ratio") if name is None else ()
    for key in told:
        options.setdefault(key, info.architecture.get(key))
    model = create_vision_transformer(name or "vit_base_patch16", num_classes, **options)
    here, there = model.architecture, info.architecture
    if (here["depth"], here["embed_dim"]) != (there["depth"], there["embed_dim"]):
        raise CheckpointError(
            f"{checkpoint}: these are {there['depth']} blocks of {there['embed_dim']}; {name} has {here['depth']} of "
            f"{here['embed_dim']}"
        )
    if info.num_classes != num_classes:
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith("head.")}
    try:
        model.load_encoder(weights, positions=positions)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    return model


def read_weights(
    path: Path | str,
    *,
    positions: str | None = None,
    patches: str | None = None,
    channels: str | None = None,
    **architecture: Any,
) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Weights under facebookresearch/mae's names, on the CPU, and what is known of them; arguments as for :func:`load`.

    Raises:
        CheckpointError: as :func:`load`.
    """
    path = Path(path)
    try:
        path = download(str(path).removeprefix(HUB)) if str(path).startswith(HUB) else path
        source, weights, told, metadata = _read(path)
        found, assumed = _architecture(weights, told, architecture)
        wanted = {name: size for name in SIZES if (size := architecture.get(name)) is not None}
        if wanted and "img_size" in found:
            rules = {"positions": positions, "patches": patches, "channels": channels}
            weights, found = adapt(weights, found, wanted, **rules)
        found |= {name: architecture[name] for name in STATISTICS if architecture.get(name) is not None}
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path}: expected a Vision Transformer's weights; {error.args[0]} is missing") from error
    except Exception as error:  # what a damaged or hostile file says of itself raises anything
        raise _failure(path, error) from error
    has_decoder = "decoder_pred.weight" in weights
    norm_pix_loss = found.get("norm_pix_loss", told.get("norm_pix_loss")) if has_decoder else None
    more = found.get("num_classes"), norm_pix_loss, metadata.get("step"), metadata.get("config") or {}
    return weights, WeightsInfo(path, source, found, assumed, has_decoder, *more)


def _read(path: Path) -> tuple[str, dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Name of the source, weights, what it tells of the architecture, and its metadata."""
    if is_hugging_face(path):
        return "transformers", *read_hugging_face(path), {}
    if is_timm(path):
        return "timm", *read_timm(path), {}
    if path.is_dir() and not (path / "checkpoints").exists() and (path / "config.json").exists():
        read_json(path / "config.json")  # raises what is wrong with it
        weights, metadata = read_file(path / "model.safetensors")  # as fastmae.hub writes it
    elif path.is_dir():
        saved = open_folder(path)
        weights, metadata = saved.read_all("model.") | saved.read_all(f"{AVERAGE}."), dict(saved.manifest)
    elif path.is_file():
        weights, metadata = read_file(path)
    else:
        raise CheckpointError(
            f"{path}: no such file or folder; expected a run folder, a checkpoint, or a file .safetensors or "
            f"{', '.join(PICKLES)} of weights"
        )
    if isinstance(metadata.get("architecture"), dict):
        return "fastmae", weights, metadata["architecture"], metadata
    args = metadata.get("args", {})
    return "facebookresearch/mae or timm", weights, {name: args[name] for name in ARGS if name in args}, metadata


def download(name: str, revision: str | None = None, **options: Any) -> Path:
    """The local copy of a model on the hub, ``owner/name`` or ``owner/name@revision``, downloaded if it is missing.

    Args:
        options: more arguments of ``huggingface_hub.snapshot_download``.

    Raises:
        CheckpointError: huggingface_hub is not installed, or has no such model and cannot fetch it.
    """
    name, _, named = name.partition("@")
    try:
        from huggingface_hub import snapshot_download

        fetch = partial(snapshot_download, name, revision=revision or named or None, **options)
        folder = Path(fetch(allow_patterns=["*.json", "*.safetensors"]))
        if not [*folder.glob("*.safetensors")]:
            fetch(allow_patterns=["*.json", "*.bin"])
    except Exception as error:  # of the network, of the hub, of names
        raise CheckpointError(f"{HUB}{name}: {first_line(error)}") from error
    return folder


def _failure(path: Path, error: Exception) -> CheckpointError:
    text = " ".join(f"{error or type(error).__name__}".split())[:300]
    return CheckpointError(text if text.startswith(str(path)) else f"{path}: {text}")


def _build(info: WeightsInfo) -> MaskedAutoencoderViT | VisionTransformer:
    return build_model(info.architecture) if info.num_classes is None else VisionTransformer(**info.architecture)


def _architecture(
    weights: Mapping[str, Tensor], told: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments that build the model, from the shapes and from what the source tells; and those assumed.

    Raises:
        ValueError: the source tells something else than the shapes.
    """
    dim, channels, *patch = weights["patch_embed.proj.weight"].shape
    found: dict[str, Any] = {"patch_size": patch, "in_chans": channels, "embed_dim": dim}
    found["depth"] = _count(weights, r"blocks\.(\d+)\.")
    widths, kind, options = {"num_heads": dim}, MaskedAutoencoderViT, ["class_token"]
    if "head.weight" in weights:
        kind = VisionTransformer
        found |= {"num_classes": len(weights["head.weight"]), "pool": "avg" if "fc_norm.weight" in weights else "cls"}
    elif "decoder_pred.weight" not in weights:
        told = {name: value for name, value in told.items() if name not in _NO_DECODER}  # of one that is not here
        found |= _NO_DECODER
    else:
        options = [*OPTIONS]
        found["decoder_depth"] = _count(weights, r"decoder_blocks\.(\d+)\.", least=0)
        if found["decoder_depth"]:
            found["decoder_embed_dim"] = widths["decoder_num_heads"] = len(weights["decoder_embed.weight"])
    known = {*signature(kind).parameters, *options}
    told = {name: value for name, value in told.items() if value is not None and name in known}
    for name, shown in found.items():
        if told.get(name, shown) != shown:
            raise ValueError(f"{name}: the source says {told[name]!r}, its weights {shown}")
    found |= {"mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / dim} | told
    late = {*SIZES, *STATISTICS}  # these may be of other images than the weights
    found |= {name: value for name, value in given.items() if value is not None and name in known - late}
    assumed = []
    for name, width in widths.items():
        if name not in found:
            same = [p[name] for p in PRESETS.values() if p[name.replace("num_heads", "embed_dim")] == width]
            found |= {name: same[0]} if same else {}
            assumed += [name] if same else []
    if "img_size" not in found:
        positions, size = weights["pos_embed"].shape[1] - 1, given.get("img_size")
        rows, cols = (size, size) if isinstance(size, int) else size or (0, 0)
        if (rows // patch[0]) * (cols // patch[1]) == positions:
            found["img_size"] = [rows, cols]
        elif isqrt(positions) ** 2 == positions:
            found["img_size"] = [isqrt(positions) * length for length in patch]
    for name, (expected, holds) in _UNBOUNDED.items():
        if name in found and not holds(found[name]):
            raise ValueError(f"{name}: expected {expected}, got {found[name]!r}")
    return found, tuple(assumed)


def _count(weights: Mapping[str, Tensor], pattern: str, least: int = 1) -> int:
    """Number of blocks, which are numbered from 0 without a gap."""
    numbers = {int(match[1]) for name in weights if (match := re.match(pattern, name))}
    if len(numbers) < least or numbers != set(range(len(numbers))):
        raise ValueError(f"expected a Vision Transformer's weights, with blocks from 0, got {sorted(numbers)[:5]}")
    return len(numbers)
