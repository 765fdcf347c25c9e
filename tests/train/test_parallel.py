"""Every mode of parallelism trains the same model on the same samples with the same masks as a single process."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from parallel_training import GLOBAL_BATCH, IMG_SIZE, SEED, Case, Run, by_position, create, run_case, write_images
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._pytree import tree_leaves

from fastmae import ops
from fastmae.model.blocks import Block, Linear
from fastmae.train import parallel

LOSS, WEIGHTS = 1e-6, 2e-6
"""How far float32 may be from a single process after twenty steps. See :func:`assert_same_weights` for what is left
out, which a tolerance of 5e-5 would have to make room for."""

TWO = [
    Case("ddp"),
    Case("fsdp"),
    Case("ddp", max_batch=2, clip_grad=0.2, activation_checkpointing="selective", steps=6),
    Case("fsdp", max_batch=2, clip_grad=0.2),
    Case("fsdp", activation_checkpointing="full", reshard_after_forward=False),
    Case("fsdp", activation_checkpointing="selective", steps=6),
    Case("hsdp", shard_size=1, steps=6),
    Case("ddp", activation_checkpointing="selective", steps=6),
]
FOUR = [Case("hsdp", shard_size=2), Case("hsdp", max_batch=1, clip_grad=0.2, steps=6)]
POISONED = [Case("ddp", poison=1, steps=6), Case("fsdp", poison=1, steps=6)]
LOW_PRECISION = [Case("fsdp", precision="bf16", steps=6), Case("fsdp", precision="fp16", max_batch=2, steps=6)]


def name_of(value) -> str:
    """The fields of a case that are not the defaults."""
    if not isinstance(value, Case):
        return str(value)
    set_fields = {f.name: getattr(value, f.name) for f in fields(Case) if getattr(value, f.name) != f.default}
    return "-".join([set_fields.pop("mode"), *(f"{k}={v}" for k, v in set_fields.items())])


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("parallel") / "images")


@pytest.fixture(scope="module")
def two(images) -> list[dict]:
    return run_ranks(job, 2, images, [*TWO, *POISONED, *LOW_PRECISION], init_group=False)


@pytest.fixture(scope="module")
def four(images) -> list[dict]:
    return run_ranks(job, 4, images, FOUR, init_group=False, ranks_per_node=2, timeout=90)


@pytest.fixture(scope="module")
def single(images):
    """What a single process does, without accumulation and without checkpointing."""
    runs: dict[Case, Run] = {}

    def run(case: Case) -> Run:
        alone = Case(
            clip_grad=case.clip_grad,
            poison=None if case.poison is None else 0,
            precision=case.precision,
            steps=case.steps,
            device_type=case.device_type,
        )
        if alone not in runs:
            runs[alone] = run_case(images, alone)
        return runs[alone]

    return run


def job(rank: int, images: Path, cases: list[Case]) -> dict:
    """All that is asked of ranks, in one start of processes."""
    return {
        "runs": {case: run_case(images, case) for case in cases},
        "initial": {mode: initial_weights(mode) for mode in ("fsdp", "hsdp")},
        "collectives": {mode: collectives(mode) for mode in ("ddp", "fsdp")},
        "dtypes": dtypes_in_bf16(),
        "gathered": gathered_ahead(),
        "initialised": (dist.get_rank(), dist.get_world_size(), dist.get_backend()),
    }


def initial_weights(mode: str) -> dict[str, Tensor]:
    """This rank's part of the weights at the beginning, the model's buffers, and how many parameters are shards."""
    place = parallel.initialize(mode)
    model = parallel.construct(create, place)
    assert all(p.is_meta for p in model.parameters())
    parallel.parallelize(model, place, seed=SEED)
    parts = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_shard = isinstance(tensor, DTensor)
        start = 0
        if is_shard:
            mesh = place.mesh["shard"]
            start = mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size())
        parts[name] = (is_shard, start, (tensor.to_local() if is_shard else tensor).detach().clone())
    return parts


def collectives(mode: str) -> list[dict[str, int]]:
    """Collectives of each of three batches that accumulate."""
    place = parallel.initialize(mode)
    model = parallel.parallelize(parallel.construct(create, place), place, seed=SEED)
    pixels = torch.zeros(2, 3, *IMG_SIZE, dtype=torch.uint8)
    masking, counts = ops.random_masking(2, 24, 0.75, seed=0), []
    for last in (False, False, True):
        with CommDebugMode() as counter, parallel.no_sync(model, last):
            model(pixels, masking=masking, full_pred=False).loss.backward()
        counts.append({str(op).split(".")[-1]: count for op, count in counter.get_comm_counts().items()})
    return counts


def gathered_ahead() -> dict[str, list[bool]]:
    """Of each block when its forward begins and when its backward ends: whether the next one's weights are gathered."""
    place = parallel.initialize("fsdp")
    model = parallel.parallelize(parallel.construct(create, place), place, seed=SEED)
    blocks, seen = [*model.blocks, *model.decoder_blocks], {"forward": [], "backward": []}

    def look(direction: str, following: torch.nn.Module) -> None:
        state = following._get_fsdp_state()
        group = getattr(state, "_fsdp_param_group", None) or state._fsdp_param_groups[0]
        seen[direction].append(group._all_gather_result is not None or group.is_unsharded)

    def watch_input(before: torch.nn.Module, tensors: list) -> None:
        next(t for t in tensors if isinstance(t, Tensor) and t.requires_grad).register_hook(
            lambda gradient: look("backward", before)
        )

    for block, following in pairwise(blocks):
        block.register_forward_pre_hook(lambda *_, following=following: look("forward", following))
        following.register_forward_pre_hook(
            lambda _, args, kwargs, block=block: watch_input(block, tree_leaves((args, kwargs))), with_kwargs=True
        )
    pixels = torch.zeros(2, 3, *IMG_SIZE, dtype=torch.uint8)
    model(pixels, masking=ops.random_masking(2, 24, 0.75, seed=0), full_pred=False).loss.backward()
    return seen


