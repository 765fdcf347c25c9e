"""``--train.batch-size auto``: the batch that a device's memory holds, by the estimate of ``fastmae plan``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from fastmae.train.batching.batch_division import divide_batch
from fastmae.train.compilation import uses_cuda_graphs
from fastmae.train.config import PretrainConfig
from fastmae.train.resolution import progressive_sizes
from fastmae.train.scaling.batch import BatchFit, TooLargeError, fit_batch
from fastmae.train.scaling.communication import Mode
from fastmae.train.scaling.hardware import Cluster, Hardware
from fastmae.train.scaling.kept import Kept, kept_per_image
from fastmae.train.scaling.memory import Memory, states
from fastmae.train.scaling.plan import COMPUTE_BYTES
from fastmae.train.scaling.sizes import Sizes, preset_sizes
from fastmae.train.scaling.work import Attention, Checkpointing

CPU_KEEPS = 1.7
"""On the CPU the ops are composed of PyTorch's, which keep up to so many times what the fused ones keep (counted)."""
_PLACES = {"cuda": "the GPU that has least", "cpu": "the host for each process"}


@dataclass(frozen=True)
class Machine:
    """What a batch has to fit.

    Attributes:
        device: "cuda" or "cpu".
        free_bytes: of the memory of the device that has least, before the model is there; of the CPU's the part of one
            process. None where it is not known.
        world_size: processes.
        mode: what they share; "fsdp" and "hsdp" shard.
        shard_size: processes that share one copy of the model under "hsdp".
        attention: what it keeps for the backward: "plain" the matrix of scores.
        decoded_bytes: of device memory for an image that is decoded there, before it is resized.
    """

    device: Literal["cpu", "cuda"]
    free_bytes: int | None
    world_size: int = 1
    mode: Mode = "none"
    shard_size: int = 1
    attention: Attention = "fused"
    decoded_bytes: int = 0


class Settled(NamedTuple):
    """A configuration with a number in place of "auto"."""

    config: PretrainConfig
    text: str
    """What was chosen, and by what estimate."""
    memory: Memory | None = None
    """The estimate; None where nothing is known of the memory."""


def settle_batch_size(config: PretrainConfig, machine: Machine, saved: Mapping[str, Any] | None = None) -> Settled:
    """Put a number in the place of the batch size.

    The largest batch whose estimated memory is at most 0.85 of what is free, less a reserve; it divides the share of a
    process in the global batch and holds whole images. On the CPU all of the share, unless that is more than the memory
    holds. A run that is continued keeps the batch it had where that still fits, because sums over other batches round
    differently.

    Args:
        config: validated.
        machine: the smallest among those of all processes, so that they agree.
        saved: the manifest of the checkpoint to go on from, if any.

    Raises:
        ValueError: not even one image fits; says what would help. Or the global batch does not divide.
    """
    train = config.train
    if machine.free_bytes is None:
        processes, masks = machine.world_size, train.masks_per_image
        batch, accumulation = divide_batch(train.global_batch_size, processes, multiple_of=masks)
        return _settled(config, batch, f"{batch:,} images x {accumulation}; how much memory is free is not known")
    hardware = Hardware(hbm_gb=machine.free_bytes / 1e9)
    hardware = replace(hardware, reserved_gb=hardware.reserved_gb + _graph_bytes(config, machine) / 1e9)
    try:
        fit = _fit(config, machine, hardware)
    except TooLargeError as error:
        raise ValueError(_refusal(config, machine, hardware, error)) from error
    before = None if saved is None else _batch_before(config, machine, saved)
    if before is not None and before[0] <= fit.largest:
        fit = _fit(config, machine, hardware, most=before[0])
    used = fit.memory.total - fit.memory.reserved
    free = f"{machine.free_bytes / 1e9:.1f} GB free on {_PLACES[machine.device]}"
    text = (
        f"{fit.batch_size:,} images x {fit.accumulation}, an estimated {used / 1e9:.3g} GB of "
        f"{hardware.usable_bytes / 1e9:.1f} GB to use ({free}); {fit.largest:,} would fit"
    )
    if before is not None and before[0] == fit.batch_size:
        return _settled(config, before[1], f"{text}; as before", fit.memory)
    return _settled(config, fit.batch_size, text, fit.memory)


def _settled(config: PretrainConfig, batch_size: int | None, text: str, memory: Memory | None = None) -> Settled:
    train = replace(config.train, batch_size=batch_size)
    return Settled(replace(config, train=train), f"Batch size auto: {text}", memory)


