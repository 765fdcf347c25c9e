"""Several processes on one model: process group and device mesh, DDP, FSDP2, and hybrid sharding (HSDP).

Sharding follows PyTorch's order: activation checkpointing, then ``torch.compile`` of each block, then ``fully_shard``
of each block, then of the rest. Names of parameters stay those of the bare model in every mode, so that checkpoints,
optimiser groups and the initialisation need not know.
"""

from __future__ import annotations

import inspect
import os
import resource
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import pairwise
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastmae.model.initialization import draw_parameter, sincos_positions
from fastmae.train.compilation import check_compile_mode, compile_blocks, compile_model, graphed_batch
from fastmae.train.config import ParallelMode, ReduceEvery, TrainConfig
from fastmae.train.launcher import place

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What matrix products compute in."""

MAX_FILES = 65_536
"""Open files that are enough for any number of processes."""


@dataclass(frozen=True)
class Parallelism:
    """Where this process stands among those that train a model together, and how they do it.

    ``mesh`` is one-dimensional ("shard" or "replicate") or, for HSDP, ("replicate", "shard"). ``owns_group``: the
    process group was made for it, and not found.
    """

    mode: ParallelMode = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    owns_group: bool = False

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded (DTensors)."""
        return self.mode in ("fsdp", "hsdp")

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes: a new tensor, the same everywhere."""
        values = values.clone()
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that reports."""
        return self.rank == 0


def initialize(
    mode: Literal["auto", ParallelMode] = "auto",
    device_type: Literal["auto", "cpu", "cuda"] = "cpu",
    *,
    shard_size: int | None = None,
    timeout: float = 600.0,
) -> Parallelism:
    """Join the processes that torchrun started: default process group, this process's device, device mesh.

    Without torchrun's variables this is the only process. A process group that exists is used as it is.

    Args:
        device_type: "cpu" (gloo), "cuda" (NCCL; the device of the local rank), or "auto", CUDA where there is a GPU.
        shard_size: processes that share one copy of the model under "hsdp"; None for those of a node. If that is all of
            them, "hsdp" shards over all as "fsdp" does.
        timeout: seconds until a collective that not all ranks reach is an error.

    Raises:
        ValueError: several processes and mode "none", a shard size that does not divide them, too few GPUs, or an
            environment that is torchrun's in part only.
    """
    rank, world_size, local_rank, local_world_size = place()
    if mode == "auto":
        mode = "ddp" if world_size > 1 else "none"
    if mode == "none" and world_size > 1:
        raise ValueError(f"--train.parallel: expected auto, ddp, fsdp or hsdp for {world_size} processes, got none")
    if shard_size is not None and mode != "hsdp":
        raise ValueError(f"--train.shard-size: only hsdp takes one, got {shard_size} with {mode}")
    shard_size = shard_size or local_world_size
    if mode == "hsdp" and (shard_size < 1 or world_size % shard_size):
        raise ValueError(f"--train.shard-size: expected a divisor of the {world_size} processes, got {shard_size}")
    device = _device(device_type, local_rank)
    if mode == "none":
        return Parallelism(device=device)
    owns_group = not dist.is_initialized()
    if owns_group:
        _init_process_group(device, rank, world_size, timeout)
    shape, names = (world_size,), ("replicate" if mode == "ddp" else "shard",)
    if mode == "hsdp" and shard_size < world_size:
        shape, names = (world_size // shard_size, shard_size), ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return Parallelism(mode, rank, world_size, local_rank, device, mesh, owns_group)


def shutdown(parallelism: Parallelism, *, failed: bool = False) -> None:
    """Leave the process group, if :func:`initialize` made it.

    After an error NCCL's group is left to the end of the process: its own end waits for the collectives that are under
    way, and one that a failed rank has not joined never ends.
    """
    if parallelism.owns_group and dist.is_initialized() and not (failed and parallelism.device.type == "cuda"):
        dist.destroy_process_group()


def construct(create: Callable[[], nn.Module], parallelism: Parallelism) -> nn.Module:
    """``create()`` where its weights need not exist yet: on the meta device if they will be sharded."""
    with torch.device("meta") if parallelism.sharded else nullcontext():
        return create()


def parallelize(model: nn.Module, parallelism: Parallelism, train: TrainConfig) -> nn.Module:
    """Put a model on this process's device, as one of several that train it; return the module to call.

    The computation is to run under ``torch.autocast`` of the precision in every mode. Sharded parameters are cast once,
    where they are gathered (bf16 or fp16), and autocast then finds them cast. What goes into a module is not cast:
    masks, images and the residual stream are what they are in a single process. Position tables are neither sharded nor
    cast.

    Args:
        model: a ``MaskedAutoencoderViT`` or ``VisionTransformer``, changed in place. Parameters of the former may be on
            the meta device, and then get the weights that a single process would draw.
        train: its precision is settled.

    Raises:
        ValueError: a mode of compilation that is not for this device or parallelism, or a ``reduce_dtype`` in a single
            process.
    """
    mode, device, compile = parallelism.mode, parallelism.device, train.compile
    if train.reduce_dtype != "fp32" and mode == "none":
        expected = "expected fp32 in a single process, which reduces nothing"
        raise ValueError(f"--train.reduce-dtype: {expected}, got {train.reduce_dtype}")
    if compile != "none":
        check_compile_mode(train.compile_mode, device_type=device.type, sharded=parallelism.sharded)
    model.set_activation_checkpointing(train.activation_checkpointing)
    whole = compile == "model" and mode == "none"
    if compile != "none" and not whole:
        compile_blocks(model, train.compile_mode)
    if parallelism.sharded:
        _shard(model, parallelism, train)
    if next(model.parameters()).is_meta:
        materialize(model, device, train.seed)
    else:
        model.to(device)
    if mode == "ddp":
        # PyTorch 2.14 renames it, and warns of the old name on every rank.
        known = inspect.signature(DistributedDataParallel).parameters
        syncing = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options = {syncing: False, "gradient_as_bucket_view": True}
        ids = [device.index] if device.type == "cuda" else None
        replicated = DistributedDataParallel(model, ids, device_mesh=parallelism.mesh, **options)
        if train.reduce_dtype == "bf16":
            replicated.register_comm_hook(None, bf16_compress_hook)
        return replicated
    return compile_model(model, train.compile_mode) if whole else model


@torch.no_grad()
def materialize(model: nn.Module, device: torch.device, seed: int) -> None:
    """Give a model on the meta device the weights that :meth:`initialize_weights` with this seed gives it elsewhere.

    Every process draws every parameter and keeps its shard, so that nothing is communicated and no process ever holds
    more than one whole parameter.
    """
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            parameter.copy_(sincos_positions(parameter.shape[-1], model.base_grid))
            continue
        value = draw_parameter(name, parameter.shape, seed)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def no_sync(model: nn.Module, last: bool, reduce_every: ReduceEvery = "step") -> AbstractContextManager[None]:
    """A context for forward and backward of one of several micro-batches that accumulate into a step.

    Gradients are reduced over the processes with the last one only; until then a process keeps its own, whole ones.
    With ``reduce_every="micro-batch"`` FSDP scatters each batch's and keeps a shard of the sum; what HSDP reduces
    across nodes still waits for the last.
    """
    context = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or reduce_every == "micro-batch")
        model.set_requires_all_reduce(last)
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    return graphed_batch(bare, last, context) if getattr(bare, "cuda_graphs", False) else context


