"""``fastmae consolidate``: a checkpoint of any number of processes as one file."""

from __future__ import annotations

from pathlib import Path

from fastmae.cli.errors import UsageError
from fastmae.train import checkpoint


def consolidate(folder: Path, out: Path, optimizer: bool) -> int:
    """Write the file, say where it is; return the exit code."""
    if out.suffix != ".safetensors":
        raise UsageError(f"OUT: expected a .safetensors file, got {out}")
    path = folder if folder.name.startswith("step-") else checkpoint.latest_checkpoint(folder)
    checkpoint.consolidate(path, out, optimizer=optimizer)
    print(f"{path} -> {out}  ({out.stat().st_size / 2**20:,.1f} MiB)")
    return 0
