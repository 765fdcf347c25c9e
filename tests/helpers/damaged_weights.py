"""Damaged and hostile files of weights, and a process that tries to load them.

``damaged_weights.py FOLDER FIRST COUNT`` prints a line of JSON: what was not refused by name, and by how many
kilobytes a file raised the peak of memory.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from checkpoints import Malicious
from safetensors.torch import save_file

import fastmae
from fastmae.interop.facebook import weights_of
from fastmae.interop.timm import write as write_timm
from fastmae.interop.to_hugging_face import write as write_hugging_face
from fastmae.model import MaskedAutoencoderViT
from fastmae.train.checkpoint import CheckpointError
from fastmae.train.weights import export_weights

HUGE = 1 << 40
RUN = Path(__file__).parents[1] / "integration" / "fixtures" / "run-0.1.0"


def model() -> MaskedAutoencoderViT:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return MaskedAutoencoderViT(
        **sizes, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, norm_pix_loss=True, seed=0
    )


# What is wrong with tensors, whatever file holds them. Each changes one of the weights, chosen at random.


def damage_tensors(draw: random.Random, weights: dict[str, torch.Tensor]) -> str:
    name = draw.choice(sorted(weights))
    tensor = weights[name].clone()
    kind = draw.choice(["missing", "unknown", "nan", "inf", "int", "complex", "bool", "long", "flat", "empty", "gap"])
    if kind == "missing":
        del weights[name]
    elif kind == "unknown":
        weights[draw.choice(["extra", f"{name}.more", "", "head.0.weight"])] = tensor
    elif kind in ("nan", "inf"):
        tensor.view(-1)[draw.randrange(tensor.numel())] = float(kind)
        weights[name] = tensor
    elif kind in ("int", "complex", "bool"):
        dtypes = {"int": torch.int64, "complex": torch.complex64, "bool": torch.bool}
        weights[name] = tensor.to(dtypes[kind])
    elif kind == "long":
        weights[name] = torch.cat([tensor, tensor], dim=draw.randrange(tensor.ndim))
    elif kind == "flat":
        weights[name] = tensor[None]
    elif kind == "empty":
        weights[name] = tensor[:0]
    else:
        weights[f"blocks.{draw.choice([3, 10**6, 10**12])}.norm1.weight"] = weights["blocks.0.norm1.weight"].clone()
    return f"{kind} {name}"


ABSURD = {
    "img_size": [[HUGE, HUGE], [8, 8], "16", [16], -16], "patch_size": [[1, 1], HUGE, "8"],
    "depth": [HUGE, 0, 3, "2"], "embed_dim": [HUGE, 0, 17, 1e300], "num_heads": [0, -2, HUGE, 3, "2", 2.0],
    "decoder_depth": [HUGE, 0, 7], "decoder_num_heads": [0, HUGE, []], "in_chans": [HUGE, 1], "mlp_ratio": [1e300, "4"],
    "mean": [["a"] * 3, [0.5], [float("nan")] * 3], "std": [[0, 0, 0], [-1, 1, 1], [float("inf")] * 3, "abc"],
    "norm_eps": [0, -1, float("nan"), float("inf"), "small"], "norm_pix_loss": ["yes", 3], "num_outputs": [HUGE, -1],
}  # fmt: skip


def absurd(draw: random.Random, names: Iterable[str] = ABSURD) -> dict[str, Any]:
    """A field of an architecture with a value that cannot be."""
    name = draw.choice(sorted(names))
    return {name: draw.choice(ABSURD[name])}


# Files of each kind. Each writes one file or folder and returns its path and what was done to it.


def cut_or_overwritten(draw: random.Random, path: Path) -> str:
    """Shortens a file, or overwrites the first bytes, by which all formats are known or say what follows."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        length = draw.randrange(len(content))
        path.write_bytes(content[:length])
        return f"cut to {length}"
    start = draw.randrange(4)  # further on, a zip archive repeats what its directory says, which nobody reads
    content[start : start + 8] = draw.randbytes(8)
    path.write_bytes(content)
    return f"overwritten at {start}"


def pickled(draw: random.Random, folder: Path, weights: dict, name: str = "w.pth") -> tuple[Path, str]:
    path, legacy = folder / name, draw.random() < 0.3
    kind = draw.choice(["tensors", "code", "cut", "views", "bytes", "deflated", "bomb", "object", "nested", "args"])
    args = {"num_heads": 2, "decoder_num_heads": 2}
    content: object = {"model": weights, "args": args}
    what = kind
    if kind == "tensors":
        what = damage_tensors(draw, weights)
    elif kind == "code":
        content = draw.choice(
            [{"model": weights, "args": Malicious(folder / "executed")}, Malicious(folder / "executed")]
        )
    elif kind == "views":  # a few bytes that claim to be terabytes
        weights["pos_embed"] = torch.zeros(1).expand(1, 1 << 30, 16)
    elif kind == "bytes":
        content = {"model": weights, "args": Allocates(1 << 31)}
    elif kind == "object":
        content = draw.choice([[1], {}, {"model": {}}, {"model": 3}, None, {"model": {"a": {"b": weights}}}, "text"])
    elif kind == "nested":
        for _ in range(5000):
            content = [content]
    elif kind == "args":
        content = {"model": weights, "args": args | absurd(draw, ("num_heads", "mean", "std", "norm_pix_loss"))}
    if kind == "nested":
        path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    if kind == "cut":
        what = cut_or_overwritten(draw, path)
    elif kind in ("deflated", "bomb"):
        path.unlink()
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("w/data.pkl", pickle.dumps({}, 2) + bytes((64 if kind == "bomb" else 1) << 20))
        if kind == "bomb":  # says that it is a terabyte, too
            raw = path.read_bytes()
            path.write_bytes(raw.replace(struct.pack("<I", (64 << 20) + 5), struct.pack("<I", 0xFFFFFFF0)))
    return path, f"{'legacy ' if legacy else ''}{what}"


