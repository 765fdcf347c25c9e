"""Files of tensors that anyone may have written: nothing in them is executed, and memory is bounded by their size."""

from __future__ import annotations

import argparse
import json
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

PICKLES = (".pth", ".pt", ".bin")
_INDEX = "model.safetensors.index.json"
_FILES = (_INDEX, "model.safetensors", "pytorch_model.bin")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LARGEST_JSON = 1 << 24
_LARGEST_TUPLE = 100_000
"""Objects in a tuple and its tuples, each as often as it is there."""
_LEGACY_PICKLES = 5
"""Before the tensors of a file in PyTorch's older format: magic number, version, system, content, names of storages."""


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a ``.safetensors`` file, or of a ``.pth`` file of facebookresearch/mae: a state dict, or a whole
    checkpoint with one under ``model``. On the CPU, under the names that the file has.

    Returns:
        Weights, and what the file says about them: the metadata that is JSON, or ``args``.

    Raises:
        ValueError: naming the file, which is of another kind, damaged, or not of tensors alone.
    """
    if path.suffix not in PICKLES:
        return read_safetensors(path)
    loaded, args = read_pickle(path), {}
    if isinstance(loaded, Mapping) and isinstance(loaded.get("model"), Mapping):
        args = loaded.get("args", {})
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        loaded = loaded["model"]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ValueError(f"{path}: expected a state dict, or one under the key model")
    _check_tensors(path, loaded)
    return dict(loaded), {"args": dict(args)} if isinstance(args, Mapping) else {}


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder of transformers or timm, under its names; raises ValueError as :func:`read_file`."""
    found = next((name for name in _FILES if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder}: expected one of {', '.join(_FILES)}, found none")
    if found.endswith(".bin"):
        return read_file(folder / found)[0]
    if found != _INDEX:
        return read_safetensors(folder / found)[0]
    shards = read_json(folder / found).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else {None}
    if not all(isinstance(name, str) and Path(name).name == name and (folder / name).is_file() for name in names):
        raise ValueError(f"{folder / found}: expected a weight_map to files of this folder")
    return {n: tensor for shard in sorted(names) for n, tensor in read_safetensors(folder / shard)[0].items()}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and the metadata that is JSON; raises ValueError as :func:`read_file`."""
    metadata = {}
    try:
        if not path.is_file():  # a pipe would wait
            raise ValueError("no such file")
        with safe_open(path, framework="pt") as file:
            for key, text in (file.metadata() or {}).items():
                try:
                    metadata[key] = json.loads(text)
                except (ValueError, RecursionError):  # other libraries store plain text
                    continue
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # of the library's own, of the system, of a dtype that PyTorch does not have
        raise ValueError(f"{path}: expected a .safetensors file: {first_line(error)}") from error
    _check_tensors(path, tensors)
    return tensors, metadata


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError, naming the file."""
    try:
        if not path.is_file():
            raise ValueError("no such file")
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes, more than {_LARGEST_JSON:,}")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON file: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is tensors, numbers, text, their lists and dicts, and ``argparse.Namespace``.

    Raises:
        ValueError: naming the file, which holds something else, or unpacks to more than its size.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        _check_size(path, zipped)
        # facebookresearch/mae's training checkpoints hold their command's arguments: a Namespace, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged or hostile pickle raises anything
        raise ValueError(f"{path}: not read, as it is no file of tensors alone: {first_line(error)}") from error


def _check_size(path: Path, zipped: bool) -> None:
    """Raise ValueError for an archive that unpacks to more than its size, and a pickle that allocates bytes itself."""
    if not zipped:
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(file)
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size, unpacked = path.stat().st_size, sum(entry.file_size for entry in entries)
        if unpacked > size:
            raise ValueError(f"unpacks to {unpacked:,} bytes, the file has {size:,}")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                with archive.open(entry) as file:
                    _check_pickle(file)


def _check_pickle(file: Any) -> None:
    """Raise ValueError for what takes memory or time out of all proportion: ``bytearray(1 << 40)``, which PyTorch
    allows, and tuples that hold each other so often that hashing one, as the key of a dict, never ends.

    Keeps the pickle machine's stack, with the number of objects in each tuple in place of the objects.
    """
    stack: list[int | None] = []
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        if isinstance(argument, str) and argument.endswith("bytearray"):
            raise ValueError("has a bytearray")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = stack[-1]
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
        elif opcode.name == "MARK":
            stack.append(None)
        else:
            taken, objects = list(opcode.stack_before), 1
            if pickletools.markobject in taken:
                while (popped := stack.pop()) is not None:
                    objects += popped
                taken = taken[: taken.index(pickletools.markobject)]
            objects += sum(stack.pop() for _ in taken)
            if opcode.name.startswith("TUPLE") and objects > _LARGEST_TUPLE:
                raise ValueError(f"has a tuple of more than {_LARGEST_TUPLE:,} objects")
            stack += [objects if opcode.name.startswith("TUPLE") else 1] * len(opcode.stack_after)


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for what is no weight, and for more bytes than the file has: views of each other."""
    for name, tensor in tensors.items():
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not dense or tensor.dtype not in _DTYPES:
            raise ValueError(f"{path}: {name}: expected float32, float64, float16 or bfloat16, got {tensor.dtype}")
    claimed, size = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if claimed > size:
        raise ValueError(f"{path}: the tensors claim {claimed:,} bytes, the file has {size:,}")


def first_line(error: Exception) -> str:
    """What is wrong, without PyTorch's advice to load the file unsafely."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition(". Please")[0]
    return (text.splitlines() or [type(error).__name__])[0]
