"""``pytest --benchmark`` runs the benchmarks instead of the tests; the options of all benchmarks are here."""

from __future__ import annotations

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
    group.addoption("--rounds", type=int, help="rounds of every comparison (default: by time)")
    group.addoption("--compile", action="store_true", help="torch.compile columns on the CPU too")
    group.addoption("--no-compile", action="store_true", help="no torch.compile columns on CUDA either")
    group.addoption("--levers", action="store_true", help="the step benchmark: each lever on its own as well")
    group.addoption("--bf16-residual", action="store_true", help="the step benchmark: it compiled, too")
    group.addoption("--json-lines", metavar="FILE", help="append each result to this file as soon as it is there")
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