def _fit(config: PretrainConfig, machine: Machine, hardware: Hardware, most: int | None = None) -> BatchFit:
    train = config.train
    largest = max(_all_sizes(config), key=lambda sizes: sizes.num_patches)
    sharded = machine.mode in ("fsdp", "hsdp")
    shards = machine.shard_size if machine.mode == "hsdp" else machine.world_size
    # Copies of the model beside each other need no more memory than one, so that only the global batch knows of them.
    cluster = Cluster(shards, shards) if sharded else Cluster(1, 1)
    copies = machine.world_size // cluster.gpus
    share, left = divmod(train.global_batch_size, copies)
    if left:  # said in the words of the division
        divide_batch(train.global_batch_size, machine.world_size, multiple_of=train.masks_per_image)
    return fit_batch(
        largest,
        "fsdp" if sharded else "none",
        cluster,
        hardware,
        _kept(config, machine, largest),
        share,
        most=most,
        masks_per_image=train.masks_per_image,
        decoded_bytes=machine.decoded_bytes,
        compute_bytes=COMPUTE_BYTES[train.precision],
        reshard_after_forward=train.reshard_after_forward,
    )


def _graph_bytes(config: PretrainConfig, machine: Machine) -> int:
    """Of gradients and weights' copies that lie in a CUDA graph's own memory beside those that the step sees."""
    train = config.train
    if machine.device != "cuda" or not (train.compile and uses_cuda_graphs(train.compile_mode)):
        return 0
    held = states(next(_all_sizes(config)), "none", Cluster(1, 1), compute_bytes=COMPUTE_BYTES[train.precision])
    return held.gradients + held.copies


def _all_sizes(config: PretrainConfig) -> Iterator[Sizes]:
    """The model with images of each size that the run goes through."""
    names = {field.name for field in fields(Sizes)} - {"img_size", "mlp_ratio"}
    arguments = {name: getattr(config.model, name) for name in names}
    for size in progressive_sizes(config.data.progressive_sizes, config.img_size) or (config.img_size,):
        yield preset_sizes(config.model.name, **arguments, img_size=tuple(size))


def _kept(config: PretrainConfig, machine: Machine, sizes: Sizes) -> Kept:
    train = config.train
    kept = kept_per_image(
        sizes,
        config.model.mask_ratio,
        compute_bytes=COMPUTE_BYTES[train.precision],
        residual_bytes=2 if config.model.residual_dtype == "bfloat16" else 4,
        attention=machine.attention,
        activation_checkpointing=train.activation_checkpointing,
    )
    if machine.device == "cpu":
        return Kept(*(round(CPU_KEEPS * value) for value in kept))
    return kept


def _batch_before(config: PretrainConfig, machine: Machine, saved: Mapping[str, Any]) -> tuple[int, int | None] | None:
    """The batch of the saved run where it divides this one's share as it did, and how its configuration said it."""
    then = saved["config"]["train"]
    here = config.train
    same = (then["global_batch_size"], then.get("masks_per_image", 1)) == (here.global_batch_size, here.masks_per_image)
    same = same and saved.get("world_size", 1) == machine.world_size
    asked = then.get("batch_size")
    if not same or isinstance(asked, str):
        return None
    return divide_batch(here.global_batch_size, machine.world_size, asked, multiple_of=here.masks_per_image)[0], asked


def _refusal(config: PretrainConfig, machine: Machine, hardware: Hardware, error: TooLargeError) -> str:
    """What does not fit, and which flags would help."""
    kinds: tuple[Checkpointing, ...] = ("none", "selective", "full")
    stronger = kinds[kinds.index(config.train.activation_checkpointing) + 1 :]
    helps = []
    for kind in stronger:
        other = replace(config, train=replace(config.train, activation_checkpointing=kind))
        helps += [f"--train.activation-checkpointing {kind}"] * _fits(other, machine, hardware)
    if machine.world_size > 1 and machine.mode not in ("fsdp", "hsdp"):
        helps += ["--train.parallel fsdp"] * _fits(config, replace(machine, mode="fsdp"), hardware)
    advice = " or ".join(helps) or "a smaller model, or more processes with --train.parallel fsdp"
    free, place = (machine.free_bytes or 0) / 1e9, _PLACES[machine.device]
    return f"--train.batch-size: auto {error}, of {free:.1f} GB free on {place}; what would help: {advice}"


def _fits(config: PretrainConfig, machine: Machine, hardware: Hardware) -> bool:
    try:
        _fit(config, machine, hardware)
    except TooLargeError:
        return False
    return True
