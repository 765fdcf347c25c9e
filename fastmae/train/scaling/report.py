"""A plan in rows for people, and in full as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from fastmae.train.scaling.communication import Collective
from fastmae.train.scaling.data import Data
from fastmae.train.scaling.hardware import Hardware
from fastmae.train.scaling.plan import Plan

Kind = Literal["assumed", "measured", "data sheet", "data"]
"""Where a number comes from."""
_DATA_SHEET = ("matmul_tflops", "fp32_tflops", "hbm_gb", "hbm_tb_per_s", "nvlink_gb_per_s", "network_gb_per_s")

Section = tuple[str, list[tuple[str, list[str]]]]
"""A title, and rows: what it is, and a value for each plan."""


def sections(plans: Sequence[Plan]) -> list[Section]:
    """Plans side by side, in units for reading."""

    def row(label: str, value: Callable[[Plan], str]) -> tuple[str, list[str]]:
        return label, [value(plan) for plan in plans]

    names = list(dict.fromkeys((c.name, c.scope) for plan in plans for c in plan.collectives))
    epochs = plans[0].days
    found = [
        (
            "Memory of a GPU, GB",
            [
                row("weights, fp32", lambda p: _gb(p.memory.states.weights)),
                row("gradients, fp32", lambda p: _gb(p.memory.states.gradients)),
                row("optimiser", lambda p: _gb(p.memory.states.optimizer)),
                row("low-precision or gathered weights", lambda p: _gb(p.memory.states.copies)),
                row("gradients being reduced", lambda p: _gb(p.memory.states.reduction)),
                row("saved activations", lambda p: _gb(p.memory.activations)),
                row("transient in the backward (estimate)", lambda p: _gb(p.memory.transient)),
                row("images", lambda p: _gb(p.memory.images)),
                row("reserved (assumed)", lambda p: _gb(p.memory.reserved)),
                row("in all", lambda p: f"{_gb(p.memory.total)} of {p.run.hardware.hbm_gb:g}"),
            ],
        ),
        (
            "Batch" if plans[0].run.batch_size else "Batch, as --train.batch-size auto",
            [
                row("images on a GPU at a time", lambda p: f"{p.batch_size:,}"),
                row("such batches in a step", lambda p: f"{p.accumulation:,}"),
                row("the most that fit at a time", lambda p: f"{p.largest_batch:,}"),
            ],
        ),
        (
            "Communication of a GPU and step: GB sent, ms alone",
            [row(f"{name}, {_SCOPES[scope]}", lambda p, key=(name, scope): _sent(p, key)) for name, scope in names],
        ),
        (
            "Step, ms (a floor)",
            [
                row("matrix products", lambda p: _ms(p.step.products)),
                row("passes over activations", lambda p: _ms(p.step.passes)),
                row("passes over weights, AdamW", lambda p: _ms(p.step.weights)),
                row("communication not hidden", lambda p: _ms(p.step.exposed)),
                row("in all", lambda p: _ms(p.step.seconds)),
                row("share of communication, with overlap", lambda p: f"{p.step.share_exposed:.1%}"),
                row("share of communication, without", lambda p: f"{p.step.share_without_overlap:.1%}"),
                row("images/s, all GPUs", lambda p: f"{p.images_per_s:,.0f}"),
                row("MFU, of the data sheet's peak", lambda p: f"{p.mfu:.2f}"),
            ],
        ),
        (
            "Data",
            [
                row("images/s to decode, a node", lambda p: f"{p.data.images_per_s_per_node:,.0f}"),
                row("CPU cores for it, a node", lambda p: f"{p.data.cores_per_node:,.0f}"),
                row("read from storage, GB/s", lambda p: f"{p.data.storage_bytes_per_s / 1e9:.2f}"),
            ],
        ),
        (
            "Checkpoint",
            [
                row("GB", lambda p: _gb(p.checkpoint.bytes)),
                row("copy to the host, s (training waits)", lambda p: f"{p.checkpoint.copy_seconds:.3f}"),
                row("writing, s (in the background)", lambda p: f"{p.checkpoint.write_seconds:.2f}"),
                row("nodes that write", lambda p: f"{p.checkpoint.writing_nodes:,}"),
            ],
        ),
        (
            "Days (a floor)",
            [row(f"{name} epochs", lambda p, name=name: f"{p.days[name]:.2f}") for name in epochs],
        ),
    ]
    return [section for section in found if section[1]]


def inputs(plan: Plan) -> list[tuple[str, str, Kind]]:
    """Of the hardware and the data: names, values, and where the defaults come from."""
    found: list[tuple[str, str, Kind]] = []
    for field in fields(Hardware):
        if field.name != "name":
            kind = "data sheet" if field.name in _DATA_SHEET else "assumed"
            found.append((f"hardware.{field.name}", f"{getattr(plan.run.hardware, field.name):.10g}", kind))
    data = plan.run.data
    settled = {"image_kb": data.bytes_per_image / 1e3, "images_per_core": data.core_rate}
    for field in fields(Data):
        value = settled.get(field.name, getattr(data, field.name))
        measured = field.name == "images_per_core" and data.images_per_core is None
        text = value if isinstance(value, str) else f"{value:.10g}"
        found.append((f"data.{field.name}", text, "measured" if measured else "data"))
    return found


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything, by name: bytes, seconds, operations."""
    values = _plain(plan)
    values |= {"images_per_s": plan.images_per_s, "mfu": plan.mfu}
    values["memory"] |= {"total": plan.memory.total}
    values["flops"] |= {"model": plan.flops.model, "executed": plan.flops.executed}
    values["step"] |= {
        name: getattr(plan.step, name)
        for name in ("compute", "seconds", "seconds_without_overlap", "share_exposed", "share_without_overlap")
    }
    for shown, one in zip(values["collectives"], plan.collectives, strict=True):
        shown |= {"sent_per_gpu": one.sent, "seconds": one.seconds(plan.run.hardware, plan.run.cluster)}
    return values


_SCOPES = {"all": "all GPUs", "node": "GPUs of a node", "across": "across nodes"}


def _sent(plan: Plan, key: tuple[str, str]) -> str:
    one: Collective | None = next((c for c in plan.collectives if (c.name, c.scope) == key), None)
    if one is None:
        return "-"
    return f"{_gb(one.sent)}, {_ms(one.seconds(plan.run.hardware, plan.run.cluster))}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
