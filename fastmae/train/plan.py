"""``fastmae plan``: memory, communication and time of a run on n GPUs, before one is rented.

Parameters and FLOPs come from the model itself, on the meta device. Bytes are closed forms, which tests compare with
counts and with real collectives. Times are floors: matrix products and passes over memory at a stated fraction of the
data sheet, plus the communication that cannot hide behind them. Launches, stragglers and data loading come on top.

Notation: D width, H heads, c bytes of a value in matrix products, r of one in the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastmae.train.config import ActivationCheckpointing, ParallelMode, PretrainConfig

IMAGES_PER_CORE = 855
"""ImageNet JPEGs that one core of an AMD EPYC reads, decodes and resizes per second (DALI's CPU backend; measured,
docs/data.md)."""
IMAGE_BYTES = 110_000
"""Mean size of an ImageNet JPEG."""


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
class Plan:
    """What a run takes, of one GPU and optimiser step unless a name says otherwise."""

    mode: ParallelMode
    gpus: int
    nodes: int
    parameters: int
    flops_per_image: float
    """Forward and backward, without what activation checkpointing repeats (the definition of MFU)."""
    memory: dict[str, float]
    """Bytes by what holds them."""
    batch: dict[str, int]
    """Images at a time and micro-batches; 0 images fit if not even the weights do."""
    sent: dict[str, float]
    """Bytes that a GPU sends by collective."""
    seconds: dict[str, float]
    run: dict[str, float]
    """Images per second, MFU, what they need of CPUs and storage, days."""


def make_plan(
    config: PretrainConfig,
    model: Any,
    mode: ParallelMode,
    *,
    gpus: int = 8,
    gpus_per_node: int = 8,
    num_images: int = 1_281_167,
    hardware: Hardware | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        model: the configuration's, on any device, "meta" included.
        mode: what the GPUs share, instead of the configuration's.
        gpus: in all; whole nodes, or part of one.
        num_images: in the data set.

    Raises:
        ValueError: GPUs that are not whole nodes, a mode that does not fit them, or a batch without an image for each.
    """
    # These import PyTorch, for which --help does not wait.
    from fastmae.train.batch_size import divide_batch
    from fastmae.train.flops import count_flops

    train, ratio, hardware = config.train, config.model.mask_ratio, hardware or Hardware()
    masks, checkpointing = train.masks_per_image, train.activation_checkpointing
    nodes, per_node = max(1, gpus // gpus_per_node), min(gpus, gpus_per_node)
    if gpus != nodes * per_node:
        raise ValueError(f"--gpus: expected whole nodes of {gpus_per_node} or part of one, got {gpus}")
    if mode == "none" and gpus > 1:
        raise ValueError(f"--train.parallel: expected ddp, fsdp or hsdp for {gpus} GPUs, got none")
    share, _ = divide_batch(train.global_batch_size, gpus, multiple_of=masks)  # the largest; other GPUs wait for it
    g, each_time = (2 if train.reduce_dtype == "bf16" else 4), train.reduce_every == "micro-batch"
    c, r = (4 if train.precision == "fp32" else 2), (2 if config.model.residual_dtype == "bfloat16" else 4)
    shards = {"none": 1, "ddp": 1, "fsdp": gpus, "hsdp": per_node}[mode]
    blocks = [sum(p.numel() for p in block.parameters()) for block in (*model.blocks, *model.decoder_blocks)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

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
    if shards > 1 and not each_time and min(batch or largest, largest) < share:
        state["gradients"] = g * trained  # FSDP keeps whole gradients while micro-batches accumulate
        largest = fitting()
    batch, accumulation = divide_batch(train.global_batch_size, gpus, batch or max(largest, masks), masks)

    def per_image(checkpointing: ActivationCheckpointing) -> int:
        one, two = (count_flops(model.architecture, n, ratio, checkpointing) for n in (1, 2))
        return two - one  # without the mask tokens' projections, which a batch needs once

    needed, executed = per_image("none"), per_image(checkpointing)
    bandwidth = hardware.memory_tb_per_s * 1e12 * hardware.memory_bandwidth_fraction
    products = share * executed / (hardware.tflops * 1e12 * hardware.tflops_fraction)
    passes = share * passes_per_image(model, ratio, c, r) * executed / needed / bandwidth
    reductions = accumulation if each_time else 1
    sent = sent_per_step(
        trained, blocks, mode, gpus, per_node, c, accumulation, train.reshard_after_forward, g, reductions
    )
    seconds = {
        "matrix products": products,
        "passes over activations": passes,
        "AdamW": 32 * trained / shards / bandwidth,  # norm of gradients; all four read, weights and moments written
        "communication not hidden": _exposed(sent, nodes, per_node, hardware, products + passes),
    }
    step = sum(seconds.values())
    rate = train.global_batch_size / step
    epochs = train.epochs or 800
    return Plan(
        mode=mode,
        gpus=gpus,
        nodes=nodes,
        parameters=trained,
        flops_per_image=needed,
        memory=state | {"activations": batch * activations, "images": batch * pixels},
        batch={"images at a time": batch, "micro-batches per step": accumulation, "images at a time that fit": largest},
        sent=sent,
        seconds=seconds,
        run={
            "images per second": round(rate),
            "MFU": rate * needed / gpus / (hardware.tflops * 1e12),
            "CPU cores per node to decode": round(rate / masks / nodes / IMAGES_PER_CORE),
            "GB/s read from storage": rate / masks * IMAGE_BYTES / 1e9,
            "GB of a checkpoint": 12 * trained / 1e9,
            f"days for {epochs:g} epochs": epochs * num_images / rate / 86400,
        },
    )


def sent_per_step(
    trained: int,
    blocks: list[int],
    mode: ParallelMode,
    gpus: int,
    per_node: int,
    c: int,
    accumulation: int = 1,
    reshard_after_forward: bool = True,
    g: int = 4,
    reductions: int = 1,
) -> dict[str, float]:
    """Bytes that each GPU sends, and receives, in a step, by ring algorithms.

    DDP all-reduces gradients of g bytes per value once: 2 (n - 1) / n of them. FSDP all-gathers weights in the compute
    precision before each forward and again before each backward, and reduce-scatters gradients once or with each
    micro-batch: (n - 1) / n each. HSDP does so inside a node and all-reduces the shards of gradients across nodes.
    """
    if gpus == 1 or mode == "none":
        return {}
    if mode == "ddp":
        return {"all-reduce": 2 * (gpus - 1) / gpus * g * trained}
    ranks = per_node if mode == "hsdp" else gpus
    outside, inside = trained - sum(blocks), sum(blocks)
    times = 2 if reshard_after_forward else 1
    sent = {
        "all-gather": accumulation * (ranks - 1) / ranks * c * (outside + times * inside),
        "reduce-scatter": reductions * (ranks - 1) / ranks * g * trained,
    }
    nodes = gpus // per_node
    if mode == "hsdp" and nodes > 1:
        sent["all-reduce across nodes"] = 2 * (nodes - 1) / nodes * g * trained / ranks
    return sent


def activation_bytes(
    model: Any, mask_ratio: float, c: int = 2, r: int = 4, activation_checkpointing: ActivationCheckpointing = "none"
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
    }[activation_checkpointing]
    kept = sum(n * size(d, h) for n, d, h in rows)
    visible, hidden = int(model.num_patches * (1 - mask_ratio)), rows[-1][0]
    width, decoder, values = rows[0][1], rows[-1][1], model.decoder_pred.out_features
    ends = c * values * (visible + hidden) + (1 + visible) * (r * width + 8) + hidden * (r * decoder + 8)
    # In the backward of an MLP: gradients of stream and branch, of the hidden layer before and after GELU, its output.
    backward = max(n * ((r + c) + 12 * c) * d for n, d, _ in rows)
    again = max(n * ((2 * r + 8 * c) * d + 16 + 4 * h) for n, d, h in rows) if activation_checkpointing == "full" else 0
    return kept + ends, backward + again


def passes_per_image(model: Any, mask_ratio: float, c: int = 2, r: int = 4) -> int:
    """Bytes that one image moves in what is no matrix product, forward and backward.

    Two norms with residual adds, 2 (2 r + 2 c) D and 2 (3 r + 3 c) D; GELU, 8 c D and 16 c D; attention, 4 c D and
    7 c D; bias gradients, 3 c D.
    """
    return sum(n * (2 * (5 * r + 5 * c) + 24 * c + 14 * c) * d for n, d, _ in _rows(model, mask_ratio))


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
