"""Parse the command line with tyro; errors become one line, and ``--help`` shows the flags that most people need."""

from __future__ import annotations

import difflib
import functools
import io
import operator
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from itertools import takewhile
from typing import Any

import tyro

from fastmae.errors import UsageError
from fastmae.train.config import SECTIONS
from fastmae.train.launcher import rank_and_size
from fastmae.train.recipes import RECIPES

_COMMON = """
--model.name --model.img-size --model.patch-size --model.in-chans --model.mask-ratio --model.norm-pix-loss
--model.pool --data.path --data.val --data.limit --data.crop-ratio --data.loader --data.max-bad-fraction
--train.global-batch-size --train.batch-size --train.epochs --train.steps --train.warmup-epochs --train.base-lr
--train.init-from --train.seed --train.precision --train.compile --train.parallel --train.activation-checkpointing
--train.device --train.max-minutes --train.checkpoint-every-seconds
--report.test-every-epochs --report.picture-every-steps --report.probe-every-epochs --report.wandb-project
"""
"""Flags of a run's sections in ``--help``; the others are in ``--help-all``."""
_MEANT = {"--data": "--data.path", "--model": "--model.name", "--lr": "--train.base-lr"}


def parse(commands: dict[str, Any], argv: Sequence[str]) -> Any:
    """Parse into an instance of one of the classes in ``commands``, which are keyed by name.

    Raises:
        UsageError: one line, for anything wrong.
        SystemExit: after printing the help.
    """
    name = argv[0] if argv else "--help"
    if name not in commands and not name.startswith("-"):
        raise UsageError(f"expected one of {', '.join(commands)}, got {name}{_did_you_mean(_closest(name, commands))}")
    words = ["--help" if word == "--help-all" else word for word in argv] or ["--help"]
    errors, shown = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8")  # tyro draws its frames for UTF-8 only
    try:
        with redirect_stderr(errors), redirect_stdout(shown):
            union = functools.reduce(operator.or_, commands.values())
            about = "Pretrain Masked Autoencoders, fast."
            command, unknown = tyro.cli(union, prog="fastmae", description=about, args=words, return_unknown_args=True)
    except SystemExit as end:
        if end.code:
            raise UsageError(f"{_plain(errors.getvalue())}; fastmae {name} --help says more") from None
        shown.seek(0)
        if rank_and_size()[0] == 0:
            text = shown.read() if "--help-all" in argv else _most_needed(shown.read())
            print(_wrap(text))
        raise
    if unknown:
        raise UsageError(_about_unknown(unknown[0], command))
    return command


def _about_unknown(word: str, command: Any) -> str:
    """The error for the first word that is neither a flag nor a value, with a suggestion."""
    known = list(_flags(command))
    if word.startswith("-"):
        word = word.partition("=")[0].replace("_", "-")
        same_name = [flag for flag in known if flag.rpartition(".")[2] == word.lstrip("-")]
        meant = [flag for flag in [_MEANT.get(word), *same_name] if flag in known] or [_closest(word, known)]
        return f"{word}: no such flag{_did_you_mean(meant[0])}"
    flag = "--recipe" if word in RECIPES else "--data.path"
    return f"{word}: expected a flag before it{_did_you_mean(f'{flag} {word}' if flag in known else None)}"


def _flags(command: Any, prefix: str = "") -> Iterator[str]:
    for field in fields(command):
        value = getattr(command, field.name)
        if is_dataclass(value):
            # Only the sections of a training configuration have their name in front of their flags.
            yield from _flags(value, f"{field.name}." if field.name in SECTIONS else prefix)
        else:
            yield f"--{prefix}{field.name}".replace("_", "-")


def _closest(word: str, known: Any) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.7)), None)


def _did_you_mean(meant: str | None) -> str:
    return f"; did you mean {meant}?" if meant else ""


def _plain(box: str) -> str:
    """The text of one of tyro's errors, without its frame and the help below it."""
    lines = (line.strip("│ ") for line in box.splitlines()[1:])
    text = " ".join(takewhile(lambda line: line and line[0] not in "─╰", lines)).removesuffix(".")
    text = re.sub(
        r"Error parsing (.+?): no type matching (.+) could .* from \['(.*)'\]", r"\1: expected \2, got \3", text
    )
    text = re.sub(r"invalid choice '(.*)' for argument '(.+)'\. Expected (.*)", r"\2: expected \3, got \1", text)
    return text.removeprefix("Error parsing ") or box.strip()


def _most_needed(text: str) -> str:
    """The help of a command without the flags that are not in ``_COMMON``."""
    shown, keep, hidden, common = [], True, 0, _COMMON.split()
    for line in text.splitlines():
        if match := re.match(r"│ (-\S+?),?\s", line):
            keep = "." not in match[1] or match[1] in common
            hidden += not keep
        elif not line.startswith("│ "):
            keep = True
        if keep:
            shown.append(line)
    command = re.match(r"usage: ([a-z ]+)", text)
    more = [f"{hidden} more flags: {command[1].strip()} --help-all"] if hidden else []
    return "\n".join([*shown, *more])


def _wrap(text: str) -> str:
    """Wrap the description and the help of each flag anew: tyro 1.0 keeps the line breaks of indented docstrings."""
    head, corner, boxes = text.partition("╭")
    width = len(boxes.partition("\n")[0]) + 1
    usage, *description = head.split("\n\n")
    head = "\n\n".join([usage, *(textwrap.fill(part, width) for part in description)])
    lines, paragraph = [], []
    for line in [*f"{head}{corner}{boxes}".splitlines(), ""]:
        if match := re.fullmatch(r"│ {7}(\S.*?) *│", line):
            paragraph.append(match[1])
            width = len(line) - 10
            continue
        lines += [f"│       {part:<{width}} │" for part in textwrap.wrap(" ".join(paragraph), max(width, 1))]
        lines.append(line)
        paragraph = []
    return "\n".join(lines).rstrip("\n")
