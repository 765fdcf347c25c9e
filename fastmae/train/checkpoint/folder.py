"""The folders of checkpoints: names, manifests, and how they come, go and are set aside. Knows nothing of tensors."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT, FORMAT_VERSION = "fastmae-checkpoint", 1
MANIFEST = "manifest.json"
SHARD = "shard-{:05d}-model-00001-of-00001.safetensors"
"""Tensor file of a rank, counted from 1."""


class CheckpointError(Exception):
    """A checkpoint that cannot be written, found, trusted or used here; the message is for the user."""


def refuse_url(folder: Path | str) -> None:
    """Refuse ``s3://bucket/run`` and its kin, of which a ``Path`` would make a local folder named ``s3:``.

    Raises:
        ValueError: if it begins with a protocol.
    """
    if url := as_url(folder):
        raise ValueError(
            f"{url}: expected a folder of a mounted file system: a checkpoint comes into being by a rename, which "
            "object stores do not have. Train into a local or shared folder and copy finished checkpoints"
        )


def as_url(path: Path | str) -> str | None:
    """The address in an object store that was given where a path is expected; None of a path."""
    protocol = re.match(r"([A-Za-z][A-Za-z0-9+.-]+:)/+", str(path))
    return f"{protocol[1]}//{str(path)[protocol.end() :]}" if protocol else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest step first; what is unfinished, set aside or being deleted is not among them."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removeprefix("step-"))


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


def write_manifest(path: Path, step: int, values: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint folder; when this returns, it and all that is in the folder is on the disk."""
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": step, **values}
    text = json.dumps({**values, "sha256": _manifest_sha256(values)}, indent=1)
    with (path / MANIFEST).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync(path)


def publish(partial: Path, final: Path) -> None:
    """Rename a finished folder, in the place of an earlier one of that name if there is any."""
    replaced = final.with_name(f".trash-{final.name}")
    discard(replaced)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    discard(replaced)


def prune(folder: Path, written: Path, keep: int | None, keep_every: int | None, spare: int | None = None) -> None:
    """Delete all but the newest ``keep`` checkpoints, those of every ``keep_every`` steps, the one just written, and
    the newest up to step ``spare``."""
    spared = next((p for p in list_checkpoints(folder) if spare is not None and step_of(p) <= spare), None)
    for old in list_checkpoints(folder)[max(keep, 1) :] if keep is not None else ():
        milestone = keep_every and step_of(old) and step_of(old) % keep_every == 0
        if old not in (written, spared) and not milestone:
            try:
                discard(old)
            except OSError as error:
                print(f"WARNING: could not delete the old checkpoint {old}: {error}", file=sys.stderr, flush=True)


def set_aside_after(folder: Path, step: int, suffix: str = "damaged") -> list[Path]:
    """Rename checkpoints of later steps to ``step-N.<suffix>``: a run that fell back must not meet them again."""
    renamed = []
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            target = path.with_name(f"{path.name}.{suffix}")
            discard(target)
            renamed.append(path.rename(target))
    return renamed


def clean(folder: Path) -> None:
    """Delete what an interrupted save or deletion left behind."""
    for path in [*folder.glob("step-*.tmp"), *folder.glob(".trash-*")]:
        discard(path)


def discard(path: Path) -> None:
    """Delete a folder such that it is never seen half deleted under its own name; of a link, the link alone."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        trash = path if path.name.startswith(".trash-") else path.rename(path.with_name(f".trash-{path.name}"))
        shutil.rmtree(trash)


def sync(path: Path) -> None:
    """``fsync`` of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest_sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
