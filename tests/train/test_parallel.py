"""Every mode of parallelism trains the same model on the same samples with the same masks as a single process."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from parallel_training import IMG_SIZE, SEED, Case, Run, by_position, case, create, run_case
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._pytree import tree_leaves
from training import write_images

from fastmae import ops
from fastmae.model.blocks import Linear
from fastmae.train import parallel
from fastmae.train.config import TrainConfig

LOSS, WEIGHTS = 1e-6, 2e-6
"""How far float32 may be from a single process after twenty steps. See :func:`assert_same_weights` for what is left
out, which a tolerance of 5e-5 would have to make room for."""

UNEVEN = {"global_batch_size": 7}
"""Of two processes one takes four images and one three; of four, three take two and one takes one."""
SMALL = UNEVEN | {"batch_size": 2, "clip_grad": 0.2}
"""Two passes per process, one of which holds one image."""
TWO = [
    case("ddp"),
    case("fsdp"),
    case("ddp", **UNEVEN),
    case("fsdp", **SMALL),
    case("fsdp", **SMALL, reduce_every="micro-batch"),
    case("ddp", **SMALL, activation_checkpointing="selective", steps=6),
    case("hsdp", shard_size=1, steps=6),
]
FOUR = [
    case("hsdp", shard_size=2, **UNEVEN),
    case("hsdp", shard_size=2, batch_size=1, clip_grad=0.2, reduce_every="micro-batch"),
]
CHECKPOINTED = [
    case("ddp", activation_checkpointing="selective", steps=6),
    case("fsdp", activation_checkpointing="selective", steps=6),
    case("fsdp", activation_checkpointing="full", reshard_after_forward=False, steps=6),
]
POISONED = [case("ddp", poison=1, steps=6), case("fsdp", poison=1, steps=6)]
LOW_PRECISION = [
    case("fsdp", precision="bf16", steps=6),
    case("fsdp", precision="fp16", batch_size=2, steps=6),
]
REDUCED = [
    case("ddp", **SMALL, reduce_dtype="bf16"),
    case("fsdp", **SMALL, reduce_dtype="bf16"),
    case("fsdp", **SMALL, reduce_dtype="bf16", reduce_every="micro-batch"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("parallel") / "images", 21)


@pytest.fixture(scope="module")
def two(images) -> list[dict]:
    cases = [*TWO, *CHECKPOINTED, *POISONED, *LOW_PRECISION, *REDUCED]
    return run_ranks(job, 2, images, cases, init_group=False, timeout=120)


@pytest.fixture(scope="module")
def four(images) -> list[dict]:
    return run_ranks(job, 4, images, FOUR, init_group=False, ranks_per_node=2, timeout=90)


@pytest.fixture(scope="module")
def single(images):
    """What a single process does, without accumulation and without checkpointing."""
    runs: dict[Case, Run] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(case: Case) -> Run:
        shared = ("global_batch_size", "clip_grad", "precision")
        alone = Case(
            steps=case.steps,
            poison=None if case.poison is None else 0,
            train=tuple((name, value) for name, value in case.train if name in shared),
        )
        if alone not in runs:
            runs[alone] = run_case(images, alone)
        return runs[alone]

    yield run
    torch.set_num_threads(threads)


def job(rank: int, images: Path, cases: list[Case]) -> dict:
    """All that is asked of ranks, in one start of processes."""
    return {
        "runs": {case: run_case(images, case) for case in cases},
        "initial": {mode: initial_weights(mode) for mode in ("fsdp", "hsdp")},
        "collectives": {mode: collectives(*mode) for mode in (("ddp",), ("fsdp",), ("fsdp", "micro-batch"))},
        "dtypes": dtypes_in_bf16(),
        "gathered": gathered_ahead(),
    }


def initial_weights(mode: str) -> dict[str, Tensor]:
    """This rank's part of the weights at the beginning, the model's buffers, and how many parameters are shards."""
    place = parallel.initialize(mode)
    model = parallel.construct(create, place)
    assert all(p.is_meta for p in model.parameters())
    parallel.parallelize(model, place, TrainConfig(seed=SEED, precision="fp32"))
    parts = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_shard = isinstance(tensor, DTensor)
        start = 0
        if is_shard:
            mesh = place.mesh["shard"]
            start = mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size())
        parts[name] = (is_shard, start, (tensor.to_local() if is_shard else tensor).detach().clone())
    return parts


PIXELS = torch.zeros(2, 3, *IMG_SIZE, dtype=torch.uint8)


def parallelized(mode: str, **options) -> torch.nn.Module:
    place = parallel.initialize(mode)
    train = TrainConfig(**{"seed": SEED, "precision": "fp32", **options})
    return parallel.parallelize(parallel.construct(create, place), place, train)


def loss_of(model: torch.nn.Module) -> Tensor:
    return model(PIXELS, masking=ops.random_masking(2, 24, 0.75, seed=0), full_pred=False).loss


def collectives(mode: str, every: str = "step") -> list[dict[str, int]]:
    """Collectives of each of three batches that accumulate, and whether parameters then have shards of gradients."""
    model, counts = parallelized(mode), []
    for last in (False, False, True):
        with CommDebugMode() as counter, parallel.no_sync(model, last, every):
            loss_of(model).backward()
        counts.append({str(op).split(".")[-1]: count for op, count in counter.get_comm_counts().items()})
        counts[-1]["shards"] = all(isinstance(p.grad, DTensor) for p in model.parameters() if p.requires_grad)
    return counts


def gathered_ahead() -> dict[str, list[bool]]:
    """Of each block when its forward begins and when its backward ends: whether the next one's weights are gathered."""
    model = parallelized("fsdp")
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
    loss_of(model).backward()
    return seen


