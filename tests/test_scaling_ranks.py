"""What is planned for several GPUs is what processes do: collectives and their bytes, and what each process holds."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from collective_bytes import SIZES, measure, measure_all, peaks, pretended
from distributed import run_ranks

from fastmae.train.scaling.communication import collectives
from fastmae.train.scaling.hardware import Cluster
from fastmae.train.scaling.memory import states
from fastmae.train.scaling.plan import COMPUTE_BYTES, Run, make_plan
from fastmae.train.scaling.sizes import Sizes

PLANNED = Sizes(**SIZES)
CASES = [
    ("ddp", {"accumulation": 2}),
    ("ddp", {"precision": "fp32"}),
    ("fsdp", {}),
    ("fsdp", {"accumulation": 2, "reshard_after_forward": False}),
    ("hsdp", {}),
    ("hsdp", {"precision": "fp32", "accumulation": 3}),
]


@pytest.fixture(scope="module")
def four() -> list[list[dict]]:
    """By rank and case, of four real processes in two nodes."""
    return run_ranks(measure_all, 4, CASES, ranks_per_node=2, timeout=150)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join(map(str, (CASES[n][0], *CASES[n][1]))))
def test_collectives_and_memory_of_four_processes(four, number):
    mode, options = CASES[number]
    for rank in range(4):
        assert_as_planned(four[rank][number], mode, Cluster(4, 2), options, rank)
    written = [four[rank][number]["written"] for rank in range(4)]
    checkpoint = make_plan(Run(PLANNED, Cluster(4, 2), mode, 8)).checkpoint
    assert sum(written) == checkpoint.bytes
    if mode == "fsdp":
        assert all(written)
    if mode == "hsdp":
        assert all(written[:2])
        assert not any(written[2:])


@pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")
@pytest.mark.parametrize(("gpus", "per_node"), [(6, 3), (64, 8), (512, 8)])
@pytest.mark.parametrize("mode", ["fsdp", "hsdp"])
def test_collectives_and_memory_of_many_pretended_processes(monkeypatch, mode, gpus, per_node):
    """More processes than rows: shards are padded, and most are empty."""
    with pretended(gpus, per_node, monkeypatch):
        assert_as_planned(measure(mode), mode, Cluster(gpus, per_node), {}, 0)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("reshard", [True, False])
def test_gathered_weights_are_about_the_planned_ones(monkeypatch, reshard, accumulation):
    """Two images of four patches, so that weights are what fills memory. Without streams, which keep gradients that
    are being reduced for longer, the backward takes less than planned."""
    sizes = SIZES | {"img_size": (16, 16), "embed_dim": 256, "depth": 6, "decoder_embed_dim": 128, "decoder_depth": 3}
    planned, cluster = Sizes(**sizes), Cluster(8, 8)
    with pretended(8, 8, monkeypatch):
        held, forward, backward = peaks(sizes, accumulation, reshard)
    options = {"accumulation": accumulation, "reshard_after_forward": reshard}
    states_planned = states(planned, "fsdp", cluster, **options)
    assert held == states_planned.weights
    assert forward == pytest.approx(states_planned.copies, rel=0.15)
    expected = states_planned.copies + states_planned.gradients + states_planned.reduction
    assert 0.55 * expected < backward <= expected


def assert_as_planned(measured: dict, mode: str, cluster: Cluster, options: dict, rank: int) -> None:
    options = dict(options)
    options["compute_bytes"] = COMPUTE_BYTES[options.pop("precision", "bf16")]
    planned = collectives(PLANNED, mode, cluster, **options)
    assert measured["bytes"] == {(c.name, c.ranks): c.bytes for c in planned}
    if mode != "ddp":  # whose buckets hang on the order in which gradients come
        assert measured["calls"] == {(c.name, c.ranks): c.calls for c in planned}
    held = states(PLANNED, mode, cluster, **options)
    kinds = ("weights", "gradients", "optimizer")
    if mode == "ddp" or rank == 0:
        # After the step gradients are reduced, also where whole ones were summed before.
        reduced = states(PLANNED, mode, cluster, **options | {"accumulation": 1})
        assert (measured["weights"], measured["optimizer"]) == (held.weights, held.optimizer)
        assert measured["gradients"] == reduced.gradients
    else:
        assert all(measured[kind] <= getattr(held, kind) for kind in kinds)
