"""Programs that run without fastmae: ``torch.export`` and ONNX, of an encoder or a classifier."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmae.interop.facebook import PlainEncoder, weights_of
from fastmae.model import MaskedAutoencoderViT
from fastmae.model.image_model import NORM_EPS, ImageModel

_LARGEST_MESSAGE = 1_800_000_000
"""Bytes of weights that fit into an ONNX file, a protobuf of less than 2 GiB; more go into a second file."""


class _Program(nn.Module):
    """All tokens of an encoder, or a classifier's logits, from normalised images or, if ``raw``, from uint8 ones."""

    def __init__(self, model: ImageModel, raw: bool):
        super().__init__()
        architecture = model.architecture
        self.plain = PlainEncoder(architecture, architecture.get("norm_eps", NORM_EPS))
        self.plain.load_state_dict(weights_of(model), strict=True)
        for name in ("mean", "std"):
            values = torch.tensor(architecture[name]).view(-1, 1, 1)
            self.register_buffer(name, values if raw else None)

    def forward(self, images: Tensor) -> Tensor:
        return self.plain(images if self.mean is None else (images / 255 - self.mean) / self.std)


def _trace(model: ImageModel, raw: bool) -> torch.export.ExportedProgram:
    example = torch.zeros(2, model.in_chans, *model.img_size, dtype=torch.uint8 if raw else torch.float32)
    program = _Program(model, raw).eval()
    return torch.export.export(program, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _output_name(model: ImageModel) -> str:
    return "encoder tokens" if isinstance(model, MaskedAutoencoderViT) else "logits"


def write_program(model: ImageModel, path: Path, raw: bool) -> None:
    """Write a ``torch.export`` program (.pt2) that takes any batch size."""
    torch.export.save(_trace(model, raw), path)


def program_outputs(path: Path, model: ImageModel, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """What a program computes from a batch of one image and one of all others."""
    program = torch.export.load(path).module()
    return {_output_name(model): torch.cat([program(images[:1]), program(images[1:])])}


def write_onnx(model: ImageModel, path: Path, raw: bool) -> None:
    """Write an ONNX model of standard operators that takes any batch size, and the weights into ``.onnx.data`` beside
    it where they are too large for one file. Its metadata has the mean and standard deviation of pixels."""
    name = _output_name(model).rpartition(" ")[2]
    program = torch.onnx.export(_trace(model, raw), input_names=["images"], output_names=[name], verbose=False)
    program.model.metadata_props.update({key: json.dumps(model.architecture[key]) for key in ("mean", "std")})
    size = sum(tensor.nbytes for tensor in weights_of(model).values())
    program.save(path, external_data=size > _LARGEST_MESSAGE)


def onnx_outputs(path: Path, model: ImageModel, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """What onnxruntime computes on the CPU from a batch of one image and one of all others."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batches = [session.run(None, {"images": part.numpy()})[0] for part in (images[:1], images[1:])]
    return {_output_name(model): torch.cat([torch.from_numpy(batch) for batch in batches])}