def dtypes_in_bf16() -> list[tuple[torch.dtype, ...]]:
    """Dtypes of the stream and of a weight in each block, and of what the model returns, under bf16."""
    model = parallelized("fsdp", precision="bf16")
    seen = []
    for block in [*model.blocks, *model.decoder_blocks]:
        block.attn.register_forward_pre_hook(lambda m, args: seen.append((args[0].x.dtype, m.qkv.weight.dtype)))
    with torch.autocast("cpu", torch.bfloat16), model.cast_weights(torch.bfloat16):
        assert not any(m.weight_cast is not None for m in model.modules() if isinstance(m, Linear))
        out = model(PIXELS, masking=ops.random_masking(2, 24, 0.75, seed=0), full_pred=False)
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
        pairs = zip(by_position(runs, name), by_position([expected], name), strict=True)
        assert all(np.array_equal(*pair) for pair in pairs), name


def mean_losses(runs: list[Run]) -> np.ndarray:
    return np.mean([run.losses for run in runs], axis=0)


@pytest.mark.parametrize(("group", "case"), [("two", c) for c in TWO] + [("four", c) for c in FOUR], ids=str)
def test_same_losses_norms_weights_samples_and_masks_as_a_single_process(request, single, group, case):
    runs, expected = [rank["runs"][case] for rank in request.getfixturevalue(group)], single(case)
    assert_same_samples(runs, expected)
    losses = mean_losses(runs)
    np.testing.assert_allclose(losses, expected.losses, rtol=0, atol=LOSS)
    for run in runs:
        np.testing.assert_allclose(run.norms, expected.norms, rtol=2e-6)
        assert run.norms == runs[0].norms
        assert run.counts == {case.steps}
    assert losses[-1] < losses[0] - 0.05
    clip = dict(case.train).get("clip_grad", 0)
    assert max(expected.norms) > clip  # or nothing was clipped
    assert_same_weights(runs[0].weights, expected.weights)


def test_shares_and_micro_batches_differ_by_at_most_one_image(two, four):
    passes = [[len(ids) for ids in rank["runs"][case("fsdp", **SMALL)].sample_ids[0]] for rank in two]
    assert passes == [[2, 2], [2, 1]]
    shares = [[len(ids) for ids in rank["runs"][FOUR[0]].sample_ids[0]] for rank in four]
    assert shares == [[2], [2], [2], [1]]


@pytest.mark.parametrize("case", REDUCED, ids=str)
def test_gradients_reduced_in_bf16_stay_near_those_in_fp32(two, single, case):
    """By the tolerances of docs/scaling.md."""
    runs, expected = [rank["runs"][case] for rank in two], single(case)
    losses = mean_losses(runs)
    np.testing.assert_allclose(losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(runs[0].norms, expected.norms, rtol=1e-3)
    assert runs[0].norms == runs[1].norms
    assert not np.allclose(runs[0].norms, expected.norms, rtol=2e-5)  # or they were not in bf16


@pytest.mark.parametrize("case", POISONED, ids=str)
def test_nan_on_one_rank_skips_the_step_on_all(two, single, case):
    runs, expected = [rank["runs"][case] for rank in two], single(case)
    for run in (*runs, expected):
        assert run.skipped == [0, 0, 0, 1, 0, 0]
        assert run.counts == {5}
    assert_same_weights(runs[0].weights, expected.weights)


@pytest.mark.parametrize("case", LOW_PRECISION, ids=str)
def test_low_precision_keeps_samples_and_masks(two, single, case):
    runs, expected = [rank["runs"][case] for rank in two], single(case)
    assert_same_samples(runs, expected)
    np.testing.assert_allclose(mean_losses(runs), expected.losses, rtol=5e-3)
    assert not any(runs[0].skipped)


def test_bf16_casts_parameters_and_nothing_else(two):
    *blocks, outside, gradients = two[0]["dtypes"]
    # The last block of the decoder goes through a method of its own; it is no call of its attention.
    assert set(blocks) == {(torch.float32, torch.bfloat16)}
    assert len(blocks) >= 2
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
        assert len(rank["gathered"]["forward"]) == len(rank["gathered"]["backward"]) == 3
        assert all(rank["gathered"]["forward"]), rank["gathered"]
        assert all(rank["gathered"]["backward"]), rank["gathered"]


def test_accumulation_reduces_gradients_once_or_with_each_micro_batch(two):
    groups = 5  # two blocks, two decoder blocks, the rest
    for mode, expected in ((("fsdp",), [0, 0, groups]), (("fsdp", "micro-batch"), [groups] * 3)):
        counts = two[0]["collectives"][mode]
        assert [count.get("_reduce_scatter_base_", 0) for count in counts] == expected
        assert [count["shards"] for count in counts] == [bool(count) for count in expected]  # else FSDP has whole ones
    *earlier, last = ({k: v for k, v in c.items() if k != "shards"} for c in two[0]["collectives"]["ddp",])
    assert [sum(counts.values()) for counts in earlier] == [0, 0]
    assert sum(last.values()) == last["allreduce_"] >= 1


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
        ("none", None, ENVIRONMENT, "--train.parallel: expected auto, ddp, fsdp or hsdp for 4 processes, got none"),
        ("hsdp", 3, ENVIRONMENT, "--train.shard-size: expected a divisor of the 4 processes, got 3"),
        ("fsdp", 2, ENVIRONMENT, "--train.shard-size: only hsdp takes one, got 2 with fsdp"),
        ("ddp", None, {"RANK": "0", "WORLD_SIZE": "2"}, "got no LOCAL_RANK, LOCAL_WORLD_SIZE"),
    ],
)
def test_impossible_arrangements_are_refused(monkeypatch, mode, shard_size, environment, message):
    set_environment(monkeypatch, environment)
    with pytest.raises(ValueError, match=message):
        parallel.initialize(mode, shard_size=shard_size)
    assert not dist.is_initialized()


