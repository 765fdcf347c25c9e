"""What ``"auto"`` means: the fastest backend of the nearest measured shape, from a table that ships with the package.

``benchmarks/report.py`` writes ``attention_choices.json`` from committed results of
``benchmarks/bench_attention.py``; nothing in it is typed by hand.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import NamedTuple

import torch

from fastmae.ops import _attention_triton, _xformers

DEFAULT = "sdpa"


class Row(NamedTuple):
    """One measured shape.

    Attributes:
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        tokens, head_dim: queries and keys, and channels of a head.
        ratios: (backend, its time over SDPA's), fastest first; forward and backward together.
    """

    dtype: str
    tokens: int
    head_dim: int
    ratios: tuple[tuple[str, float], ...]


class Choice(NamedTuple):
    """A backend, why it was picked, and the measured row it comes from, if any."""

    backend: str
    reason: str
    row: Row | None = None


class Table(NamedTuple):
    """Rows of one kind of device, sorted by tokens and head dimension, and where they were measured."""

    device: str
    rows: tuple[Row, ...]


def device_key(device_type: str) -> str:
    """The table's name for a device: ``"cpu"``, ``"cuda 9.0"`` (its compute capability) or ``"rocm gfx942"``."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return device_type
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip is not None:
        return f"rocm {properties.gcnArchName.split(':')[0]}"
    return f"cuda {properties.major}.{properties.minor}"


def read_choices(text: str) -> dict[str, Table]:
    """The shipped file's tables by device."""
    return {
        key: Table(
            ", ".join(entry["devices"]),
            tuple(
                Row(
                    row["dtype"], row["tokens"], row["head_dim"], tuple((n, float(r)) for n, r in row["ratios"].items())
                )
                for row in entry["rows"]
            ),
        )
        for key, entry in json.loads(text)["tables"].items()
    }


# Under torch.compile a file cannot be read; what it says is a constant of the graph.
@torch.compiler.assume_constant_result
def table_of(device_type: str) -> Table:
    """The table of the current device of this type; without rows where none was measured."""
    key = device_key(device_type)
    if key not in _cache:
        _cache.update(read_choices(files("fastmae.ops").joinpath("attention_choices.json").read_text()))
        _cache.setdefault(key, Table("", ()))
    return _cache[key]


_cache: dict[str, Table] = {}


def nearest_row(table: Table, dtype: str, tokens: int, head_dim: int) -> Row | None:
    """The row of this dtype that is the next larger: in tokens first, then in head dimension; else the largest."""
    found = None
    for row in table.rows:
        if row.dtype != dtype:
            continue
        # Sorted ascending: a row that is large enough is not replaced by a larger one.
        small = found is None or (found.head_dim < head_dim if row.tokens == found.tokens else found.tokens < tokens)
        if small:
            found = row
    return found


def choose_backend(device_type: str, dtype: torch.dtype, num_keys: int, head_dim: int = 64) -> Choice:
    """What ``"auto"`` means for these tensors.

    The nearest measured shape decides: the next larger in tokens, among those the next larger in head dimension, or
    the largest where none is larger. float16 goes by bfloat16 where it was not measured itself. Backends that cannot
    take the tensors, or are not installed, are passed over.
    """
    table = table_of(device_type)
    if not table.rows:
        return Choice(DEFAULT, "not measured on this device; PyTorch picks among its fused kernels")
    row = nearest_row(table, str(dtype).removeprefix("torch."), num_keys, head_dim)
    if row is None and dtype == torch.float16:
        row = nearest_row(table, "bfloat16", num_keys, head_dim)
    if row is None:
        return Choice(DEFAULT, f"{str(dtype).removeprefix('torch.')} was not measured on this device")
    for name, _ in row.ratios:
        if name == "triton" and not (
            _attention_triton.is_installed() and _attention_triton.unfit(dtype, num_keys, head_dim) is None
        ):
            continue
        if name == "xformers" and not _xformers.is_installed():
            continue
        return Choice(name, "measured", row)
    return Choice(DEFAULT, "no measured backend can be used here", row)


def describe_choices(device_type: str) -> list[tuple[str, str]]:
    """Lines for a report: the pick for each measured shape on the current device of this type, with its ratio."""
    table, title = table_of(device_type), f"auto, {device_type}"
    if not table.rows:
        choice = choose_backend(device_type, torch.bfloat16, 197)
        return [(title, f"{choice.backend}: {choice.reason}")]
    lines = [(title, f"by the nearest shape measured on {table.device}; its time over SDPA's in brackets")]
    for dtype, tokens in dict.fromkeys((row.dtype, row.tokens) for row in table.rows):
        dims = [row.head_dim for row in table.rows if (row.dtype, row.tokens) == (dtype, tokens)]
        picks = [choose_backend(device_type, getattr(torch, dtype), tokens, dim) for dim in dims]
        cells = [f"heads of {dim}: {pick.backend} ({_ratio(pick):.2f})" for dim, pick in zip(dims, picks, strict=True)]
        lines.append((f"{title}, {dtype}, {tokens} tokens", ", ".join(cells)))
    return lines


def _ratio(choice: Choice) -> float:
    return dict(choice.row.ratios)[choice.backend] if choice.row else 1.0
