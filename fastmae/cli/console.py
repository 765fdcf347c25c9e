"""The console of a run, whose lines are broken between words."""

from __future__ import annotations

import textwrap
from typing import Any

from rich.console import Console


class WordWrapConsole(Console):
    """Breaks lines between words on a terminal, and never a word or a path; what is piped keeps its lines.

    Rich by itself either folds long words or leaves the breaking to the terminal, which cuts words.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, soft_wrap=True, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        if self.is_terminal:
            objects = tuple(self._wrap(text) if isinstance(text, str) else text for text in objects)
        super().print(*objects, **options)

    def _wrap(self, text: str) -> str:
        keep_words = {"break_long_words": False, "break_on_hyphens": False}
        lines = (textwrap.wrap(line, self.width, subsequent_indent="  ", **keep_words) for line in text.split("\n"))
        return "\n".join("\n".join(line) for line in lines)
