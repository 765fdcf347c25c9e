"""``fastmae plan``: memory, communication and time of a run on n GPUs, before one is rented.

Parameters and FLOPs come from the model itself, on the meta device. Bytes are closed forms, which tests compare with
counts and with real collectives. Times are floors: matrix products and passes over memory at a stated fraction of the
data sheet, plus the communication that cannot hide behind them. Launches, stragglers and data loading come on top.

Notation: D width, H heads, c bytes of a value in matrix products, r of one in the residual stream. PyTorch is imported
inside functions, so that ``--help`` does not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from fastmae.train.config import ModelConfig, ParallelMode, PretrainConfig, RecipeName, TrainConfig

IMAGES_PER_CORE = 855
"""ImageNet JPEGs that one core of an AMD EPYC reads, decodes and resizes per second (DALI's CPU backend; measured,
docs/data.md)."""
IMAGE_BYTES = 110_000
"""Mean size of an ImageNet JPEG."""
_TABLE = {
    "memory": ("GB per GPU", 1e-9, 2),
    "batch": ("Batch per GPU", 1, 0),
    "sent": ("GB sent per GPU and step", 1e-9, 2),
    "seconds": ("Milliseconds per step, at least", 1e3, 1),
    "run": ("Run", 1, 2),
}
"""Title, unit and digits of each part of a plan; of memory and seconds, the total too."""

Plan = dict[str, Any]
"""What a run takes, of one GPU and optimiser step unless a name says otherwise: the parts of the table, each a dict by
what they consist of, and the mode, GPUs, nodes, parameters and FLOPs per image (without what activation checkpointing
repeats: the definition of MFU)."""


@dataclass(frozen=True)
class Hardware:
    """A GPU, its links and its node. Defaults: H100 SXM, one 400 Gb/s network port per GPU. One direction of each link
    counts. Fractions are assumptions; measure and replace them."""

    tflops: float = 989.4
    """Peak of dense bf16 matrix products, TFLOP/s."""
    tflops_fraction: float = 0.65
    """Fraction of it that the matrix products of a step reach on average."""
    memory_gb: float = 80.0
    """Device memory, 10^9 bytes."""
    memory_fraction: float = 0.85
    """Fraction of it to plan for: the rest is for fragmentation, workspaces and communication buffers."""
    memory_tb_per_s: float = 3.35
    """Bandwidth of device memory, TB/s."""
    memory_bandwidth_fraction: float = 0.85
    """Fraction of it that passes over activations reach."""
    nvlink_gb_per_s: float = 450.0
    """To the other GPUs of the node."""
    network_gb_per_s: float = 50.0
    """Out of the node, per GPU."""
    link_fraction: float = 0.8
    """Fraction of both that collectives reach."""


@dataclass(frozen=True)
class PlanConfig:
    """Estimate memory, communication and time of a run on n GPUs. Nothing is run; times are floors. Flags are those of
    fastmae pretrain; without --train.parallel all ways to share the work stand side by side."""

    recipe: RecipeName = "imagenet-vit-l"
    """Recipe that gives all other flags their defaults."""
    gpus: int = 8
    """GPUs in all."""
    gpus_per_node: int = 8
    """GPUs per node."""
    images: int = 1_281_167
    """Images in the data set; the default is ImageNet-1k's number."""
    json: bool = False
    """Print JSON instead of a table: bytes, seconds, FLOPs."""
    hardware: Hardware = field(default_factory=Hardware)
    """What a GPU and its links do."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def make_plans(config: PretrainConfig, cluster: PlanConfig) -> list[Plan]:
    """The plans of a configuration in its mode of parallelism, or in every mode that the GPUs allow."""
    import torch

    from fastmae.model import create_model
    from fastmae.train.rules import check_fields

    check_fields(config.model, "model")
    check_fields(config.train, "train")
    modes: list[ParallelMode] = [config.train.parallel]
    if config.train.parallel == "auto":
        several = cluster.gpus > cluster.gpus_per_node > 1
        modes = ["none"] if cluster.gpus == 1 else ["ddp", "fsdp", *(["hsdp"] if several else [])]
    with torch.device("meta"):
        model = create_model(**config.model_arguments())
    return [make_plan(config, model, mode, cluster) for mode in modes]


def make_plan(config: PretrainConfig, model: Any, mode: ParallelMode, cluster: PlanConfig) -> Plan:
    """The plan of a run whose GPUs share the work by ``mode``; the model may be on the meta device.

    Raises:
        ValueError: GPUs that are not whole nodes, a mode that does not fit them, or a batch without an image for each.
    """
    from fastmae.train.autotune import divide_batch
    from fastmae.train.flops import count_flops

    train, ratio, hardware, gpus = config.train, config.model.mask_ratio, cluster.hardware, cluster.gpus
    masks, checkpointing = train.masks_per_image, train.activation_checkpointing
    nodes, per_node = max(1, gpus // cluster.gpus_per_node), min(gpus, cluster.gpus_per_node)
    if gpus != nodes * per_node:
        raise ValueError(f"--gpus: expected whole nodes of {cluster.gpus_per_node} or part of one, got {gpus}")
    if mode == "none" and gpus > 1:
        raise ValueError(f"--train.parallel: expected ddp, fsdp or hsdp for {gpus} GPUs, got none")
    share, _ = divide_batch(train.global_batch_size, gpus, masks_per_image=masks)  # the largest; other GPUs wait for it
    c, r = (4 if train.precision == "fp32" else 2), (2 if config.model.residual_dtype == "bfloat16" else 4)
    shards = {"none": 1, "ddp": 1, "fsdp": gpus, "hsdp": per_node}[mode]
    trained, blocks = _weights(model)

    gathered = trained  # in the compute precision: without shards the multi-tensor cast holds all weights
    if shards > 1:  # FSDP: what is in no block; the block in use, the next one, and the buffer that it arrives in
        own = 3 * max(blocks) if train.reshard_after_forward else sum(blocks) + max(blocks)
        gathered = trained - sum(blocks) + own
    state = {
        "weights, fp32": 4 * trained / shards,
        "gradients": 4 * trained / shards,
        "AdamW": 8 * trained / shards,
        "low-precision weights": c * gathered if c < 4 else 0,
    }
    activations = sum(activation_bytes(model, ratio, c, r, checkpointing))
    pixels = 3 * model.in_chans * model.input_size[0] * model.input_size[1] / masks  # one batch and two ready

    def fitting() -> int:
        free = hardware.memory_gb * 1e9 * hardware.memory_fraction - sum(state.values())
        return max(0, int(free / (activations + pixels) / masks) * masks)

    largest, batch = fitting(), train.batch_size if isinstance(train.batch_size, int) else None
    if shards > 1 and train.reduce_every == "step" and min(batch or largest, largest) < share:
        # FSDP keeps whole gradients while micro-batches accumulate.
        state["gradients"] = (2 if train.reduce_dtype == "bf16" else 4) * trained
        largest = fitting()
    batch, accumulation = divide_batch(train.global_batch_size, gpus, batch or max(largest, masks), masks)

    def per_image(checkpointing: str) -> int:
        one, two = (count_flops(model.architecture, n, ratio, checkpointing) for n in (1, 2))
        return two - one  # without the mask tokens' projections, which a batch needs once

    needed, executed = per_image("none"), per_image(checkpointing)
    bandwidth = hardware.memory_tb_per_s * 1e12 * hardware.memory_bandwidth_fraction
    products = share * executed / (hardware.tflops * 1e12 * hardware.tflops_fraction)
    passes = share * passes_per_image(model, ratio, c, r) * executed / needed / bandwidth
    sent = sent_per_step(model, train, mode, gpus, per_node, accumulation)
    seconds = {
        "matrix products": products,
        "passes over activations": passes,
        "AdamW": 32 * trained / shards / bandwidth,  # norm of gradients; all four read, weights and moments written
        "communication not hidden": _exposed(sent, nodes, per_node, hardware, products + passes),
    }
    step = sum(seconds.values())
    rate = train.global_batch_size / step
    epochs = train.epochs or 800
    return {
        "mode": mode,
        "gpus": gpus,
        "nodes": nodes,
        "parameters": trained,
        "flops_per_image": needed,
        "memory": state | {"activations": batch * activations, "images": batch * pixels},
        "batch": {
            "images at a time": batch,
            "micro-batches per step": accumulation,
            "images at a time that fit": largest,
        },
        "sent": sent,
        "seconds": seconds,
        "run": {
            "images per second": round(rate),
            "MFU": rate * needed / gpus / (hardware.tflops * 1e12),
            "CPU cores per node to decode": round(rate / masks / nodes / IMAGES_PER_CORE),
            "GB/s read from storage": rate / masks * IMAGE_BYTES / 1e9,
            "GB of a checkpoint": 12 * trained / 1e9,
            f"days for {epochs:g} epochs": epochs * cluster.images / rate / 86400,
        },
    }


def sent_per_step(
    model: Any, train: TrainConfig, mode: ParallelMode, gpus: int, per_node: int, accumulation: int
) -> dict[str, float]:
    """Bytes that each GPU sends, and receives, in a step, by ring algorithms.

    DDP all-reduces gradients once: 2 (n - 1) / n of them. FSDP all-gathers weights in the compute precision before each
    forward and again before each backward, and reduce-scatters gradients once or with each micro-batch: (n - 1) / n
    each. HSDP does so inside a node and all-reduces the shards of gradients across nodes.
    """
    if gpus == 1 or mode == "none":
        return {}
    trained, blocks = _weights(model)
    gradients = (2 if train.reduce_dtype == "bf16" else 4) * trained
    if mode == "ddp":
        return {"all-reduce": 2 * (gpus - 1) / gpus * gradients}
    ranks, nodes = per_node if mode == "hsdp" else gpus, gpus // per_node
    gathered = trained + (sum(blocks) if train.reshard_after_forward else 0)
    sent = {
        "all-gather": accumulation * (ranks - 1) / ranks * (4 if train.precision == "fp32" else 2) * gathered,
        "reduce-scatter": (accumulation if train.reduce_every == "micro-batch" else 1)
        * (ranks - 1)
        / ranks
        * gradients,
    }
    if mode == "hsdp" and nodes > 1:
        sent["all-reduce across nodes"] = 2 * (nodes - 1) / nodes * gradients / ranks
    return sent


def activation_bytes(
    model: Any, mask_ratio: float, c: int = 2, r: int = 4, checkpointing: str = "none"
) -> tuple[int, int]:
    """Bytes of activations that one image keeps for the backward, and the most that the backward needs besides.

    A row of a block keeps the stream before either norm (2 r D) with mean and deviation (2 x 8), queries, keys, values
    and attention's output (4 c D), a log-sum per head (4 H) and the hidden layer (4 c D). ``selective`` replaces the
    first half by the branch that comes in (c D); ``full`` keeps what comes in, (r + c) D.
    """
    rows = _rows(model, mask_ratio)
    size = {
        "none": lambda d, h: (2 * r + 8 * c) * d + 16 + 4 * h,
        "selective": lambda d, h: (r + 5 * c) * d + 8,
        "full": lambda d, h: (r + c) * d,
    }[checkpointing]
    kept = sum(n * size(d, h) for n, d, h in rows)
    visible, hidden = int(model.num_patches * (1 - mask_ratio)), rows[-1][0]
    width, decoder, values = rows[0][1], rows[-1][1], model.decoder_pred.out_features
    ends = c * values * (visible + hidden) + (1 + visible) * (r * width + 8) + hidden * (r * decoder + 8)
    # In the backward of an MLP: gradients of stream and branch, of the hidden layer before and after GELU, its output.
    backward = max(n * ((r + c) + 12 * c) * d for n, d, _ in rows)
    again = max(n * ((2 * r + 8 * c) * d + 16 + 4 * h) for n, d, h in rows) if checkpointing == "full" else 0
    return kept + ends, backward + again


def passes_per_image(model: Any, mask_ratio: float, c: int = 2, r: int = 4) -> int:
    """Bytes that one image moves in what is no matrix product, forward and backward.

    Two norms with residual adds, 2 (2 r + 2 c) D and 2 (3 r + 3 c) D; GELU, 8 c D and 16 c D; attention, 4 c D and
    7 c D; bias gradients, 3 c D.
    """
    return sum(n * (2 * (5 * r + 5 * c) + 24 * c + 14 * c) * d for n, d, _ in _rows(model, mask_ratio))


def _weights(model: Any) -> tuple[int, list[int]]:
    """Numbers of trained weights: of the model, and of each block."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in (*model.blocks, *model.decoder_blocks)]
    return sum(p.numel() for p in model.parameters() if p.requires_grad), blocks


