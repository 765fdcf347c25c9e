"""``fastmae convert``: weights for another library, kept only if that library computes the same from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmae.cli.commands import ConvertConfig
from fastmae.errors import UsageError, usage_errors
from fastmae.interop import facebook, timm, to_hugging_face
from fastmae.loading import WeightsInfo, load
from fastmae.model import MaskedAutoencoderViT
from fastmae.model.image_model import NORM_EPS, ImageModel

TOLERANCE = 1e-4
"""Largest difference of an output relative to its largest value. Both are float32, but sum in different orders."""
_IMAGES = 4


class Target(NamedTuple):
    """What weights are written for."""

    write: Callable[[ImageModel, Path], None]
    outputs: Callable[[Path, ImageModel, Tensor, Tensor], dict[str, Tensor]]
    """What the library computes from (path, model, images, noise): some of the names of ``_outputs``."""
    example: str
    library: str = "torch"
    requirement: str = "torch"
    suffix: str = ""
    """Of the file; empty for a folder."""
    decodes: bool = True
    """Whether a decoder can be written too."""
    norm_eps: float | None = None
    """The only epsilon of LayerNorm that the target has; None: any."""


def convert(config: ConvertConfig) -> int:
    """Write weights, compare what the target computes from them, and only then move them to their place."""
    target, out = TARGETS[config.to], config.out
    if target.suffix and out.suffix != target.suffix:
        raise UsageError(f"OUT: --to {config.to} writes a {target.suffix} file, got {out}")
    if out.exists():
        raise UsageError(f"OUT: {out} exists already; remove it, or choose another name")
    try:
        import_module(target.library)
    except ImportError as error:
        raise UsageError(f"--to {config.to} needs {target.library}: pip install '{target.requirement}'") from error
    given = {} if config.norm_pix_loss is None else {"norm_pix_loss": config.norm_pix_loss}
    model, info = load(config.weights, return_info=True, **given)
    _choose(config, target, model, info)
    write = partial(_write_own, info=info) if config.to == "safetensors" else target.write
    with usage_errors(), torch.no_grad():
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            written = Path(folder) / out.name
            write(model, written)
            _compare(model, written, target)
            _share(written)
            written.rename(out)
    print(f"{target.library} {version(target.library)} reads it: {target.example.format(out=out)}")
    return 0


def _choose(config: ConvertConfig, target: Target, model: ImageModel, info: WeightsInfo) -> None:
    """Leave out the decoder if it is not wanted, and print what the target cannot have from the weights.

    Raises:
        UsageError: the weights lack what is asked for, or do not say enough.
    """
    if config.kind != "auto" and info.num_classes is not None:
        raise UsageError(f"--kind {config.kind}: {config.weights} is a classifier; expected auto")
    if config.kind == "pretraining" and not info.has_decoder:
        raise UsageError(f"--kind pretraining needs a decoder; {config.weights} is an encoder alone")
    if config.kind == "pretraining" and not target.decodes:
        raise UsageError(f"--kind pretraining: --to {config.to} takes no decoder; expected auto or encoder")
    if info.num_classes is None:
        model.has_decoder = info.has_decoder and target.decodes and config.kind != "encoder"
        if info.norm_pix_loss is None:
            del model.architecture["norm_pix_loss"]
            if model.has_decoder and config.to == "transformers":
                raise UsageError(
                    f"--norm-pix-loss: {config.weights} does not say whether its decoder predicts normalised pixels, "
                    "which transformers must know; pass True or False"
                )
    if info.assumed:
        assumed = ", ".join(f"{name} {info.architecture[name]}" for name in info.assumed)
        print(f"assumed, as in other models of this width: {assumed}")
    eps = info.architecture.get("norm_eps", NORM_EPS)
    if target.norm_eps not in (None, eps):
        print(
            f"LayerNorm's epsilon of {eps:g} becomes {target.norm_eps:g}, which changes outputs by what is shown here"
        )


def _write_own(model: ImageModel, path: Path, info: WeightsInfo) -> None:
    known = {"architecture": model.architecture, "step": info.step, "config": dict(info.config) or None}
    metadata = {name: json.dumps(value) for name, value in known.items() if value is not None}
    save_file(facebook.weights_of(model), path, {"format": "pt", **metadata})


def _own_outputs(path: Path, model: ImageModel, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    return _outputs(load(path), images, noise)


def _share(written: Path) -> None:
    """Give files the permissions of new ones; safetensors lets their owner alone read them."""
    umask = os.umask(0)
    os.umask(umask)
    for file in written.iterdir() if written.is_dir() else [written]:
        file.chmod(0o666 & ~umask)


def _outputs(model: ImageModel, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """All that weights are compared by: tokens of whole images, and logits, or predictions and loss under a mask."""
    found = {"encoder tokens": model.encode(images)}
    if not isinstance(model, MaskedAutoencoderViT):
        return found | {"logits": model(images)}
    if not model.has_decoder:
        return found
    out = model(images, noise=noise)
    return found | {"predictions": out.pred, "loss": out.loss}


def _compare(model: ImageModel, written: Path, target: Target) -> None:
    """Print the largest difference of each output on random images, masked alike.

    Raises:
        ValueError: one exceeds the tolerance.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, model.in_chans, *model.img_size, generator=generator)
    noise = torch.rand(_IMAGES, model.grid_size[0] * model.grid_size[1], generator=generator)
    ours = _outputs(model, images, noise)
    for name, got in target.outputs(written, model, images, noise).items():
        expected = ours[name]
        if got.shape != expected.shape:
            shapes = f"{tuple(got.shape)} in {target.library}, {tuple(expected.shape)} in fastmae"
            raise ValueError(f"{name}: shape {shapes}; nothing was written")
        difference, tolerance = float((got - expected).abs().max()), TOLERANCE * float(expected.abs().max())
        text = f"{name}: largest difference {difference:.2g}, tolerance {tolerance:.2g}"
        if not difference <= tolerance:  # true of NaN too
            raise ValueError(f"{text}; nothing was written")
        print(text)


TARGETS = {
    "facebook": Target(
        facebook.write, facebook.outputs, 'load_state_dict(torch.load("{out}")["model"])', suffix=".pth",
        norm_eps=NORM_EPS,
    ),
    "transformers": Target(
        to_hugging_face.write, to_hugging_face.outputs, 'from_pretrained("{out}")', "transformers",
        "transformers>=5.0",
    ),
    "timm": Target(
        timm.write, timm.outputs, 'timm.create_model("local-dir:{out}", pretrained=True)', "timm", "timm>=1.0.15",
        decodes=False, norm_eps=NORM_EPS,
    ),
    "safetensors": Target(_write_own, _own_outputs, 'fastmae.load("{out}")', "fastmae", suffix=".safetensors"),
    "torch-export": Target(
        facebook.export, facebook.exported_outputs, 'torch.export.load("{out}").module()', suffix=".pt2",
        decodes=False,
    ),
}  # fmt: skip
