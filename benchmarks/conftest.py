"""Fixtures of the benchmarks, and what they print; their options are in the conftest.py of the root."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparison import Comparison, Replay, Results, Unavailable, arm, compare, table
from gpu_results import JsonLines, write_comparison
from measure import Meter, describe_machine
from step_recipes import usual_precision

from fastmae.train.parallel import DTYPES

_REPLAY = Replay()
_TABLES = pytest.StashKey[list[list[str]]]()
_USUAL_SECONDS = 5.0
"""Of a comparison, all in all, until some have been held and tell how long they take here."""


def pytest_configure(config):
    config.stash[_TABLES] = []
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem != "bench_quick")  # what most people want to know comes first
    compiles = config.getoption("--compile") if not torch.cuda.is_available() else not config.getoption("--no-compile")
    for item in items:
        if "compete" not in item.fixturenames:
            continue
        item.add_marker(pytest.mark.benchmark(timer=_REPLAY))
        if not compiles and "compile" in item.callspec.params["competitor"]:
            item.add_marker(pytest.mark.skip(reason="torch.compile: on the CPU only with --compile"))


def pytest_terminal_summary(terminalreporter, config):
    for lines in config.stash[_TABLES]:
        terminalreporter.section(lines[0])
        for line in lines[1:]:
            terminalreporter.write_line(line)


def pytest_benchmark_update_machine_info(config, machine_info):
    """What a result has to be read with."""
    cpu = machine_info["cpu"].get("brand_raw") or platform.machine()
    machine_info["fastmae"] = describe_machine(cpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def dtype(request, device) -> torch.dtype:
    """Of matrix products."""
    precision = request.config.getoption("--precision")
    if precision is None:
        precision, why = usual_precision(device)
        say(request.config, f"In {precision} where --precision names none: {why}")
    return DTYPES[precision]


@pytest.fixture(scope="session")
def meter(device) -> Meter:
    return Meter(device)


@pytest.fixture(scope="session")
def _current() -> dict:
    """The comparison that is being reported; the one before it is let go, with its memory."""
    return {}


def say(config: pytest.Config, *lines: str) -> None:
    """Write to the terminal while a test runs."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker of pytest-xdist
        return
    with config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        reporter.ensure_newline()
        for line in lines:
            reporter.write_line(line)
        reporter.flush()


def case_of(item: pytest.Item) -> tuple:
    """Tests of one case differ in nothing but the competitor."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return item.function, sorted((name, repr(value)) for name, value in params.items() if name != "competitor")


@pytest.fixture(scope="session")
def progress(request) -> Callable[[], str]:
    """Which comparison of how many begins, and about how long they all will take."""
    held = [item for item in request.session.items if "compete" in item.fixturenames]
    count = len({repr(case_of(item)) for item in held if not item.get_closest_marker("skip")})
    begun, number = time.monotonic(), 0

    def next_one() -> str:
        nonlocal number
        each = (time.monotonic() - begun + _USUAL_SECONDS) / (number + 1)
        number += 1
        return f"[{number} of {count}, about {each * (count - number + 1) / 60:.1f} minutes left]"

    return next_one


@pytest.fixture
def compete(request, benchmark, meter, progress, _current) -> Callable[..., None]:
    """``compete(build, *args)`` reports this test's competitor in the comparison ``build(*args)``.

    The first competitor of a comparison to be reported has all those measured that were selected, in turn.
    """
    item, config = request.node, request.config

    def run(build: Callable[..., Comparison], *args) -> None:
        name = item.callspec.params["competitor"]
        if _current.get("case") != case_of(item):
            _current.clear()
            gc.collect()
            # What was compiled for other shapes counts against a limit, behind which there is no compilation at all.
            torch.compiler.reset()
            _current.update(case=case_of(item), comparison=build(*args))
        comparison: Comparison = _current["comparison"]
        competitor = comparison.competitors[name]
        if isinstance(competitor, Unavailable):
            pytest.skip(competitor)
        benchmark.group = comparison.group
        if benchmark.disabled:
            benchmark.pedantic(arm(competitor))
            return
        if "results" not in _current:
            peers = [other for other in request.session.items if other.function is item.function]
            peers = [p for p in peers if case_of(p) == case_of(item) and not p.get_closest_marker("skip")]
            names = [other.callspec.params["competitor"] for other in peers]
            names = [n for n in names if not isinstance(comparison.competitors[n], Unavailable)]
            say(config, f"{progress()} {comparison.group}: warming up {', '.join(names)}")
            _current["results"] = compare(
                comparison, names, meter, config.getoption("--rounds"),
                announce=lambda rounds, seconds: say(config, f"{rounds} rounds, about {seconds:.1f} s"),
            )  # fmt: skip
            lines = table(comparison, _current["results"])
            config.stash[_TABLES].append(lines)
            say(config, *lines[1:])
            if path := config.getoption("--json-lines"):
                write_comparison(JsonLines(Path(path), item.function.__name__), comparison, _current["results"])
        results: Results = _current["results"]
        if name in results.errors:
            pytest.fail(results.errors[name], pytrace=False)
        benchmark.extra_info.update(results.info[name])
        _REPLAY.load(results.times[name])
        benchmark.pedantic(lambda: None, rounds=len(results.times[name]))

    return run
