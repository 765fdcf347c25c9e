"""How benchmarks time: in turn, failures kept apart, shares of what the device can do."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import bench_quick
import fake_cuda
import pytest
import torch
from benchmark import Benchmark, Timer, gradient, run, table
from commands import outside_xdist
from results import collect

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


class ToldTimes(Timer):
    """Time as the calls tell it: each returns the seconds that it took."""

    def __init__(self) -> None:
        super().__init__(CPU)

    def time(self, call, repeats=1, flush=True, queue_seconds=None):
        return call()


def test_calls_run_in_turn_and_ratios_are_those_within_rounds():
    called, busy = [], iter([1, 1, 1, 1, 10, 10, 1, 1, 1, 1])

    def timed(name, seconds):
        def call():
            called.append(name)
            return seconds * next(busy, 1)

        return call

    benchmark = Benchmark("x", {"a": timed("a", 1.0), "b": timed("b", 2.0)})
    results = run(benchmark, ["a", "b"], ToldTimes(), 3)
    # Warm-up and a first timing each, then the rounds, each begun by another one.
    assert "".join(called) == "aabb" + "abbaab"
    assert results.entries["b"]["ratios"]["a"] == 2.0
    assert sorted(results.times["a"]) == [1.0, 1.0, 10.0]


def test_a_call_that_fails_does_not_affect_the_others():
    def fails():
        raise RuntimeError("out of memory")

    results = run(Benchmark("x", {"a": lambda: 1.0, "b": fails}), ["a", "b"], ToldTimes(), rounds=2)
    assert list(results.times) == ["a"]
    assert results.errors["b"].endswith("RuntimeError: out of memory\n")


def test_shares_are_those_of_a_copy_and_of_a_product_on_this_device():
    benchmark = Benchmark(
        "x", {"a": lambda: torch.ones(1000).sum()}, useful_bytes=1 << 16, flops=1000, dtype=torch.float32
    )
    timer = Timer(CPU)
    found = run(benchmark, ["a"], timer, rounds=2).entries["a"]
    assert found["share_of_copy"] == found["share_of_copy_by_sectors"]
    copy = 1e-9 * found["useful_bytes"] / timer.copy_seconds(found["useful_bytes"])
    assert found["share_of_copy"] == pytest.approx(found["gb_per_s"] / copy, rel=1e-3)
    product = 1e-12 * timer.matmul_flops(torch.float32)
    assert found["share_of_matmul"] == pytest.approx(found["tflop_per_s"] / product, rel=1e-3)


def test_gradient_sums_for_a_bias_that_the_function_does_not_add():
    x, w, bias = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True), torch.zeros(3)
    bias.requires_grad_()
    for function, results in ((lambda: x * w, 4), (lambda: (x + bias) * w, 3)):
        backward = gradient(function, [x, w, bias], bias=(x, bias))
        of_x, of_w, *_, of_bias = found = backward.call(backward.setup())
        assert len(found) == results
        assert of_w.shape == w.shape
        torch.testing.assert_close(of_bias, of_x.sum(0))


class Device:
    """A GPU as a host sees it: work is queued, and begins when all before it is done; cycles are microseconds."""

    def __init__(self):
        self.now, self.free = 0.0, 0.0

    def queue(self, host: float, device: float) -> None:
        self.now += host
        self.free = max(self.free, self.now) + device

    def __getattr__(self, name):
        return getattr(fake_cuda, name)

    def synchronize(self):
        self.now = max(self.now, self.free)

    def _sleep(self, cycles):
        self.queue(0.0, cycles * 1e-6)

    def Event(self, enable_timing=False):
        device = self

        class Event(fake_cuda.Event):
            def record(self, stream=None):
                self.at = max(device.free, device.now)

            def synchronize(self):
                device.now = max(device.now, self.at)

        return Event()


def test_a_timer_hides_what_the_host_takes_to_queue_a_call(monkeypatch):
    cuda = Device()
    monkeypatch.setattr(time, "perf_counter", lambda: cuda.now)
    timer = Timer(CPU, cuda)

    def call():  # three launches of 100 us on the host and 10 us on the device
        for _ in range(3):
            cuda.queue(100e-6, 10e-6)

    assert timer.time(call) > 200e-6  # the host's
    queued = timer.queue_seconds(call)
    assert queued == pytest.approx(300e-6)
    for repeats in (1, 5):
        assert timer.time(call, repeats, queue_seconds=queued) == pytest.approx(30e-6, abs=1e-8)
    assert timer.median(call) == pytest.approx(30e-6, abs=1e-8)


def test_competitors_of_the_quick_benchmark_train_to_the_same_loss():
    benchmark = bench_quick.build("tiny-test", CPU, torch.float32)
    names = ["facebookresearch-plain", "facebookresearch-sdpa", "transformers", "fastmae"]
    results = run(benchmark, names, Timer(CPU), rounds=2)
    losses = torch.tensor([results.entries[name]["losses"] for name in names])
    torch.testing.assert_close(losses, losses[-1:].expand_as(losses), rtol=1e-5, atol=0.0)
    assert (losses[:, 1] < losses[:, 0] - 1e-3).all()  # it trains
    title, _, *rows = table(benchmark, results)
    assert title.endswith("2 blocks, 32 px, batch 16, float32")
    assert all(f"loss {losses[-1, 0]:.4f}, after 4 steps {losses[-1, 1]:.4f}" in row for row in rows)


def test_pytest_benchmark_at_the_root_prints_and_stores_each_result_as_it_comes(tmp_path):
    # All files but one are ignored, because importing them takes a while.
    others = [f"--ignore-glob=*/bench_{letters}*" for letters in ("[!m]", "m[!a]", "mask[!i]", "masked")]
    selected = [
        "-k",
        "bench_random_masking and not 196",
        "--rounds",
        "2",
        "--threads",
        "1",
        "-p",
        "no:hypothesispytest",
    ]
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "pytest", "--benchmark", *others, *selected, f"--results={out}"]
    done = subprocess.run(command, cwd=ROOT, env=outside_xdist(), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    begins, header, ours, theirs, progress = done.stdout[done.stdout.index("[1 of 1]") :].splitlines()[:5]
    assert begins == "[1 of 1] random_masking, N=256 L=64: fastmae, plain"
    assert header.split() == ["time,", "and", "time", "/", "time", "of", "median", "fastmae", "plain"]
    assert (ours.split()[0], theirs.split()[0], progress) == ("fastmae", "plain", ".")
    found = collect(out)
    assert [(one["competitor"], one["rounds"]) for one in found["benchmarks"]] == [("fastmae", 2), ("plain", 2)]
    assert found["machine"]["threads"] == 1


@pytest.mark.gpu
def test_a_timer_on_cuda():
    device = torch.device("cuda")
    timer, x = Timer(device), torch.ones(1 << 24, device=device)
    assert 0 < timer.time(lambda: x + 1) < 1
    assert timer.peak_memory(lambda: x + 1) == x.nbytes
    assert timer.copy_seconds(2 * x.nbytes) > 0
    assert timer.launches(lambda: x + 1) in (1, None)
