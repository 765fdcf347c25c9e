"""The configuration of a pretraining run: what every flag of ``fastmae pretrain`` means, and what values it takes.

Defaults come from a recipe (``recipes.py``), flags override them, and the result is printed and saved as
``config.json`` in the run folder. This module does not import PyTorch, so that ``--help`` is fast.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fastmae.train.config.data import DataConfig
from fastmae.train.config.model import ModelConfig
from fastmae.train.config.report import ReportConfig
from fastmae.train.config.train import TrainConfig

try:
    from tyro.conf import Suppress
except ImportError:  # only the command line parses flags; training and benchmarks run without its parser
    Suppress = None

__all__ = [
    "DataConfig",
    "ModelConfig",
    "PretrainConfig",
    "RecipeName",
    "ReportConfig",
    "TrainConfig",
    "from_json",
    "read_config",
    "to_json",
    "updated",
]

RecipeName = Literal[
    "photographs",
    "imagenet-vit-b",
    "imagenet-vit-l",
    "imagenet-vit-h",
    "imagenet-vit-b-1600",
    "imagenet-vit-l-1600",
    "imagenet-vit-h-1600",
    "imagenet-vit-b-100",
    "small-data",
    "adapt-vit-b",
]


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a masked autoencoder. Without arguments: a small model on the embedded photographs, minutes on a CPU."""

    out: Path | None = None
    """Run folder. None: runs/<recipe>-<date>-<time>."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, with its configuration; flags given here override it."""
    recipe: RecipeName = "photographs"
    """Where the defaults of all other flags come from. With --data.path and no recipe: small-data."""
    recipe_version: Annotated[int, Suppress] = 1
    """Version of the recipe; the recipe sets it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    @property
    def img_size(self) -> tuple[int, int]:
        """Image size as (height, width)."""
        size = self.model.img_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def model_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``fastmae.create_model``."""
        arguments = asdict(self.model)
        del arguments["mask_ratio"], arguments["mask_strategy"]
        return arguments | {"img_size": self.img_size, "seed": self.train.seed}

    def dataset_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``fastmae.data.open_dataset``."""
        names = ("value_range", "channels_first", "max_bad_fraction", "max_pixels")
        return {"channels": self.model.in_chans} | {name: getattr(self.data, name) for name in names}


def to_json(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as JSON-able nested dictionaries."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return plain(asdict(config))


def updated(values: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with what earlier versions wrote otherwise: ``train.compile`` was a bool."""
    train = dict(values.get("train", {}))
    if isinstance(train.get("compile"), bool):
        train["compile"] = "model" if train["compile"] else "none"
    return values | {"train": train}


def from_json(values: dict[str, Any]) -> PretrainConfig:
    """The configuration from what :func:`to_json` returned, now or in an earlier version; fields it lacks take their
    default.

    Raises:
        ValueError: for a field that this version does not know.
    """

    def build(kind: type, values: dict[str, Any], prefix: str) -> Any:
        names = {f.name for f in fields(kind)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(f"config: unknown field {prefix}{unknown[0]}; expected one of {', '.join(sorted(names))}")
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    values = updated(values)
    sections = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "report": ReportConfig}
    built = {name: build(kind, values.pop(name, {}), f"{name}.") for name, kind in sections.items()}
    config = build(PretrainConfig, values | built, "")
    paths = (config.out, config.data.path, config.train.init_from, config.report.probe_path)
    out, path, init_from, probe_path = (None if p is None else Path(p) for p in paths)
    data, train = replace(config.data, path=path), replace(config.train, init_from=init_from)
    return replace(config, out=out, data=data, train=train, report=replace(config.report, probe_path=probe_path))


def read_config(run_folder: Path) -> PretrainConfig | None:
    """The configuration of the run in a folder; None where no run began.

    Raises:
        ValueError: if ``config.json`` is not a configuration of this version.
    """
    path = run_folder / "config.json"
    return from_json(json.loads(path.read_text())) if path.is_file() else None
