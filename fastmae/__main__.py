"""``python -m fastmae``, which ``torchrun -m fastmae`` needs."""

import sys

from fastmae.cli import main

if __name__ == "__main__":
    sys.exit(main())
