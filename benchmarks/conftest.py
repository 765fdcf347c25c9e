"""Options and fixtures of the benchmarks."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
from collections.abc import Callable

import pytest
import torch
from contest import Contest, Replay, Results, Unavailable, arm, hold, table
from measure import Meter

import fastmae

_REPLAY = Replay()
_TABLES = pytest.StashKey[list[list[str]]]()
_PACKAGES = (
    "torch", "torchvision", "triton", "transformers", "timm", "xformers", "apex", "pillow", "nvidia-dali-cuda120",
    "nvidia-dali-cuda130", "webdataset", "pytest-benchmark",
)  # fmt: skip


def pytest_addoption(parser):
    group = parser.getgroup("fastmae benchmarks")
    group.addoption("--threads", type=int, help="CPU threads of PyTorch (default: PyTorch's own choice)")
    group.addoption("--rounds", type=int, help="rounds of every contest (default: by time)")
    group.addoption("--compile", action="store_true", help="torch.compile columns on the CPU too")
    group.addoption("--no-compile", action="store_true", help="no torch.compile columns on CUDA either")
    group.addoption("--levers", action="store_true", help="the step benchmark: each lever on its own as well")
    group.addoption("--bf16-residual", action="store_true", help="the step benchmark: it compiled, too")
    group.addoption(
        "--images", metavar="FOLDER", help="the loader benchmark: its JPEGs (default: cut from photographs)"
    )
    group.addoption(
        "--model", action="append", metavar="NAME[:BATCH]",
        help="the step benchmark: tiny-test, small-32px, base, large or huge; may be given more than once",
    )  # fmt: skip


def pytest_configure(config):
    config.stash[_TABLES] = []
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_collection_modifyitems(config, items):
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
    machine_info["fastmae"] = {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else cpu,
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), "fastmae": fastmae.__version__}
        | {p: v for p in _PACKAGES if (v := _version(p))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def meter(device) -> Meter:
    return Meter(device)


@pytest.fixture(scope="session")
def _current() -> dict:
    """The contest that is being reported; the one before it is let go, with its memory."""
    return {}


@pytest.fixture
def compete(request, benchmark, meter, _current) -> Callable[..., None]:
    """``compete(build, *args)`` reports this test's competitor in the contest ``build(*args)``.

    The first competitor of a contest to be reported has all those measured that were selected, in turn.
    """
    item = request.node

    def case(other) -> tuple:
        params = getattr(other, "callspec", None) and other.callspec.params
        return other.function, sorted((k, repr(v)) for k, v in (params or {}).items() if k != "competitor")

    def run(build: Callable[..., Contest], *args) -> None:
        name = item.callspec.params["competitor"]
        if _current.get("case") != case(item):
            _current.clear()
            gc.collect()
            # What was compiled for other shapes counts against a limit, behind which there is no compilation at all.
            torch.compiler.reset()
            _current.update(case=case(item), contest=build(*args))
        contest: Contest = _current["contest"]
        competitor = contest.competitors[name]
        if isinstance(competitor, Unavailable):
            pytest.skip(competitor)
        benchmark.group = contest.group
        if benchmark.disabled:
            benchmark.pedantic(arm(competitor))
            return
        if "results" not in _current:
            peers = [other for other in request.session.items if other.function is item.function]
            peers = [other for other in peers if case(other) == case(item) and not other.get_closest_marker("skip")]
            names = [other.callspec.params["competitor"] for other in peers]
            names = [n for n in names if not isinstance(contest.competitors[n], Unavailable)]
            _current["results"] = hold(contest, names, meter, request.config.getoption("--rounds"))
            request.config.stash[_TABLES].append(table(contest, _current["results"]))
        results: Results = _current["results"]
        if name in results.errors:
            pytest.fail(results.errors[name], pytrace=False)
        benchmark.extra_info.update(results.info[name])
        _REPLAY.load(results.times[name])
        benchmark.pedantic(lambda: None, rounds=len(results.times[name]))

    return run
