"""Bytes of the collectives that a training step really calls."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmae.model import MaskedAutoencoderViT
from fastmae.ops import random_masking
from fastmae.train import parallel
from fastmae.train.config import TrainConfig

_NAMES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


class CollectiveBytes(TorchDispatchMode):
    """Bytes of the whole tensor that each collective inside reduces, gathers or scatters, by name and ranks."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = _NAMES.get(func.overloadpacket.__name__) if func.namespace == "c10d" else None
        if name:
            group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            # The whole tensor is the longest argument: the output that is gathered, the input that is scattered.
            whole = max(sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args)
            self.bytes[name, dist.ProcessGroup.unbox(group).size()] += whole
        return func(*args, **(kwargs or {}))


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


def sent_in_a_step(
    mode: str, sizes: dict[str, Any], accumulation: int, reshard_after_forward: bool
) -> dict[str, float]:
    """Bytes that this rank sends in a bf16 step, by collective, as ring algorithms send them."""
    place = parallel.initialize(mode)
    model = parallel.construct(lambda: MaskedAutoencoderViT(**sizes, seed=0), place)
    train = TrainConfig(precision="bf16", reshard_after_forward=reshard_after_forward)
    forward = parallel.parallelize(model, place, train)
    images = torch.randint(0, 256, (2, 3, *sizes["img_size"]), dtype=torch.uint8)
    masking = random_masking(2, model.num_patches, 0.75, seed=0)
    with CollectiveBytes() as counted:
        for index in range(accumulation):
            with parallel.no_sync(forward, last=index == accumulation - 1):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = forward(images, masking=masking, full_pred=False).loss
                loss.backward()
    sent: dict[str, float] = {}
    for (name, ranks), size in counted.bytes.items():
        label = f"{name} across nodes" if mode == "hsdp" and name == "all-reduce" else name
        sent[label] = (2 if name == "all-reduce" else 1) * (ranks - 1) / ranks * size
    return sent
