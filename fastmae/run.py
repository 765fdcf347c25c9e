"""Pretraining in Python, as a script or notebook: ``fastmae.pretrain`` returns a ``fastmae.Run``."""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from fastmae import pretraining
from fastmae.data.records import RecordSource, as_records
from fastmae.loading import load
from fastmae.train.config import SECTIONS, PretrainConfig, flatten, from_json, to_json
from fastmae.train.launcher import rank_and_size, read_slurm
from fastmae.train.liveness import StopRequest
from fastmae.train.recipes import apply_flags, starting_config
from fastmae.train.rules import check_fields
from fastmae.train.run_folder import read_json, read_rows


class Run:
    """A run folder, read-only: also of a run that is still training, or was started by the command line."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not (self.path / "status.json").is_file():
            raise ValueError(f"path: expected the folder of a run, got {path}, which has no status.json")

    @property
    def status(self) -> dict[str, Any]:
        """``status`` ("running", "finished", "preempted" or "failed"), ``step`` and, once it has ended, ``reason``."""
        return read_json(self.path / "status.json") or {}

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the final evaluation found; None before it."""
        return read_json(self.path / "summary.json")

    @property
    def metrics(self) -> Any:
        """The rows of ``metrics.jsonl``: a pandas DataFrame if pandas is installed, otherwise a list of dicts."""
        return _table(read_rows(self.path / "metrics.jsonl"))

    @property
    def evaluations(self) -> Any:
        """The rows of ``evaluations.jsonl`` (pictures and probes during training), as for :attr:`metrics`."""
        return _table(read_rows(self.path / "evaluations.jsonl"))

    @property
    def figure(self) -> Image.Image | None:
        """The newest reconstruction picture, which a notebook displays; None before the first."""
        paths = sorted((self.path / "reconstructions").glob("*.png"), key=lambda path: path.stat().st_mtime)
        return Image.open(paths[-1]) if paths else None

    def model(self) -> nn.Module:
        """The model with its newest weights, on the CPU and in evaluation mode; raises CheckpointError if all
        checkpoints are damaged."""
        weights = self.path / "model.safetensors"
        return load(weights if self.summary and weights.is_file() else self.path)

    def __repr__(self) -> str:
        status = self.status
        return f"Run({str(self.path)!r}: {status.get('status')}, step {status.get('step')})"


def _table(rows: list[dict[str, Any]]) -> Any:
    try:
        import pandas as pd
    except ImportError:
        return rows
    return pd.DataFrame(rows)


def pretrain(
    recipe: str | None = None,
    data: Path | str | Any | None = None,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    **overrides: Any,
) -> Run:
    """Pretrain a masked autoencoder, as ``fastmae pretrain`` does; return the finished or interrupted run.

    An interrupt (Ctrl-C, or a notebook's stop button) saves a checkpoint after the current step and returns;
    ``resume=True`` continues from it. A second one raises KeyboardInterrupt at once. Signals are only handled in the
    main thread. Under torchrun or srun every process calls this function; if one dies, the others end with exit code 2.

    Args:
        recipe: gives the defaults of everything else. None: "small-data" with ``data``, otherwise "photographs".
        data: what ``fastmae.data.open_dataset`` takes: a path, a URL, or a map-style data set, with which the run is
            also resumed. None: the embedded photographs.
        out: run folder, new or empty. None: ``runs/<recipe>-<date>-<time>``.
        resume: continue the run in ``out`` with its configuration.
        overrides: any field of the configuration, such as ``epochs=100, base_lr=1e-4, picture_every_steps=50``. A name
            that two sections have needs the section in front: ``data_num_threads``, ``train_num_threads``.

    Raises:
        TypeError: for an option that does not exist.
        ValueError: for a value that cannot be used; the message names the flag of the same name.
        DataError, CheckpointError, FloatingPointError: as ``Trainer.fit``.
    """
    named = None if out is None else Path(out)
    defaults = starting_config(recipe, out=named, resume=resume, own_images=data is not None)
    values = to_json(defaults)
    records = None if data is None or isinstance(data, str | Path) else as_records(data)
    if data is not None:
        values["data"]["path"] = str(data if records is None else RecordSource(records).root)
    given = set()
    for option, value in overrides.items():
        section, name = _find_field(option)
        values[section][name] = list(value) if isinstance(value, tuple) else value
        if section == "train":
            given.add(name)
    config = replace(from_json(values), out=named, resume=resume)
    for section in SECTIONS:
        check_fields(getattr(config, section), section)
    config = apply_flags(config, defaults, given)
    read_slurm(os.environ)
    with StopRequest(quiet=rank_and_size()[0] != 0) as stop:
        path, _ = pretraining.run(config, stop, records)
    return Run(path)


def _find_field(option: str) -> tuple[str, str]:
    """The section and name of an option of :func:`pretrain`."""
    names = [name for name in flatten(to_json(PretrainConfig())) if "." in name]
    found = [name for name in names if option in (name.partition(".")[2], name.replace(".", "_", 1))]
    if len(found) == 1:
        section, _, name = found[0].partition(".")
        return section, name
    if found:
        raise TypeError(f"{option}: expected {' or '.join(name.replace('.', '_', 1) for name in found)}")
    close = difflib.get_close_matches(option, [name.partition(".")[2] for name in names], n=1)
    raise TypeError(f"{option}: no such option" + (f"; did you mean {close[0]}?" if close else ""))
