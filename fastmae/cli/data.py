"""``fastmae data``: pack, index, verify, describe."""

from __future__ import annotations


def run(command: object) -> int:
    """Run one of the commands; return its exit code."""
    raise NotImplementedError(type(command).__name__)
