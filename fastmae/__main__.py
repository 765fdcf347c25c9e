"""``python -m fastmae``, which ``torchrun -m fastmae`` needs."""

import os
import sys
import traceback

from fastmae.cli import main
from fastmae.cli.output import flush_output


def run() -> int:
    """Run the command; if it fails as one of several processes, end at once, without cleaning up.

    The threads of a loader, or a collective that waits for a lost rank, would keep the process.
    """
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    flush_output()
    if code and "RANK" in os.environ:
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(run())