def _device(device_type: str, local_rank: int) -> torch.device:
    if device_type == "cpu" or (device_type == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"--train.device: expected a GPU for each process of a node, got {count} for rank {local_rank}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _init_process_group(device: torch.device, rank: int, world_size: int, timeout: float) -> None:
    cuda = device.type == "cuda"
    # gloo needs a descriptor per peer in each group, and 512 processes reach the usual soft limit of 1,024.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if 0 <= soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    options = {"timeout": timedelta(seconds=timeout), "device_id": device if cuda else None}
    if "MASTER_ADDR" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": rank, "world_size": world_size}
    elif (restart := os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) != "0":
        # torchrun keeps its store when it restarts the processes, and in it the addresses of those that have ended.
        store, rank, world_size = next(dist.rendezvous("env://", rank, world_size))
        options |= {"store": dist.PrefixStore(f"restart-{restart}", store), "rank": rank, "world_size": world_size}
    # No gloo beside NCCL: tensors on the CPU go over the side group of Ranks.
    dist.init_process_group("nccl" if cuda else "gloo", **options)


def _shard(model: nn.Module, parallelism: Parallelism, train: TrainConfig) -> None:
    policy = MixedPrecisionPolicy(
        param_dtype=None if train.precision == "fp32" else DTYPES[train.precision],
        reduce_dtype=DTYPES[train.reduce_dtype],
        cast_forward_inputs=False,
    )
    options = {"mesh": parallelism.mesh, "mp_policy": policy}
    blocks = model.all_blocks
    for block in blocks:
        fully_shard(block, reshard_after_forward=train.reshard_after_forward, **options)
    # The root's own parameters are used at the beginning and at the end, so they stay until the backward is done.
    # What a block returns, nobody changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    if not hasattr(model, "decoder_blocks"):
        # Of a classifier the root's own are position tables, norm and head: float32, as they are without shards.
        options["mp_policy"] = replace(policy, param_dtype=None)
    fully_shard(model, reshard_after_forward=False, ignored_params=frozen, **options)
    for name in ("encode", "forward_encoder", "forward_decoder"):
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