def dtypes_in_bf16() -> list[tuple[torch.dtype, ...]]:
    """Dtypes of the stream and of a weight in each block, and of what the model returns, under bf16."""
    place = parallel.initialize("fsdp")
    model = parallel.parallelize(parallel.construct(create, place), place, seed=SEED, precision="bf16")
    seen = []
    for block in [*model.blocks, *model.decoder_blocks]:
        block.attn.register_forward_pre_hook(lambda m, args: seen.append((args[0].x.dtype, m.qkv.weight.dtype)))
    pixels = torch.zeros(2, 3, *IMG_SIZE, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16), model.cast_weights(torch.bfloat16):
        assert not any(m.weight_cast is not None for m in model.modules() if isinstance(m, Linear))
        out = model(pixels, masking=ops.random_masking(2, 24, 0.75, seed=0), full_pred=False)
    out.loss.backward()
    gradients = {p.grad.dtype for p in model.parameters() if p.requires_grad}
    return [*seen, (out.loss.dtype, out.mask.dtype, model.pos_embed.dtype), tuple(gradients)]


def assert_same_weights(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """All but the biases of the keys: softmax does not see them, so their gradient is rounding error, which Adam
    scales up to steps of full size in random directions."""
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        got = weights[name]
        if name.endswith("qkv.bias"):
            (q, _, v), (got_q, _, got_v) = tensor.chunk(3), got.chunk(3)
            tensor, got = torch.cat([q, v]), torch.cat([got_q, got_v])
        torch.testing.assert_close(got, tensor, rtol=0, atol=WEIGHTS, msg=lambda text, n=name: f"{n}: {text}")


def assert_same_samples(runs: list[Run], expected: Run) -> None:
    for name in ("sample_ids", "masks"):
        assert np.array_equal(by_position(runs, name), by_position([expected], name)), name


@pytest.mark.parametrize(("group", "case"), [("two", c) for c in TWO] + [("four", c) for c in FOUR], ids=name_of)
def test_same_losses_norms_weights_samples_and_masks_as_a_single_process(request, single, group, case):
    runs, expected = [rank["runs"][case] for rank in request.getfixturevalue(group)], single(case)
    assert_same_samples(runs, expected)
    losses = np.mean([run.losses for run in runs], axis=0)
    np.testing.assert_allclose(losses, expected.losses, rtol=0, atol=LOSS)
    for run in runs:
        np.testing.assert_allclose(run.norms, expected.norms, rtol=2e-6)
        assert run.norms == runs[0].norms
        assert run.counts == {case.steps}
    assert losses[-1] < losses[0] - 0.05
    if case.clip_grad:
        assert max(expected.norms) > case.clip_grad  # or nothing was clipped
    assert_same_weights(runs[0].weights, expected.weights)


@pytest.mark.parametrize("case", POISONED, ids=name_of)
def test_nan_on_one_rank_skips_the_step_on_all(two, single, case):
    runs, expected = [rank["runs"][case] for rank in two], single(case)
    for run in (*runs, expected):
        assert run.skipped == [0, 0, 0, 1, 0, 0]
        assert run.counts == {5}
    assert_same_weights(runs[0].weights, expected.weights)


@pytest.mark.parametrize("case", LOW_PRECISION, ids=name_of)
def test_low_precision_keeps_samples_and_masks(two, single, case):
    runs, expected = [rank["runs"][case] for rank in two], single(case)
    assert_same_samples(runs, expected)
    np.testing.assert_allclose(np.mean([run.losses for run in runs], axis=0), expected.losses, rtol=5e-3)
    assert not any(runs[0].skipped)


def test_bf16_casts_parameters_and_nothing_else(two):
    *blocks, outside, gradients = two[0]["dtypes"]
    # The last block of the decoder goes through a method of its own; it is no call of its attention.
    assert set(blocks) == {(torch.float32, torch.bfloat16)}
    assert len(blocks) >= 4
    assert outside == (torch.float32,) * 3
    assert gradients == (torch.float32,)


@pytest.mark.parametrize("mode", ["fsdp", "hsdp"])
@pytest.mark.parametrize("group", ["two", "four"])
def test_meta_construction_gives_the_weights_of_a_single_process(request, group, mode):
    expected = create()
    expected = dict([*expected.named_parameters(), *expected.named_buffers()])
    for rank in request.getfixturevalue(group):
        parts = rank["initial"][mode]
        assert parts.keys() == expected.keys()
        for name, (is_shard, start, value) in parts.items():
            assert is_shard == expected[name].requires_grad, name
            whole = expected[name].detach()
            assert torch.equal(value, whole[start : start + len(value)] if is_shard else whole), name
        assert sum(value.numel() for is_shard, _, value in parts.values() if is_shard) > 0


def test_weights_of_the_next_block_are_gathered_ahead(two):
    for rank in two:
        assert len(rank["gathered"]["forward"]) == len(rank["gathered"]["backward"]) == 5
        assert all(rank["gathered"]["forward"]), rank["gathered"]
        assert all(rank["gathered"]["backward"]), rank["gathered"]


def test_accumulation_reduces_gradients_once(two):
    *earlier, last = two[0]["collectives"]["fsdp"]
    groups = 7  # three blocks, three decoder blocks, the rest
    assert [counts.get("_reduce_scatter_base_", 0) for counts in earlier] == [0, 0]
    assert last["_reduce_scatter_base_"] == groups
    *earlier, last = two[0]["collectives"]["ddp"]
    assert [sum(counts.values()) for counts in earlier] == [0, 0]
    assert sum(last.values()) == last["allreduce_"] >= 1


def test_rank_and_backend_come_from_torchruns_environment(four):
    assert [rank["initialised"] for rank in four] == [(rank, 4, "gloo") for rank in range(4)]


ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


def set_environment(monkeypatch, values: dict[str, str]) -> None:
    for name in (*ENVIRONMENT, "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("device", "failed", "calls_made"), [("cuda", True, 0), ("cuda", False, 1), ("cpu", True, 1)])
def test_after_an_error_nobody_waits_for_nccl(monkeypatch, device, failed, calls_made):
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(1))
    place = parallel.Parallelism("ddp", 0, 2, 0, torch.device(device), owns_group=True)
    parallel.shutdown(place, failed=failed)
    assert len(calls) == calls_made


def test_one_process_needs_no_group(monkeypatch):
    set_environment(monkeypatch, {})
    place = parallel.initialize("auto", "cpu")
    assert (place.mode, place.rank, place.world_size, place.mesh) == ("none", 0, 1, None)
    assert place.is_main
    assert not place.sharded
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("mode", "shard_size", "environment", "message"),
    [
        ("none", None, ENVIRONMENT, "mode: expected auto, ddp, fsdp or hsdp for 4 processes, got none"),
        ("hsdp", 3, ENVIRONMENT, "shard_size: expected a divisor of the 4 processes, got 3"),
        ("fsdp", 2, ENVIRONMENT, "shard_size: only hsdp takes one, got 2 with fsdp"),
        ("ddp", None, {"RANK": "0", "WORLD_SIZE": "2"}, "got no LOCAL_RANK, LOCAL_WORLD_SIZE"),
    ],
)
def test_impossible_arrangements_are_refused(monkeypatch, mode, shard_size, environment, message):
    set_environment(monkeypatch, environment)
    with pytest.raises(ValueError, match=message):
        parallel.initialize(mode, shard_size=shard_size)
    assert not dist.is_initialized()


