"""Bytes of the collectives that a training step really calls, and of what a rank really holds."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from living import Living
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmae.model import MaskedAutoencoderViT
from fastmae.ops import random_masking
from fastmae.train import parallel
from fastmae.train.checkpoint import Ranks
from fastmae.train.checkpoint.write import share_of
from fastmae.train.model_state import collect

SIZES = {
    "img_size": (32, 32), "patch_size": (8, 8), "in_chans": 3, "embed_dim": 40, "depth": 3, "num_heads": 2,
    "decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 2,
}  # fmt: skip
_NAMES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


class CollectiveBytes(TorchDispatchMode):
    """Counts the collectives inside: calls, and bytes of the whole tensor that is reduced, gathered or scattered.

    Attributes:
        calls, bytes: by name and number of ranks.
    """

    def __init__(self):
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()
        self.bytes: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and func.overloadpacket.__name__ in _NAMES:
            name = _NAMES[func.overloadpacket.__name__]
            group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            key = name, dist.ProcessGroup.unbox(group).size()
            self.calls[key] += 1
            # The whole tensor is the longest argument: the output that is gathered, the input that is scattered.
            self.bytes[key] += max(_total(arg) for arg in args)
        return func(*args, **(kwargs or {}))


def _total(argument: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(argument) if isinstance(t, Tensor))


@contextmanager
def pretended(world_size: int, ranks_per_node: int, monkeypatch):
    """This process as rank 0 of as many as there are not: collectives do nothing, but are called."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    environment = {"RANK": 0, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": ranks_per_node}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(
    mode: str,
    *,
    precision: str = "bf16",
    accumulation: int = 1,
    reshard_after_forward: bool = True,
    saves: bool = False,
) -> dict[str, Any]:
    """A step in any mode: its collectives by name and ranks, and bytes of what this rank holds after it, and would
    write into a checkpoint."""
    place = parallel.initialize(mode)
    model = parallel.construct(lambda: MaskedAutoencoderViT(**SIZES, seed=0), place)
    forward = parallel.parallelize(
        model, place, seed=0, precision=precision, reshard_after_forward=reshard_after_forward
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    masking = random_masking(2, model.num_patches, 0.75, seed=0)
    dtype = parallel.DTYPES[precision]
    with CollectiveBytes() as counted:
        for index in range(accumulation):
            with parallel.no_sync(forward, last=index == accumulation - 1):
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    loss = forward(images, masking=masking, full_pred=False).loss
                loss.backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "calls": dict(counted.calls),
        "bytes": dict(counted.bytes),
        "weights": _held(model.parameters()),
        "gradients": _held(gradients),
        "optimizer": _held(states),
        "written": _written(model, optimizer) if saves else 0,
    }


def measure_all(rank: int, cases: list[tuple[str, dict]]) -> list[dict[str, Any]]:
    """One rank's part of :func:`measure`, for each case."""
    return [measure(mode, saves=True, **options) for mode, options in cases]


def _written(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    with Ranks.create() as ranks:
        parts = share_of(collect(model, optimizer), {}, ranks).parts.values()
    return sum(part.tensor.numel() * part.tensor.element_size() for part in parts)


def _held(tensors) -> int:
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def peaks(sizes: dict, accumulation: int, reshard_after_forward: bool) -> tuple[int, int, int]:
    """Bytes of a rank's shards under FSDP, and at most more in the first forward and in the step's last backward."""
    place = parallel.initialize("fsdp")
    model = parallel.construct(lambda: MaskedAutoencoderViT(**sizes, seed=0), place)
    options = {"precision": "bf16", "reshard_after_forward": reshard_after_forward}
    forward = parallel.parallelize(model, place, seed=0, **options)
    images = torch.randint(0, 256, (2, 3, *sizes["img_size"]), dtype=torch.uint8)
    masking = random_masking(2, model.num_patches, 0.5, seed=0)
    with Living(every_op=True) as living:
        living.see(*(p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()))
        held, seen = living.bytes(), []
        for index in range(accumulation):
            with parallel.no_sync(forward, last=index == accumulation - 1):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = forward(images, masking=masking, full_pred=False).loss
                seen.append(living.peak)
                living.peak = 0
                loss.backward()
                seen.append(living.peak)
    return held, seen[0] - held, seen[-1] - held
