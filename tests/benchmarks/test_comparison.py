"""How benchmarks measure: in turn, failures kept apart, bytes that are those of the ops' budgets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bench_gather_patches
import bench_gather_tokens
import bench_masked_patch_mse
import bench_masking
import bench_quick
import bench_restore_tokens
import pytest
import torch
from comparison import Comparison, compare, table
from measure import Meter
from traffic_cases import OPS, Sizes

ROOT = Path(__file__).parents[2]


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
    table = done.stdout[done.stdout.index("random_masking, N=256 L=64") :]
    assert "2 rounds, about " in table
    assert "\nfastmae " in table
    assert "\nplain " in table
    found = json.loads(out.read_text())["benchmarks"]
    assert {one["extra_info"]["competitor"] for one in found} == {"fastmae", "plain"}
