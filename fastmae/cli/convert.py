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
from fastmae.data import open_dataset, read_images
from fastmae.errors import UsageError, usage_errors
from fastmae.interop import export, facebook, timm, to_hugging_face
from fastmae.loading import WeightsInfo, load
from fastmae.model import AblatedMAE, MaskedAutoencoderViT
from fastmae.model.ablations import OPTIONS
from fastmae.model.image_model import NORM_EPS, ImageModel

TOLERANCE = 1e-4
"""Largest difference of an output relative to its largest value. Both are float32, but sum in different orders."""
_IMAGES = 4
"""Random ones, and as many photographs."""


class Target(NamedTuple):
    """What weights are written for."""

    write: Callable[[ImageModel, Path], None]
    outputs: Callable[[Path, ImageModel, Tensor, Tensor], dict[str, Tensor]]
    """What the library computes from (path, model, images, noise): some of the names of ``_outputs``."""
    example: str
    libraries: tuple[str, ...] = ("torch",)
    """What writing and reading import; the first one's version is printed."""
    requirement: str = "torch"
    suffix: str = ""
    """Of the file; empty for a folder."""
    decodes: bool = True
    """Whether a decoder can be written too."""
    raw: bool = False
    """Whether what is written takes uint8 images, if asked to; ``write`` is then told."""
    norm_eps: float | None = None
    """The only epsilon of LayerNorm that the target has; None: any."""


def convert(config: ConvertConfig) -> int:
    """Write weights, compare what the target computes from them, and only then move them to their place."""
    target, out = TARGETS[config.to], config.out
    if target.suffix and out.suffix != target.suffix:
        raise UsageError(f"OUT: --to {config.to} writes a {target.suffix} file, got {out}")
    if out.exists():
        raise UsageError(f"OUT: {out} exists already; remove it, or choose another name")
    if config.data_license is not None and config.to != "hub":
        raise UsageError(f"--data-license: --to {config.to} has no model card; expected it with --to hub only")
    if config.input == "uint8" and not target.raw:
        raise UsageError(f"--input uint8: --to {config.to} holds weights, not a program; expected float")
    for library in target.libraries:
        try:
            import_module(library)
        except ImportError as error:
            raise UsageError(f"--to {config.to} needs {library}: pip install '{target.requirement}'") from error
    given = {} if config.norm_pix_loss is None else {"norm_pix_loss": config.norm_pix_loss}
    model, info = load(config.weights, return_info=True, **given)
    _choose(config, target, model, info)
    write = target.write
    if config.to == "hub":
        write = partial(write, info=info, data_license=config.data_license)
    if config.to == "safetensors":
        write = partial(write, info=info)
    if target.raw:
        write = partial(write, raw=config.input == "uint8")
    with usage_errors(), torch.no_grad():
        pixels = _pixels(config.images, model)
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            written = Path(folder) / out.name
            write(model, written)
            _compare(model, written, target, pixels, config.input)
            for file in sorted(Path(folder).iterdir(), reverse=True):  # what OUT refers to, before OUT
                _share(file)
                file.rename(out.parent / file.name)
    library = target.libraries[0]
    print(f"{library} {version(library)} reads it: {target.example.format(out=out)}")
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
    if config.to not in ("safetensors", "hub") and isinstance(model, AblatedMAE):
        unusual = [f"{name} {model.architecture[name]}" for name in OPTIONS if name in model.architecture]
        if model.has_decoder:
            raise UsageError(
                f"--to {config.to} holds the paper's decoder, not that of a model with "
                f"{', '.join(unusual or ['decoder_depth 0'])}; --kind encoder writes the encoder alone"
            )
    if config.to in ("facebook", "transformers", "timm") and not info.architecture.get("class_token", True):
        raise UsageError(f"--to {config.to} holds encoders with a class token; {config.weights} has none")
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


def _write_hub(model: ImageModel, path: Path, info: WeightsInfo, data_license: str | None) -> None:
    from fastmae.hub import Pretrained

    Pretrained(model, data_license, info=info).save_pretrained(path)


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
    loss = {} if "num_outputs" in model.architecture else {"loss": out.loss}  # of pixels alone
    return found | {"predictions": out.pred} | loss


def _pixels(folder: Path | None, model: ImageModel) -> Tensor:
    """uint8 (2n, C, H, W): random images, and those of a folder or the embedded photographs, with channels in turn."""
    channels = 3 if folder is None else model.in_chans
    dataset = open_dataset(folder, **({} if folder is None else {"channels": channels}))
    count = min(_IMAGES, len(dataset))
    photographs = read_images([dataset.path(i) for i in range(count)], model.img_size, channels=channels)
    photographs = photographs[:, torch.arange(model.in_chans) % channels]
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, 256, photographs.shape, dtype=torch.uint8, generator=generator)
    return torch.cat([random, photographs])


def _compare(model: ImageModel, written: Path, target: Target, pixels: Tensor, dtype: str) -> None:
    """Print the largest difference of each output on random images and photographs, masked alike.

    Raises:
        ValueError: one exceeds the tolerance.
    """
    count = len(pixels) // 2
    noise = torch.rand(len(pixels), model.grid_size[0] * model.grid_size[1], generator=torch.Generator().manual_seed(0))
    images = pixels if dtype == "uint8" else model.normalized(pixels.float() / 255)
    ours = _outputs(model, images, noise)
    print(f"compared on {count} random images and {count} photographs:")
    for name, got in target.outputs(written, model, images, noise).items():
        expected = ours[name]
        if got.shape != expected.shape:
            shapes = f"{tuple(got.shape)} in {target.libraries[0]}, {tuple(expected.shape)} in fastmae"
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
        to_hugging_face.write, to_hugging_face.outputs, 'from_pretrained("{out}")', ("transformers",),
        "transformers>=5.0",
    ),
    "timm": Target(
        timm.write, timm.outputs, 'timm.create_model("local-dir:{out}", pretrained=True)', ("timm",), "timm>=1.0.15",
        decodes=False, norm_eps=NORM_EPS,
    ),
    "safetensors": Target(_write_own, _own_outputs, 'fastmae.load("{out}")', ("fastmae",), suffix=".safetensors"),
    "hub": Target(
        _write_hub, _own_outputs, 'fastmae.load("{out}"); upload it with hf upload OWNER/NAME {out}',
        ("fastmae", "huggingface_hub"), "fastmae[hub]",
    ),
    "torch-export": Target(
        export.write_program, export.program_outputs, 'torch.export.load("{out}").module()', suffix=".pt2",
        decodes=False, raw=True,
    ),
    "onnx": Target(
        export.write_onnx, export.onnx_outputs, 'onnxruntime.InferenceSession("{out}")',
        ("onnxruntime", "onnx", "onnxscript"), "fastmae[onnx]", suffix=".onnx", decodes=False, raw=True,
    ),
}  # fmt: skip
