"""What decoders say about damage that they get over: libjpeg writes it to stderr, without the file's name."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from typing import Self, TextIO


class DecoderWarnings:
    """Collects what C libraries write to the process's stderr; what Python writes goes there as before.

    Use as a context manager, in one thread at a time. If it is left by an exception, what was not taken is passed on.
    """

    def __enter__(self) -> Self:
        self._python = sys.stderr
        self._python.flush()
        self._real = os.dup(2)
        self._file = tempfile.TemporaryFile()
        self._at = 0
        if _descriptor(self._python) == 2:
            sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        os.dup2(self._file.fileno(), 2)
        return self

    def take(self) -> list[str]:
        """The lines that came since the last call."""
        size = os.fstat(self._file.fileno()).st_size
        text = os.pread(self._file.fileno(), size - self._at, self._at).decode(errors="replace")
        self._at = size
        return text.splitlines()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        os.dup2(self._real, 2)
        os.close(self._real)
        if sys.stderr is not self._python:
            sys.stderr.close()
            sys.stderr = self._python
        if kind is not None:
            self._python.writelines(f"{line}\n" for line in self.take())
        self._file.close()


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, io.UnsupportedOperation, AttributeError):
        return None
