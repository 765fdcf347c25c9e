"""One process of a run that ``soak.py`` kills: ``fastmae`` with its arguments, and a record of what it consumed."""

from __future__ import annotations

import sys
from pathlib import Path

from consumed import record

from fastmae.cli import main

if __name__ == "__main__":
    folder, attempt, *arguments = sys.argv[1:]
    with record(Path(folder), int(attempt)):
        sys.exit(main(arguments))
