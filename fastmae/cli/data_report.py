"""What ``fastmae data stats`` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from fastmae.data import Dataset
from fastmae.data.dataset import printable
from fastmae.data.index import Accepts
from fastmae.data.stats import QUANTILES, Statistics

_NAMES = ["min", "5 %", "25 %", "median", "75 %", "95 %", "max"]


def pretrain_flags(statistics: Statistics, dataset: Dataset) -> str:
    """Flags of ``fastmae pretrain`` for this data set: mean and standard deviation, and how its images are read."""
    flags = []
    if statistics.sampled:
        # A constant channel has no deviation to divide by.
        for name, values in (("mean", statistics.mean), ("std", [value or 1.0 for value in statistics.std])):
            flags.append(
                f"--model.{name} {' '.join(f'{value:.3f}' if value >= 0.1 else f'{value:.3g}' for value in values)}"
            )
    if dataset.channels != 3:
        flags.append(f"--model.in-chans {dataset.channels}")
    if dataset.value_range is not None:
        flags.append(f"--data.value-range {' '.join(f'{value:.9g}' for value in dataset.value_range)}")
    if dataset.accepts.channels_first:
        flags.append("--data.channels-first")
    if dataset.accepts.max_pixels != Accepts.max_pixels:
        flags.append(f"--data.max-pixels {dataset.accepts.max_pixels}")
    return " ".join(flags)


def print_statistics(statistics: Statistics, dataset: Dataset, console: Console, *, as_json: bool) -> None:
    """Print what was measured, for people or as one JSON object."""
    flags = pretrain_flags(statistics, dataset)
    if as_json:
        values = {"path": str(dataset.root), "hash": dataset.hash, **asdict(statistics)}
        console.print(json.dumps(values | {"quantiles_at": QUANTILES, "pretrain_flags": flags}, indent=1))
        return
    bad = sum(statistics.bad.values())
    console.print(
        f"{printable(dataset.name)}: {statistics.images:,} images, {statistics.bytes / 1e6:,.1f} MB, {bad:,} unusable; "
        f"{statistics.labelled:,} labelled; {statistics.rotated:,} turned or mirrored by EXIF\n"
    )
    console.print(_quantiles(statistics))
    for title, counts in (("Format", statistics.formats), ("Mode", statistics.modes), ("Unusable", statistics.bad)):
        if counts:
            console.print(_counted(title, counts))
    if statistics.sampled:
        console.print(_channels(statistics))
        console.print(
            f"In [0, 1], of {statistics.sampled:,} images, each weighing the same. std: over the pixels of all images; "
            "within: the mean of each image's own, which is what ImageNet's usual 0.229 0.224 0.225 are.\n"
        )
    if flags:
        console.print(f"For fastmae pretrain:\n{flags}")


def _quantiles(statistics: Statistics) -> Table:
    table = Table("", *_NAMES)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in statistics.quantiles.items():
        digits = 2 if name == "megapixels" else 0
        table.add_row(name, *(f"{value:,.{digits}f}" for value in values))
    return table


def _counted(title: str, counts: Mapping[str, int]) -> Table:
    table = Table(title, "images")
    table.columns[1].justify = "right"
    for name, count in counts.items():
        table.add_row(printable(name), f"{count:,}")
    return table


def _channels(statistics: Statistics) -> Table:
    table = Table("Channel", "mean", "std", "std within")
    for number, values in enumerate(zip(statistics.mean, statistics.std, statistics.std_within, strict=True)):
        table.add_row(str(number), *(f"{value:.4f}" for value in values))
    return table