@pytest.mark.parametrize("number", [4, 5, 7])
def test_checkpointing_changes_no_bit_among_several_processes(two, number):
    case = TWO[number]
    (without,) = (c for c in TWO if c == Case(case.mode))
    for rank in two:
        found, expected = rank["runs"][case], rank["runs"][without]
        assert found.losses == expected.losses[: case.steps]
        assert found.norms == expected.norms[: case.steps]
    if case.steps == without.steps:
        found, expected = (two[0]["runs"][c].weights for c in (case, without))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("amount", ["selective", "full"])
def test_checkpointing_keeps_less_and_changes_no_gradient(amount):
    pixels = torch.randint(0, 256, (4, 3, *IMG_SIZE), dtype=torch.uint8)
    masking = ops.random_masking(4, 24, 0.75, seed=0)

    def gradients(checkpointing: str) -> tuple[list[Tensor], int]:
        model = parallel.parallelize(
            create(), parallel.Parallelism(), seed=SEED, activation_checkpointing=checkpointing
        )
        kept: dict[int, int] = {}
        pack = lambda t: kept.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(pixels, masking=masking, full_pred=False).loss
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad], sum(kept.values())

    (plain, all_bytes), (checkpointed, bytes_kept) = gradients("none"), gradients(amount)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert bytes_kept < {"selective": 0.8, "full": 0.5}[amount] * all_bytes