@pytest.mark.parametrize("case", CHECKPOINTED, ids=str)
def test_checkpointing_changes_no_bit_among_several_processes(two, case):
    for rank in two:
        found, without = rank["runs"][case], rank["runs"][Case(case.parallel)]
        assert found.losses == without.losses[: case.steps]
        assert found.norms == without.norms[: case.steps]


def test_a_single_process_reduces_nothing():
    with pytest.raises(ValueError, match=r"--train.reduce-dtype: expected fp32 in a single process, .*, got bf16"):
        parallelized("none", reduce_dtype="bf16")


def test_checkpointing_keeps_less():
    masking, kept = ops.random_masking(2, 24, 0.75, seed=0), []
    for checkpointing in ("none", "selective", "full"):
        model, sizes = parallelized("none", activation_checkpointing=checkpointing), {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(PIXELS, masking=masking, full_pred=False).loss.backward()
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.8 * kept[0]
    assert kept[2] < 0.5 * kept[0]


@pytest.mark.ops
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_parameters_in_bf16_as_shards_are_gathered_train_like_their_masters(checkpointing):
    """What FSDP's cast gives the kernels: norms and biases in bf16 beside a stream in float32."""
    pixels = torch.randint(0, 256, (2, 3, *IMG_SIZE), dtype=torch.uint8)
    masking, found = ops.random_masking(2, 24, 0.75, seed=0), []
    for dtype in (torch.float32, torch.bfloat16):
        model = parallelized("none", activation_checkpointing=checkpointing)
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


COMPILED = [
    case("fsdp", **SMALL, compile="blocks"),
    case("fsdp", activation_checkpointing="full", reshard_after_forward=False, compile="blocks"),
    case("ddp", compile="blocks"),
]


@pytest.mark.slow
def test_compiled_blocks_train_alike(images, single):
    """Also with two sizes of micro-batches, which are a graph each."""
    ranks = run_ranks(job_compiled, 2, images, COMPILED, init_group=False, timeout=500)
    for index, one in enumerate(COMPILED):
        runs, expected = [rank[index] for rank in ranks], single(one)
        assert_same_samples(runs, expected)
        np.testing.assert_allclose(mean_losses(runs), expected.losses, rtol=0, atol=2e-6)
        assert_same_weights(runs[0].weights, expected.weights)


def job_compiled(rank: int, images: Path, cases: list[Case], device: str = "cpu") -> list[Run]:
    runs = [run_case(images, case, device) for case in cases]
    assert not torch._dynamo.utils.counters["graph_break"]
    return runs


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_modes_train_alike_on_gpus(images, mode):
    cases = [case(mode, **UNEVEN, precision=precision) for precision in ("fp32", "bf16")]
    world_size = 2 if torch.cuda.device_count() > 1 else 1
    ranks = run_ranks(job_compiled, world_size, images, cases, "cuda", init_group=False, timeout=200)
    for index, one in enumerate(cases):
        expected = run_case(images, case(**dict(one.train)), "cuda")
        runs = [rank[index] for rank in ranks]
        assert_same_samples(runs, expected)
        tolerance = 1e-4 if dict(one.train)["precision"] == "fp32" else 1e-2
        np.testing.assert_allclose(mean_losses(runs), expected.losses, rtol=tolerance)
