"""The tables of docs/scaling.md, from the formulas of ``fastmae plan``.

    python benchmarks/report_scaling.py

writes each between its markers. Nothing is measured.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastmae.train.scaling.hardware import Cluster, Hardware  # noqa: E402
from fastmae.train.scaling.kept import input_of_attention, kept_by_attention, kept_by_mlp, kept_per_image  # noqa: E402
from fastmae.train.scaling.moved import moved_per_image  # noqa: E402
from fastmae.train.scaling.plan import Plan, Run, make_plan  # noqa: E402
from fastmae.train.scaling.report import inputs  # noqa: E402
from fastmae.train.scaling.sizes import block_shapes, preset_sizes  # noqa: E402
from fastmae.train.scaling.work import flops_per_image  # noqa: E402

PAGE = ROOT / "docs/scaling.md"
MODELS = {
    "ViT-B/16": preset_sizes("mae_vit_base_patch16"),
    "ViT-L/16": preset_sizes("mae_vit_large_patch16"),
    "ViT-H/14": preset_sizes("mae_vit_huge_patch14"),
}
GPUS = (8, 64, 512)
MODES = ("ddp", "fsdp", "hsdp")


def plans(models: Iterable[str] = MODELS, gpus: Iterable[int] = GPUS, **options) -> list[tuple[str, Plan]]:
    """Of every model, number of GPUs and mode; HSDP needs two nodes."""
    return [
        (name, make_plan(Run(MODELS[name], Cluster(count), mode, **options)))
        for name in models
        for count in gpus
        for mode in MODES
        if mode != "hsdp" or count > 8
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def images() -> str:
    rows = []
    for name, sizes in MODELS.items():
        flops, moved = flops_per_image(sizes), moved_per_image(sizes)
        plan = make_plan(Run(sizes))
        rows.append(
            [
                name,
                f"{plan.parameters / 1e6:.1f}",
                f"{flops.model / 1e9:.1f}",
                f"{moved.passes / 1e6:.0f}",
                f"{moved.products / 1e6:.0f}",
                f"{1e6 * flops.model / Hardware().matmul_rate():.0f}",
                f"{1e6 * moved.passes / Hardware().hbm_rate:.0f}",
            ]
        )
    header = [
        "model", "million parameters", "GFLOP an image", "MB in passes", "MB in products", "products, µs", "passes, µs"
    ]  # fmt: skip
    return table(header, rows)


def checkpointing() -> str:
    rows = []
    for name, sizes in MODELS.items():
        for kind in ("none", "selective", "full"):
            flops = flops_per_image(sizes, activation_checkpointing=kind)
            plan = make_plan(Run(sizes, Cluster(8), activation_checkpointing=kind))
            slower = plan.step.seconds / make_plan(Run(sizes, Cluster(8))).step.seconds - 1
            rows.append(
                [
                    name,
                    kind,
                    f"{kept_per_image(sizes, activation_checkpointing=kind).activations / 1e6:.1f}",
                    f"{plan.largest_batch:,}",
                    f"{flops.executed / flops.model - 1:.0%}",
                    f"{slower:.0%}",
                ]
            )
    header = ["model", "checkpointing", "MB kept an image", "largest batch (DDP)", "more operations", "longer step"]
    return table(header, rows, 2)


def parts() -> str:
    """What one block spares and repeats if a part of it is computed again; the middle block of encoder and decoder."""
    rows = []
    for name, sizes in MODELS.items():
        shapes = list(block_shapes(sizes, 0.75))
        for where, b in (("encoder", shapes[1]), ("decoder", shapes[sizes.depth + 1])):
            projections = 2 * b.keys * 3 * b.width**2
            candidates = {
                "attention (`selective`)": (
                    kept_by_attention(b, 2, 4, "fused") - input_of_attention(b, 2, 4, False),
                    projections + 4 * b.keys**2 * b.width,
                ),
                "MLP": (kept_by_mlp(b, 2, 4) - 2 * b.queries * b.width, 2 * b.queries * b.width * b.hidden),
                "queries, keys, values": (6 * b.keys * b.width, projections),
            }
            for part, (spared, again) in candidates.items():
                rows.append(
                    [
                        f"{name}, {where}",
                        part,
                        f"{spared / 1e3:,.0f}",
                        f"{again / 1e6:,.0f}",
                        f"{1e3 * spared / again:.2f}",
                    ]
                )
    header = ["a block of", "computed again", "kB spared an image", "million operations again", "bytes a thousand"]
    return table(header, rows, 2)


def memory() -> str:
    rows = []
    for name, plan in plans():
        states, gb = plan.memory.states, lambda size: f"{size / 1e9:.2f}"
        rows.append(
            [
                name,
                plan.run.cluster.gpus,
                plan.run.parallel,
                plan.batch_size,
                *(gb(getattr(states, kind)) for kind in ("weights", "gradients", "optimizer", "copies", "reduction")),
                gb(plan.memory.activations + plan.memory.transient),
                f"{plan.memory.total / 1e9:.1f}",
                f"{plan.largest_batch:,}",
            ]
        )
    header = [
        "model", "GPUs", "mode", "batch a GPU", "weights", "gradients", "optimiser", "low-precision weights",
        "being reduced", "activations", "in all", "largest batch",
    ]  # fmt: skip
    return table(header, rows, 3)


def communication() -> str:
    rows = []
    for name, plan in plans():
        sent = {c.name: f"{c.sent / 1e9:.2f}" for c in plan.collectives}
        rows.append(
            [
                name,
                plan.run.cluster.gpus,
                plan.run.parallel,
                *(sent.get(kind, "-") for kind in ("all-gather", "reduce-scatter", "all-reduce")),
                *(f"{1e3 * s:.1f}" for s in (plan.step.compute, plan.step.communication, plan.step.exposed)),
                f"{plan.step.share_without_overlap:.0%}",
                f"{plan.step.share_exposed:.0%}",
                f"{plan.step.seconds * 1e3:.1f}",
                f"{plan.mfu:.2f}",
            ]
        )
    header = [
        "model", "GPUs", "mode", "all-gather, GB", "reduce-scatter, GB", "all-reduce, GB", "compute, ms",
        "communication, ms", "not hidden, ms", "share without overlap", "share with", "step, ms", "MFU",
    ]  # fmt: skip
    return table(header, rows, 3)


def batches() -> str:
    rows = []
    for name in MODELS:
        for batch in (4096, 8192, 16384, 32768, 65536):
            row = [name, f"{batch:,}", batch // 512]
            for _, plan in plans([name], [512], global_batch=batch):
                row += [f"{plan.step.share_exposed:.0%}", f"{plan.mfu:.2f}"]
            rows.append(row)
    header = ["model", "global batch", "a GPU", *(f"{mode}, {what}" for mode in MODES for what in ("share", "MFU"))]
    return table(header, rows)


def networks() -> str:
    rows = []
    for name in MODELS:
        for label, rate in (("400 Gb/s a GPU", 50.0), ("100 Gb/s a GPU", 12.5), ("100 Gb/s a node", 12.5 / 8)):
            found = plans([name], [64], hardware=replace(Hardware(), network_gb_per_s=rate))
            rows.append(
                [name, label, *(f"{p.step.share_exposed:.0%} of {1e3 * p.step.seconds:.0f} ms" for _, p in found)]
            )
    return table(["model", "network", *MODES], rows, 2)


def fastest(name: str, count: int) -> Plan:
    return min((plan for _, plan in plans([name], [count])), key=lambda plan: plan.step.seconds)


def data() -> str:
    rows = []
    for name in MODELS:
        for count in GPUS:
            plan = fastest(name, count)
            rows.append(
                [
                    name,
                    count,
                    plan.run.parallel,
                    f"{plan.images_per_s:,.0f}",
                    f"{plan.data.images_per_s_per_node:,.0f}",
                    f"{plan.data.cores_per_node:.0f}",
                    f"{plan.data.storage_bytes_per_s / 1e9:.1f}",
                    *(f"{24 * plan.days[epochs]:.1f}" for epochs in ("800", "1600")),
                ]
            )
    header = [
        "model", "GPUs", "fastest mode", "images/s", "to decode, images/s a node", "CPU cores a node",
        "from storage, GB/s", "800 epochs, hours", "1600 epochs, hours",
    ]  # fmt: skip
    return table(header, rows)


def checkpoints() -> str:
    rows = []
    for name, plan in plans():
        cost = plan.checkpoint
        rows.append(
            [
                name,
                plan.run.cluster.gpus,
                plan.run.parallel,
                f"{cost.bytes / 1e9:.2f}",
                f"{cost.bytes_per_gpu / 1e9:.3f}",
                f"{1e3 * cost.copy_seconds:.1f}",
                cost.writing_nodes,
                f"{cost.write_seconds:.2f}",
            ]
        )
    header = [
        "model", "GPUs", "mode", "GB", "GB a writing GPU", "copy, ms", "nodes that write", "writing, s"
    ]  # fmt: skip
    return table(header, rows, 3)


def assumed() -> str:
    plan = make_plan(Run(MODELS["ViT-L/16"]))
    rows = [
        [
            f"`--{name.replace('_', '-')}`",
            "**assumed**" if kind == "assumed" else kind,
            value,
        ]
        for name, value, kind in inputs(plan)
    ]
    return table(["flag", "what it is", "value"], rows, 2)


TABLES = {
    "assumptions": assumed, "images": images, "parts": parts, "checkpointing": checkpointing, "memory": memory,
    "communication": communication, "batches": batches, "networks": networks, "data": data, "checkpoints": checkpoints,
}  # fmt: skip


def page(text: str) -> str:
    """The page with every table as the code now gives it."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{begin}\n.*?{end}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{PAGE}: expected once {begin} and {end}")
        text = pattern.sub(lambda _, make=make, begin=begin, end=end: f"{begin}\n{make()}\n{end}", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
