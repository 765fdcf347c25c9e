"""How benchmarks measure: in turn, failures kept apart, bytes that are those of the ops' budgets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from traffic_cases import OPS, Sizes

ROOT = Path(__file__).parents[2]

import bench_gather_patches  # noqa: E402
import bench_gather_tokens  # noqa: E402
import bench_masked_patch_mse  # noqa: E402
import bench_masking  # noqa: E402
import bench_quick  # noqa: E402
import bench_restore_tokens  # noqa: E402
from comparison import Comparison, Replay, compare, gradient, table  # noqa: E402
from measure import Meter, image_sector_bytes  # noqa: E402

CPU = torch.device("cpu")
# Small enough to build at once, large enough that what is read once a launch (tables, partial sums) hardly counts.
SIZES = Sizes(N=32, side=64, patch=16, D=128, E=128)


class FakeMeter(Meter):
    """Time as the competitors tell it: each returns the seconds that it took."""

    def __init__(self) -> None:
        super().__init__(CPU)

    def time(self, call, calls=1, flush=True, queue_seconds=None):
        return call()


def test_competitors_run_in_turn_and_ratios_are_those_within_rounds():
    called, busy = [], iter([1, 1, 1, 1, 10, 10, 1, 1, 1, 1])

    def competitor(name, seconds):
        def call():
            called.append(name)
            return seconds * next(busy, 1)

        return call

    comparison = Comparison("x", {"a": competitor("a", 1.0), "b": competitor("b", 2.0)})
    announced = []
    results = compare(comparison, ["a", "b"], FakeMeter(), 3, lambda *expected: announced.append(expected))
    assert announced == [(3, 9.0)]  # rounds, and seconds of a and b in all of them
    # Warm-up and a first timing each, then the rounds, each begun by another one.
    assert "".join(called) == "aabb" + "abbaab"
    assert results.info["b"]["ratios"]["a"] == 2.0
    assert sorted(results.times["a"]) == [1.0, 1.0, 10.0]


def test_one_that_fails_takes_no_other_with_it():
    def fails():
        raise RuntimeError("out of memory")

    results = compare(Comparison("x", {"a": lambda: 1.0, "b": fails}), ["a", "b"], FakeMeter(), rounds=2)
    assert list(results.times) == ["a"]
    assert results.errors["b"].endswith("RuntimeError: out of memory\n")


def test_shares_are_those_of_a_copy_and_of_a_product_on_this_device():
    calls = {"a": lambda: torch.ones(1000).sum()}
    comparison = Comparison("x", calls, useful_bytes=1 << 16, flops=1000, dtype=torch.float32)
    info = compare(comparison, ["a"], Meter(CPU), rounds=2).info["a"]
    assert info["share_of_copy"] == info["share_of_copy_by_sectors"]
    assert info["share_of_copy"] == pytest.approx(info["gb_per_s"] / info["copy_gb_per_s"])
    assert info["share_of_matmul"] == pytest.approx(info["tflop_per_s"] / info["matmul_tflop_per_s"])


def test_gradient_times_a_backward_with_the_sum_of_a_bias_that_was_added_before():
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    backward = gradient(lambda: x * w, [x, w], bias_of=x)
    of_x, of_w, of_bias = backward.call(backward.prepare())
    torch.testing.assert_close(of_bias, of_x.sum(0))
    assert of_w.shape == w.shape


def test_replay_gives_pytest_benchmark_the_measured_times():
    replay = Replay()
    replay.load([0.5, 0.25])
    readings = [replay() for _ in range(4)]
    assert [readings[1] - readings[0], readings[3] - readings[2]] == [0.5, 0.25]


@pytest.mark.parametrize(("layout", "dtype"), [("channels last", torch.uint8), ("channels first", torch.float32)])
def test_sectors_are_those_that_the_addresses_of_chosen_pixels_fall_into(layout, dtype):
    n, c, h, w, p = 2, 3, 12, 20, 4
    shape = (n, h, w, c) if layout == "channels last" else (n, c, h, w)
    images = torch.zeros(shape, dtype=dtype)
    images = images.permute(0, 3, 1, 2) if layout == "channels last" else images
    ids = torch.tensor([[0, 7, 14], [1, 2, 9]])
    sectors = set()
    for i in range(n):
        for patch in ids[i].tolist():
            top, left = patch // (w // p) * p, patch % (w // p) * p
            for y in range(top, top + p):
                for x in range(left, left + p):
                    for channel in range(c):
                        place = (i, channel, y, x)
                        offset = sum(a * b for a, b in zip(place, images.stride(), strict=True))
                        sectors.add(offset * images.element_size() // 32)
    assert image_sector_bytes(images, ids, p) == 32 * len(sectors)


def test_useful_bytes_are_the_budget():
    s = SIZES
    image, encoder, decoder = ("x", s.N, s.side, s.patch), ("x", s.N, s.L, s.K, s.D), ("x", s.N, s.L, s.K, s.E)
    found = {"random_masking": bench_masking.build(s.N, s.L, CPU)}
    found["gather_patches"] = bench_gather_patches.build(image, "uint8 NHWC", CPU)
    for backward in (False, True):
        suffix = " backward" * backward
        found["gather_tokens" + suffix] = bench_gather_tokens.build(encoder, backward, CPU)
        found["restore_tokens" + suffix] = bench_restore_tokens.build(decoder, backward, CPU)
        found["masked_patch_mse" + suffix] = bench_masked_patch_mse.build(image, backward, CPU)
    for name, comparison in found.items():
        # The gradients of restore_tokens are two launches, each with a budget of its own.
        parts = [op for key, op in OPS.items() if key == name or (key.startswith(f"{name},") and "full" not in key)]
        budget = sum(sum(op.reads(s).values()) + sum(op.writes(s).values()) for op in parts)
        assert comparison.useful_bytes == pytest.approx(budget, rel=0.03), name


def test_competitors_of_the_quick_comparison_train_to_the_same_loss(monkeypatch):
    monkeypatch.setattr(bench_quick, "MODEL", "tiny-test")
    comparison = bench_quick.build(CPU, torch.float32)
    names = ["facebookresearch-plain", "facebookresearch-sdpa", "transformers", "fastmae"]
    results = compare(comparison, names, Meter(CPU), rounds=2)
    losses = torch.tensor([results.info[name]["losses"] for name in names])
    torch.testing.assert_close(losses, losses[-1:].expand_as(losses), rtol=1e-5, atol=0.0)
    assert (losses[:, 1] < losses[:, 0] - 1e-3).all()  # it trains
    title, _, *rows = table(comparison, results)
    assert title.endswith("2 blocks, 32 px, batch 16, float32")
    assert all(f"loss {losses[-1, 0]:.4f}, after 4 steps {losses[-1, 1]:.4f}" in row for row in rows)


def test_pytest_benchmark_at_the_root_prints_each_table_as_it_comes(tmp_path):
    # All files but one are ignored, because importing them takes a while.
    others = [f"--ignore-glob=*/bench_{letters}*" for letters in ("[!m]", "m[!a]", "mask[!i]", "masked")]
    selected = ["-k", "bench_random_masking and not 196", "--rounds", "2", "--threads", "1", "-p", "no:cacheprovider"]
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "--benchmark", *others, *selected, f"--benchmark-json={out}"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    begins, expected, header, ours, theirs, progress = done.stdout[done.stdout.index("[1 of 1, about ") :].splitlines()[
        :6
    ]
    assert begins.endswith("random_masking, N=256 L=64: warming up fastmae, plain")
    assert expected.startswith("2 rounds, about ")
    assert header.split() == ["time,", "and", "time", "/", "time", "of", "median", "fastmae", "plain"]
    assert (ours.split()[0], theirs.split()[0], progress) == ("fastmae", "plain", ".")
    assert {one["extra_info"]["competitor"] for one in json.loads(out.read_text())["benchmarks"]} == {
        "fastmae",
        "plain",
    }


@pytest.mark.gpu
def test_a_meter_on_cuda():
    device = torch.device("cuda")
    meter, x = Meter(device), torch.ones(1 << 24, device=device)
    assert 0 < meter.time(lambda: x + 1) < 1
    assert meter.peak_memory(lambda: x + 1) == x.nbytes
    assert meter.copy_seconds(2 * x.nbytes) > 0
    launches = meter.launches(lambda: x + 1)
    assert launches is None or launches >= 1
