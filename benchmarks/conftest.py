"""Fixtures of the benchmarks, and what they print; their options are in the conftest.py of the root."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fake_cuda
import pytest
import torch
from benchmark import Benchmark, Results, Timer, Unavailable, describe_run, ready, run, table
from results import append

from fastmae.train.autotune import measure_products
from fastmae.train.parallel import DTYPES


class Replay:
    """A clock that plays measured times back: pytest-benchmark reads it before and after each round."""

    readings: Iterator[float]

    def __call__(self) -> float:
        return next(self.readings)


_REPLAY = Replay()


def pytest_configure(config):
    if threads := 1 if config.getoption("--tiny") else config.getoption("--threads"):
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem != "bench_quick")  # what most people want to know comes first
    if only := config.getoption("--only"):
        items[:] = [item for item in items if item.callspec.params.get("competitor") in only.split(",")]
    compiles = config.getoption("--compile") if not torch.cuda.is_available() else not config.getoption("--no-compile")
    for item in items:
        if "compete" not in item.fixturenames:
            continue
        item.add_marker(pytest.mark.benchmark(timer=_REPLAY))
        if not compiles and "compile" in str(item.callspec.params["competitor"]):
            item.add_marker(pytest.mark.skip(reason="torch.compile: on the CPU only with --compile"))


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    gpu = torch.cuda.is_available() and not request.config.getoption("--tiny")
    return torch.device("cuda" if gpu else "cpu")


@pytest.fixture(scope="session")
def dtype(request, device) -> torch.dtype:
    """Of matrix products: what --precision names, else what ``--train.precision auto`` takes for a ViT-B."""
    precision = request.config.getoption("--precision")
    if precision is None:
        precision, why = "bf16", "the default on a GPU"
        if device.type == "cpu":
            speeds = measure_products(width=768)
            precision = "bf16" if speeds.bf16 > speeds.fp32 else "fp32"
            why = f"matrix products run at {speeds}"
        say(request.config, f"In {precision} where --precision names none: {why}")
    return DTYPES[precision]


@pytest.fixture(scope="session")
def timer(request, device) -> Timer:
    return Timer(device, fake_cuda) if request.config.getoption("--tiny") else Timer(device)


@pytest.fixture(scope="session")
def store(request) -> Callable[..., None]:
    """``store(kind, **values)`` appends a line to the file that --results names, if it does."""
    path = request.config.getoption("--results")
    store = partial(append, path and Path(path))
    store("machine", **describe_run())
    return store


@pytest.fixture(scope="session")
def _current() -> dict:
    """The benchmark that is being reported; the one before it is let go, with its memory."""
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


def case_of(item: pytest.Item) -> str:
    """Tests of one case differ in nothing but the competitor."""
    params = sorted((name, repr(value)) for name, value in item.callspec.params.items() if name != "competitor")
    return f"{item.path}::{item.originalname} {params}"


@pytest.fixture
def compete(request, benchmark, timer, store, _current) -> Callable[..., None]:
    """``compete(build, *args)`` reports this test's competitor in the benchmark ``build(*args)``.

    The first competitor of a case to be reported has all those timed that were selected, in turn.
    """
    item, config = request.node, request.config

    def compete(build: Callable[..., Benchmark], *args) -> None:
        name = item.callspec.params["competitor"]
        if _current.get("case") != case_of(item):
            _current.clear()
            gc.collect()
            # What was compiled for other shapes counts against a limit, behind which there is no compilation at all.
            torch.compiler.reset()
            _current.update(case=case_of(item), job=build(*args))
        job: Benchmark = _current["job"]
        if isinstance(job.calls[name], Unavailable):
            pytest.skip(job.calls[name])
        benchmark.group = job.group
        if benchmark.disabled:
            benchmark.pedantic(ready(job.calls[name]))
            return
        if "results" not in _current:
            items = [
                i for i in request.session.items if "compete" in i.fixturenames and not i.get_closest_marker("skip")
            ]
            cases = list(dict.fromkeys(map(case_of, items)))
            names = [i.callspec.params["competitor"] for i in items if case_of(i) == case_of(item)]
            names = [name for name in names if not isinstance(job.calls[name], Unavailable)]
            say(config, f"[{1 + cases.index(case_of(item))} of {len(cases)}] {job.group}: {', '.join(names)}")
            rounds = 2 if config.getoption("--tiny") else config.getoption("--rounds")
            report = lambda name, s: store("round", group=job.group, competitor=name, seconds=s)  # noqa: E731
            _current["results"] = run(job, names, timer, rounds, report)
            say(config, *table(job, _current["results"])[1:])
            for entry in _current["results"].entries.values():
                store("benchmark", **entry)
        found: Results = _current["results"]
        if name in found.errors:
            pytest.fail(found.errors[name], pytrace=False)
        benchmark.extra_info.update(found.entries[name])
        _REPLAY.readings = iter([reading for seconds in found.times[name] for reading in (0.0, seconds)])
        benchmark.pedantic(lambda: None, rounds=len(found.times[name]))

    return compete