@pytest.mark.ops
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_parameters_in_bf16_as_shards_are_gathered_train_like_their_masters(checkpointing):
    """What FSDP's cast gives the kernels: norms and biases in bf16 beside a stream in float32."""
    pixels = torch.randint(0, 256, (2, 3, *IMG_SIZE), dtype=torch.uint8)
    masking, found = ops.random_masking(2, 24, 0.75, seed=0), []
    for dtype in (torch.float32, torch.bfloat16):
        model = parallel.parallelize(
            create(), parallel.Parallelism(), seed=SEED, activation_checkpointing=checkpointing
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(pixels, masking=masking, full_pred=False).loss
        loss.backward()
        assert {p.grad.dtype for p in trained} == {dtype}
        found.append((loss.detach(), torch.cat([p.grad.float().flatten() for p in trained])))
    (expected, gradient), (loss, other) = found
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    assert torch.cosine_similarity(gradient, other, dim=0) > 0.995


def test_checkpointing_belongs_to_the_model_and_not_to_the_class():
    model = parallel.parallelize(create(), parallel.Parallelism(), seed=SEED, activation_checkpointing="full")
    assert {block.activation_checkpointing for block in model.blocks} == {"full"}
    assert Block.activation_checkpointing == create().blocks[0].activation_checkpointing == "none"
    with pytest.raises(ValueError, match="mode: expected one of none, selective, full, got 'block'"):
        create().set_activation_checkpointing("block")


@pytest.mark.slow
def test_compiled_blocks_train_alike(images, single):
    cases = [replace(TWO[3], compile="blocks"), replace(TWO[4], compile="blocks"), Case("ddp", compile="blocks")]
    ranks = run_ranks(job_compiled, 2, images, cases, init_group=False, timeout=500)
    for index, case in enumerate(cases):
        runs, expected = [rank[index] for rank in ranks], single(case)
        assert_same_samples(runs, expected)
        np.testing.assert_allclose(np.mean([r.losses for r in runs], axis=0), expected.losses, rtol=0, atol=2e-6)
        assert_same_weights(runs[0].weights, expected.weights)


def job_compiled(rank: int, images: Path, cases: list[Case]) -> list[Run]:
    runs = [run_case(images, case) for case in cases]
    assert not torch._dynamo.utils.counters["graph_break"]
    return runs


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_modes_train_alike_on_gpus(images, single, mode):
    cases = [Case(mode, precision=precision, device_type="cuda") for precision in ("fp32", "bf16")]
    world_size = 2 if torch.cuda.device_count() > 1 else 1
    ranks = run_ranks(job_compiled, world_size, images, cases, init_group=False, timeout=200)
    for index, case in enumerate(cases):
        runs, expected = [rank[index] for rank in ranks], single(case)
        assert_same_samples(runs, expected)
        tolerance = 1e-4 if case.precision == "fp32" else 1e-2
        np.testing.assert_allclose(np.mean([r.losses for r in runs], axis=0), expected.losses, rtol=tolerance)


def test_global_batch_is_what_all_ranks_and_passes_together_see(two):
    for rank in two:
        ids = rank["runs"][TWO[3]].sample_ids
        assert len(ids[0]) * len(ids[0][0]) * len(two) == GLOBAL_BATCH
