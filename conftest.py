"""``pytest --benchmark`` runs the benchmarks instead of the tests; the options of all benchmarks are here."""

from __future__ import annotations

import sys

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("fastmae benchmarks")
    group.addoption(
        "--benchmark", action="store_true",
        help="run the benchmarks instead of the tests; with -k quick only the comparison of whole training steps",
    )  # fmt: skip
    group.addoption("--threads", type=int, help="CPU threads of PyTorch (default: PyTorch's own choice)")
    group.addoption(
        "--precision", choices=("bf16", "fp32"),
        help="of matrix products (default: bf16 on CUDA, on a CPU the faster one, measured)",
    )  # fmt: skip
    group.addoption("--rounds", type=int, help="rounds of every benchmark (default: by time)")
    group.addoption("--compile", action="store_true", help="torch.compile columns on the CPU too")
    group.addoption("--no-compile", action="store_true", help="no torch.compile columns on CUDA either")
    group.addoption("--changes", action="store_true", help="the step benchmark: each change on its own as well")
    group.addoption("--only", metavar="NAME,...", help="these competitors and no others")
    group.addoption("--results", metavar="FILE", help="append a line of JSON for each result as soon as it is there")
    group.addoption("--tiny", action="store_true", help="rehearse on the CPU, with small models, also what is for GPUs")
    group.addoption("--wait", action="store_true", help="collect, then wait for a line on the standard input (with -s)")
    group.addoption("--part", metavar="I/N", help="run every N-th test only, from the I-th on")
    group.addoption(
        "--images", metavar="FOLDER", help="the loader benchmark: its JPEGs (default: cut from photographs)"
    )
    group.addoption(
        "--model", action="append", metavar="NAME[:BATCH]",
        help="the step benchmark: tiny-test, small-32px, small, base, large or huge; may be given more than once",
    )  # fmt: skip


def pytest_configure(config):
    if not config.getoption("--benchmark"):
        return
    if not config.pluginmanager.has_plugin("benchmark"):
        raise pytest.UsageError("--benchmark: pytest-benchmark is not installed: pip install 'fastmae[bench]'")
    if config.args_source != pytest.Config.ArgsSource.ARGS:
        config.args[:] = [str(config.rootpath / "benchmarks")]


def pytest_collection_modifyitems(config, items):
    if part := config.getoption("--part"):
        first, count = map(int, part.split("/"))
        items[:] = items[first::count]


def pytest_collection_finish(session):
    if session.config.getoption("--wait") and not sys.stdin.readline():
        pytest.exit("nobody waits for this any more")
