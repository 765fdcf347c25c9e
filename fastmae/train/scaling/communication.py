"""What the processes send each other in a step: collectives, bytes, seconds.

DDP sums whole float32 gradients. FSDP gathers a unit's weights in the compute precision before its forward, again
before its backward, and scatters the float32 sums of its gradients; a unit is a block, or all that is in no block. HSDP
does so among the GPUs of a node, and sums the shards of gradients across nodes. Position tables are in none of it.

A shard is a slice along the first dimension, as PyTorch's ``fully_shard`` cuts it: rounded up to whole rows, so that a
gathered tensor is the larger the less the number of processes divides it. A test counts the same on real collectives.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal, NamedTuple

from fastmae.train.scaling.hardware import Cluster, Hardware
from fastmae.train.scaling.sizes import Parameter, Sizes, expect, parameters
from fastmae.train.scaling.work import WIDE

Mode = Literal["none", "ddp", "fsdp", "hsdp"]
Scope = Literal["all", "node", "across"]
"""Who takes part: all GPUs, those of a node, or one of each node."""

BUCKET_BYTES = 25 << 20
"""Of gradients that DDP sums at a time; its first bucket holds a mebibyte."""


class Collective(NamedTuple):
    """Equal collectives of a step."""

    name: Literal["all-reduce", "all-gather", "reduce-scatter"]
    scope: Scope
    ranks: int
    calls: int
    """In a step."""
    bytes: int
    """Of the whole tensor, over all calls: what is reduced, gathered, or scattered."""

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends, and receives, by the ring algorithm: (n - 1) / n of the tensor to gather or to
        scatter it, twice that to reduce it for all."""
        return (2 if self.name == "all-reduce" else 1) * (self.ranks - 1) / self.ranks * self.bytes

    def seconds(self, hardware: Hardware, cluster: Cluster) -> float:
        """As if nothing else ran."""
        return self.calls * latency(self.scope, hardware, cluster) + self.sent / bandwidth(
            self.scope, hardware, cluster
        )


def bandwidth(scope: Scope, hardware: Hardware, cluster: Cluster) -> float:
    """Bytes a second that each GPU sends.

    A ring over several nodes enters and leaves each once. There are as many rings as GPUs in a node, each through
    another GPU's network port, so that together they have all ports, but no more than NVLink inside.
    """
    link = hardware.nvlink_gb_per_s
    if scope == "across":
        link = hardware.network_gb_per_s
    elif scope == "all" and cluster.nodes > 1:
        link = min(link, hardware.network_gb_per_s * cluster.gpus_in_node)
    return link * 1e9 * hardware.link_fraction


def latency(scope: Scope, hardware: Hardware, cluster: Cluster) -> float:
    """Seconds that a collective takes however little it carries."""
    hops = math.log2(cluster.nodes) if scope != "node" else 0
    return (hardware.node_latency_us + hops * hardware.network_latency_us) * 1e-6


def shard_values(parameter: Parameter, ranks: int) -> int:
    """Values of the largest shard: whole rows of the first dimension."""
    rows, *rest = parameter.shape
    return -(-rows // ranks) * math.prod(rest)


class Unit(NamedTuple):
    """Parameters that are gathered together."""

    name: str
    values: int
    shard: int
    """Values of the largest shard; every process holds so many, some of them padding."""


def units(sizes: Sizes, ranks: int) -> list[Unit]:
    """The blocks in order, and before them what is in none. Trained parameters only: tables are not sharded."""
    found: dict[str, list[Parameter]] = defaultdict(list, {"": []})
    for parameter in parameters(sizes):
        if parameter.trainable:
            found[parameter.unit].append(parameter)
    return [
        Unit(name, sum(p.count for p in group), sum(shard_values(p, ranks) for p in group))
        for name, group in found.items()
    ]


def collectives(
    sizes: Sizes,
    mode: Mode,
    cluster: Cluster,
    *,
    compute_bytes: int = 2,
    accumulation: int = 1,
    reshard_after_forward: bool = True,
) -> list[Collective]:
    """All of a step, but for single numbers (the norm of the gradient).

    Args:
        sizes: of the model.
        mode: of parallelism.
        cluster: GPUs and nodes.
        compute_bytes: of a gathered weight.
        accumulation: batches whose gradients are summed locally before they are reduced. Weights are gathered for each.
        reshard_after_forward: blocks are gathered again for the backward.
    """
    check_mode(mode, cluster)
    if mode == "none" or cluster.gpus == 1:
        return []
    if mode == "ddp":
        gradients = WIDE * sum(p.count for p in parameters(sizes) if p.trainable)
        calls = 1 + -(-gradients // BUCKET_BYTES)
        return [Collective("all-reduce", "all", cluster.gpus, calls, gradients)]
    scope, ranks = ("node", cluster.gpus_in_node) if mode == "hsdp" else ("all", cluster.gpus)
    root, *blocks = units(sizes, ranks)
    times = 2 if reshard_after_forward else 1
    gathered = ranks * (root.shard + times * _shards(blocks))
    found = [
        Collective(
            "all-gather",
            scope,
            ranks,
            accumulation * (1 + times * len(blocks)),
            accumulation * compute_bytes * gathered,
        ),
        Collective("reduce-scatter", scope, ranks, 1 + len(blocks), WIDE * ranks * _shards([root, *blocks])),
    ]
    if mode == "hsdp" and cluster.nodes > 1:
        summed = WIDE * _shards([root, *blocks])
        found.append(Collective("all-reduce", "across", cluster.nodes, 1 + len(blocks), summed))
    return found


def _shards(of: Iterable[Unit]) -> int:
    return sum(unit.shard for unit in of)


def check_mode(mode: str, cluster: Cluster) -> None:
    """Raise ``ValueError`` for a mode that these GPUs cannot run."""
    expect(mode in ("none", "ddp", "fsdp", "hsdp"), "parallel", "none, ddp, fsdp or hsdp", mode)
    expect(mode != "none" or cluster.gpus == 1, "parallel", f"ddp, fsdp or hsdp for {cluster.gpus} GPUs", mode)
    several = cluster.nodes > 1 and cluster.gpus_in_node > 1
    other = (
        f"ddp or fsdp for {cluster.nodes} x {cluster.gpus_in_node} GPUs, as hsdp needs several nodes of several GPUs"
    )
    expect(mode != "hsdp" or several, "parallel", other, mode)