class Allocates:
    """Becomes a bytearray of a size when unpickled, which PyTorch allows."""

    def __init__(self, size: int):
        self.size = size

    def __reduce__(self):
        return bytearray, (self.size,)


def safetensors(draw: random.Random, folder: Path, weights: dict, name: str = "w.safetensors") -> tuple[Path, str]:
    path = folder / name
    kind = draw.choice(["tensors", "cut", "overlap", "shape", "dtype", "header", "architecture", "metadata"])
    if kind == "tensors":
        what = damage_tensors(draw, weights)
        save_file(weights, path, {"architecture": json.dumps(model().architecture)})
        return path, what
    whole = model()
    if kind == "architecture":
        whole.architecture |= (told := absurd(draw))
        return export_weights(whole, path), str(told)
    export_weights(whole, path)
    if kind == "cut":
        return path, cut_or_overwritten(draw, path)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    tensors = sorted(header.keys() - {"__metadata__"})
    one, other = draw.sample(tensors, 2)
    if kind == "overlap":
        header[one]["data_offsets"] = header[other]["data_offsets"]
    elif kind == "shape":
        header[one]["shape"] = draw.choice([[HUGE, HUGE], [-1], [1 << 62, 4], ["a"], None])
    elif kind == "dtype":
        header[one]["dtype"] = draw.choice(["I64", "F4", "BOOL", "U8", "", 7])
    elif kind == "metadata":
        header["__metadata__"]["architecture"] = draw.choice(
            ["[" * 100_000, "[]", "3", '"text"', "null", '{"depth": "a"}']
        )
    written = json.dumps(header).encode()
    length = draw.choice([HUGE, len(written) + 1, 0, 3]) if kind == "header" else len(written)
    path.write_bytes(struct.pack("<Q", length) + written + data)
    return path, f"{kind} {one}"


def hugging_face(draw: random.Random, folder: Path, weights: dict) -> tuple[Path, str]:
    write_hugging_face(model(), folder / "hf")
    names = {
        "img_size": "image_size", "num_heads": "num_attention_heads", "norm_eps": "layer_norm_eps",
        "decoder_num_heads": "decoder_num_attention_heads", "norm_pix_loss": "norm_pix_loss",
    }  # fmt: skip
    told = {names[name]: value for name, value in absurd(draw, names).items()}
    return damaged_folder(draw, folder / "hf", told)


def timm(draw: random.Random, folder: Path, weights: dict) -> tuple[Path, str]:
    encoder = model()
    encoder.has_decoder = False
    write_timm(encoder, folder / "timm")
    told = absurd(draw, ("img_size", "num_heads"))
    config = json.loads((folder / "timm" / "config.json").read_text())
    return damaged_folder(draw, folder / "timm", {"model_args": config["model_args"] | told})


def damaged_folder(draw: random.Random, folder: Path, told: dict) -> tuple[Path, str]:
    config = folder / "config.json"
    kind = draw.choice(["told", "json", "deep", "index", "bin", "safetensors", "none", "large"])
    stored = folder / "model.safetensors"
    if kind == "told":
        config.write_text(json.dumps(json.loads(config.read_text()) | told))
        return folder, f"{folder.name} {told}"
    if kind in ("json", "deep", "large"):
        config.write_bytes({"json": b"{", "deep": b"[" * 100_000, "large": b" " * (17 << 20) + b"{}"}[kind])
    elif kind == "index":
        index = draw.choice(
            [{}, {"weight_map": []}, {"weight_map": {"a": "../w.safetensors"}}, {"weight_map": {"a": 3}}]
        )
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "bin":
        stored.unlink()
        return folder, f"{folder.name} {pickled(draw, folder, weights_of(model()), 'pytorch_model.bin')[1]}"
    elif kind == "safetensors":
        return folder, f"{folder.name} {cut_or_overwritten(draw, stored)}"
    else:
        stored.unlink()
    return folder, f"{folder.name} {kind}"


def checkpoint(draw: random.Random, folder: Path, weights: dict) -> tuple[Path, str]:
    """A run folder of version 0.1.0 with one checkpoint, one file of which is damaged."""
    shutil.copytree(RUN, folder / "run")
    (step,) = (folder / "run" / "checkpoints").iterdir()
    file = draw.choice(sorted(step.iterdir()))
    return folder / "run", f"{file.name} {cut_or_overwritten(draw, file)}"


KINDS: tuple[Callable[[random.Random, Path, dict], tuple[Path, str]], ...] = (
    pickled, safetensors, hugging_face, timm, checkpoint,
)  # fmt: skip


def main(folder: Path, first: int, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (60 + count, 60 + count))  # so that what hangs is ended
    most, failures = 0, []
    for seed in range(first, first + count):
        draw, place = random.Random(seed), folder / str(seed)
        place.mkdir()
        path, what = KINDS[seed % len(KINDS)](draw, place, weights_of(model()))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            fastmae.load(path)
            failures.append(f"{seed}: {what}: was loaded")
        except CheckpointError as error:
            if str(path) not in str(error) or not str(error).partition(":")[2].strip():
                failures.append(f"{seed}: {what}: {error}")
        except BaseException as error:
            failures.append(f"{seed}: {what}: {type(error).__name__}: {error}"[:300])
        most = max(most, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if (place / "executed").exists():
            failures.append(f"{seed}: {what}: was executed")
        shutil.rmtree(place)
    print(json.dumps({"failures": failures, "kilobytes": most}))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
