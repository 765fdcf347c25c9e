"""``python -m fastmae``, which ``torchrun -m fastmae`` needs."""

import os
import sys
import traceback

from fastmae.cli import main
from fastmae.cli.output import flush_output


def _run() -> int:
    """Run the command, and end the process at once if an error has left a process group behind.

    Such a group may wait for a rank that has failed, and the end of the interpreter for the group.
    """
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    flush_output()
    distributed = sys.modules.get("torch.distributed")
    if code and distributed is not None and distributed.is_available() and distributed.is_initialized():
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(_run())
