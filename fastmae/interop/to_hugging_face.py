"""Weights as a folder that ``from_pretrained`` of transformers reads: ViTMAE, ViT, or ViT for classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmae.interop.facebook import weights_of
from fastmae.interop.hugging_face import facebook_name
from fastmae.interop.hugging_face_weights import PARTS, TABLES
from fastmae.model import MaskedAutoencoderViT
from fastmae.model.image_model import NORM_EPS, ImageModel

_BICUBIC = 3


def write(model: ImageModel, path: Path) -> None:
    """Write a folder of ``ViTMAEForPreTraining``, of ``ViTModel`` for an encoder alone, or of
    ``ViTForImageClassification``, with an image processor that has the model's statistics.

    Raises:
        ValueError: the class cannot compute what the model does; names the reason.
    """
    import transformers

    config = _config(model)
    kind = _class(model)
    peer = kind(config, add_pooling_layer=False) if kind is transformers.ViTModel else kind(config)
    weights = weights_of(model)
    state = {}
    for name in peer.state_dict():
        full = f"vit.{name}" if kind is transformers.ViTModel else name
        tensor = weights[TABLES.get(full) or facebook_name(full)]
        part = PARTS.search(full)  # queries, keys and values are one matrix in facebookresearch's models
        state[name] = tensor.chunk(3)["qkv".index((part[1] or part[2])[0])] if part else tensor
    peer.load_state_dict(state, strict=True)
    peer.save_pretrained(path)
    height, width = model.img_size
    mean, std = (model.architecture[name] for name in ("mean", "std"))
    size = {"height": height, "width": width}
    processor = transformers.ViTImageProcessor(size=size, resample=_BICUBIC, image_mean=mean, image_std=std)
    processor.save_pretrained(path)


def outputs(path: Path, model: ImageModel, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """What transformers computes from the folder."""
    import transformers

    kind = _class(model)
    options = {"add_pooling_layer": False} if kind is transformers.ViTModel else {}
    peer = kind.from_pretrained(path, **options).eval()
    if kind is transformers.ViTModel:
        return {"encoder tokens": peer(images).last_hidden_state}
    if kind is transformers.ViTForImageClassification:
        return {"encoder tokens": peer.vit(images).last_hidden_state, "logits": peer(images).logits}
    out = peer(images, noise=noise)
    peer.config.mask_ratio = 0.0  # all patches, in the order of this noise
    in_order = torch.arange(noise.shape[1], dtype=noise.dtype).expand_as(noise)
    tokens = peer.vit(images, noise=in_order).last_hidden_state
    return {"encoder tokens": tokens, "predictions": out.logits, "loss": out.loss}


def _class(model: ImageModel) -> type[nn.Module]:
    import transformers

    if not isinstance(model, MaskedAutoencoderViT):
        return transformers.ViTForImageClassification
    return transformers.ViTMAEForPreTraining if model.has_decoder else transformers.ViTModel


def _config(model: ImageModel) -> Any:
    import transformers

    known = model.architecture
    sizes = {"image_size": model.img_size, "patch_size": model.patch_size}
    square = {name: height for name, (height, width) in sizes.items() if height == width}
    options = {
        **sizes, **square, "num_channels": model.in_chans, "hidden_size": known["embed_dim"],
        "num_hidden_layers": known["depth"], "num_attention_heads": known["num_heads"],
        "intermediate_size": int(known["embed_dim"] * known["mlp_ratio"]),
        "layer_norm_eps": known.get("norm_eps", NORM_EPS),
    }  # fmt: skip
    if not isinstance(model, MaskedAutoencoderViT):
        if known["pool"] != "cls":
            raise ValueError(
                "ViTForImageClassification classifies the class token; these weights pool the patch tokens"
            )
        return transformers.ViTConfig(**options, num_labels=known["num_classes"])
    if not model.has_decoder:
        return transformers.ViTConfig(**options)
    for name, (height, width) in sizes.items():
        if height != width:
            raise ValueError(f"ViTMAEForPreTraining takes square images and patches, {name} is {height} x {width}")
    width = known["decoder_embed_dim"]
    return transformers.ViTMAEConfig(
        **options, decoder_hidden_size=width, decoder_num_hidden_layers=known["decoder_depth"],
        decoder_num_attention_heads=known["decoder_num_heads"],
        decoder_intermediate_size=int(width * known["mlp_ratio"]), norm_pix_loss=model.norm_pix_loss,
    )  # fmt: skip
