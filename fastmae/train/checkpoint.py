"""Checkpoints: tensors in safetensors, everything else in a manifest that is written last, and nothing pickled.

A checkpoint is a folder ``checkpoints/step-N``. It comes into being by a rename, after its files are on the disk, so a
folder of that name is whole; ``manifest.json`` gives each file's size and SHA-256, so damage that comes later is seen.
Tensor names and file names are those that PyTorch's distributed checkpoints (DCP) with safetensors storage use, so its
``HuggingFaceStorageReader`` reads and reshards the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT, FORMAT_VERSION = "fastmae-checkpoint", 1
MANIFEST = "manifest.json"
SHARD = "shard-{:05d}-model-00001-of-00001.safetensors"
"""Tensor file of a rank, counted from 1."""


class CheckpointError(Exception):
    """A checkpoint that cannot be written, found, trusted or used here; the message is for the user."""


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], *, keep: int | None = None
) -> Path:
    """Write ``folder/step-N`` atomically, then delete all but the newest ``keep`` checkpoints.

    Args:
        folder: the run's ``checkpoints`` folder; must exist.
        step: optimiser steps done.
        tensors: any number of dimensions, any device, no shared memory.
        manifest: JSON-able values to keep beside the tensors.
        keep: number of checkpoints to keep, at least 1; None keeps all.

    Raises:
        CheckpointError: if the disk is full or not writable; earlier checkpoints are untouched.
    """
    final, partial = folder / f"step-{step}", folder / f"step-{step}.tmp"
    try:
        discard(partial)
        partial.mkdir()
        shard = partial / SHARD.format(1)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, shard)
        _sync(shard)
        files = [{"name": shard.name, "size": shard.stat().st_size, "sha256": _sha256(shard)}]
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": step}
        values = {**head, **manifest, "files": files}
        text = json.dumps({**values, "sha256": _manifest_sha256(values)}, indent=1)
        with (partial / MANIFEST).open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _sync(partial)
        discard(final)
        partial.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # what little was written may be what fills the disk
        raise CheckpointError(f"could not write {final}: {error}; earlier checkpoints are untouched") from error
    if keep is not None:
        for old in list_checkpoints(folder)[max(keep, 1) :]:
            if old != final:
                discard(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest step first; what is unfinished, set aside or being deleted is not among them."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=_step_of, reverse=True)


def latest_checkpoint(run_folder: Path, *, verify: bool = True) -> Path:
    """The newest undamaged checkpoint of a run. A damaged one is reported on stderr and passed over.

    Raises:
        CheckpointError: if there is none.
    """
    candidates = list_checkpoints(run_folder / "checkpoints")
    if not candidates:
        raise CheckpointError(f"{run_folder}: expected a run folder with checkpoints/step-N inside, found none")
    reasons = []
    for path in candidates:
        try:
            verify_checkpoint(path) if verify else read_manifest(path)
        except CheckpointError as error:
            reasons.append(str(error))
            print(f"WARNING: damaged checkpoint passed over: {error}", file=sys.stderr, flush=True)
        else:
            return path
    raise CheckpointError(f"{run_folder}: no undamaged checkpoint; " + "; ".join(reasons))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: if it is missing, unreadable or of another format.
    """
    name = path / MANIFEST
    try:
        manifest = json.loads(name.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: expected a checkpoint manifest: {error}") from error
    got = (manifest.get("format"), manifest.get("format_version")) if isinstance(manifest, dict) else manifest
    if got != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(f"{name}: expected format {FORMAT} version {FORMAT_VERSION}, got {got}")
    if manifest.pop("sha256", None) != _manifest_sha256(manifest):
        raise CheckpointError(f"{name}: contents differ from the SHA-256 that it gives of itself")
    return manifest


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compare a checkpoint's files with its manifest: names, sizes, SHA-256.

    Returns:
        The manifest.

    Raises:
        CheckpointError: naming the file that is missing, unknown, truncated or altered.
    """
    manifest = read_manifest(path)
    expected = {file["name"]: file for file in manifest["files"]}
    present = {p.name for p in path.iterdir()} - {MANIFEST}
    for name in sorted(expected.keys() - present):
        raise CheckpointError(f"{path / name}: missing, but listed in {MANIFEST}")
    for name in sorted(present - expected.keys()):
        raise CheckpointError(f"{path / name}: not listed in {MANIFEST}; left over from another save?")
    for name, file in expected.items():
        size = (path / name).stat().st_size
        if size != file["size"]:
            raise CheckpointError(f"{path / name}: expected {file['size']} bytes, got {size}")
        if _sha256(path / name) != file["sha256"]:
            raise CheckpointError(f"{path / name}: contents differ from the SHA-256 in {MANIFEST}")
    return manifest


def load_checkpoint(path: Path, *, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU, by name) and manifest of a checkpoint folder.

    Raises:
        CheckpointError: if anything is missing or altered; see :func:`verify_checkpoint`.
    """
    manifest = verify_checkpoint(path) if verify else read_manifest(path)
    tensors: dict[str, Tensor] = {}
    for file in manifest["files"]:
        try:
            tensors |= load_file(path / file["name"])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / file['name']}: unreadable: {error}") from error
    return tensors, manifest


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints of later steps to ``step-N.damaged``: a run that fell back must not meet them again."""
    renamed = []
    for path in list_checkpoints(folder):
        if _step_of(path) > step:
            target = path.with_name(f"{path.name}.damaged")
            discard(target)
            renamed.append(path.rename(target))
    return renamed


def clean(folder: Path) -> None:
    """Delete what an interrupted save or deletion left behind."""
    for path in [*folder.glob("step-*.tmp"), *folder.glob(".trash-*")]:
        discard(path)


def discard(path: Path) -> None:
    """Delete a folder such that it is never seen half deleted under its own name."""
    if path.exists():
        trash = path if path.name.startswith(".trash-") else path.rename(path.with_name(f".trash-{path.name}"))
        shutil.rmtree(trash)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
