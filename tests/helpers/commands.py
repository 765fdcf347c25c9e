"""What tests ask of the command line."""

from __future__ import annotations

import os

from fastmae.cli import main


def mistake(capsys, *arguments: object) -> str:
    """Run the command line, which must fail with one line; return it."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastmae: error: ")
    assert "Traceback" not in error
    return error


def outside_xdist() -> dict[str, str]:
    """The environment of a pytest that a test starts: inside a worker of pytest-xdist it would not measure."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
