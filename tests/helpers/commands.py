"""What tests ask of the command line."""

from __future__ import annotations

from fastmae.cli import main


def mistake(capsys, *arguments: object) -> str:
    """Run the command line, which must fail with one line; return it."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastmae: error: ")
    assert "Traceback" not in error
    return error