def _rows(model: Any, mask_ratio: float) -> list[tuple[int, int, int]]:
    """Rows, width and heads of each block; of the last one only masked rows go through attention's output and MLP."""
    visible = int(model.num_patches * (1 - mask_ratio))
    encoder = [(1 + visible, b.norm1.normalized_shape[0], b.attn.num_heads) for b in model.blocks]
    decoder = [(1 + model.num_patches, b.norm1.normalized_shape[0], b.attn.num_heads) for b in model.decoder_blocks]
    return encoder + decoder[:-1] + [(model.num_patches - visible, *decoder[-1][1:])]


def _exposed(sent: dict[str, float], nodes: int, per_node: int, hardware: Hardware, computing: float) -> float:
    """Seconds of communication that computation cannot hide: gradients overlap with the backward (two thirds of the
    time), gathered weights with both passes."""
    if not sent:
        return 0.0
    inside = hardware.nvlink_gb_per_s * 1e9 * hardware.link_fraction
    # Rings over several nodes leave each through every GPU's port.
    outside = min(hardware.nvlink_gb_per_s, hardware.network_gb_per_s * per_node) * 1e9 * hardware.link_fraction
    across = sent.get("all-reduce across nodes", 0.0) / (hardware.network_gb_per_s * 1e9 * hardware.link_fraction)
    link = outside if nodes > 1 and not across else inside
    gather, reduce = (sent.get(name, 0.0) / link for name in ("all-gather", "reduce-scatter"))
    gradients = max(reduce, across) + sent.get("all-reduce", 0.0) / link
    in_forward, in_backward = gather / 2 - computing / 3, gather / 2 + gradients - 2 * computing / 3
    return max(0.0, in_forward) + max(0.0, in_backward)


def show_plans(plans: list[Plan], config: PretrainConfig) -> None:
    """Print plans side by side."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    first = plans[0]
    console.print(
        f"{config.model.name}: {first['parameters'] / 1e6:,.1f} M weights, {first['flops_per_image'] / 1e9:,.1f} GFLOP "
        f"per image forward and backward; {first['gpus']} GPUs on {first['nodes']} node{'s' * (first['nodes'] > 1)}, "
        f"global batch {config.train.global_batch_size:,}. An estimate: nothing was run."
    )
    table = Table("", box=None, pad_edge=False)
    for plan in plans:
        table.add_column(plan["mode"], justify="right")
    for part, (title, unit, digits) in _TABLE.items():
        values = [plan[part] for plan in plans]
        if part in ("memory", "seconds"):
            values = [value | {"total": sum(value.values())} for value in values]
        names = list(dict.fromkeys(name for value in values for name in value))
        if names:
            table.add_row(title, style="bold")
        for name in names:
            table.add_row(f"  {name}", *(_cell(value.get(name), unit, digits) for value in values))
    console.print(table)


def _cell(value: float | None, unit: float, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and unit == 1 else f"{value * unit:.{digits}f}"
