"""Names for the stages of a training step, in what a profiler records: there while one records, and free otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.profiler import record_function

Stage = Callable[[str], AbstractContextManager[Any]]

_NOTHING = nullcontext()


def unlabelled(name: str) -> AbstractContextManager[None]:
    """What :attr:`Trainer.stage` is while nobody records; a range costs microseconds even then."""
    return _NOTHING


@contextmanager
def labelled(trainer: Any) -> Iterator[None]:
    """Have a trainer's steps name their stages as long as the context lasts.

    The trainer opens "data", "masking", "forward", "backward" and "optimizer" itself; inside "forward" the model's
    parts are "embedding", "encoder" and "decoder", the last of which ends with the loss. A model that is compiled as a
    whole has no parts: a hook in it would be another graph.
    """
    whole = trainer.config.train.compile == "model" and trainer.parallelism.mode == "none"
    parts = _Parts()
    handles = [] if whole else parts.install(trainer.model)
    trainer.stage = record_function
    try:
        yield
    finally:
        trainer.stage = unlabelled
        for handle in handles:
            handle.remove()
        parts.enter(None)  # of a forward that an error ended


class _Parts:
    """The part of the model that runs: one range at a time, moved on by hooks."""

    def __init__(self) -> None:
        self._open: AbstractContextManager[Any] | None = None

    def install(self, model: nn.Module) -> list[Any]:
        first, last = model.blocks[0], model.blocks[-1]
        return [
            model.register_forward_pre_hook(lambda *_: self.enter("embedding")),
            first.register_forward_pre_hook(lambda *_: self.enter("encoder")),
            last.register_forward_hook(lambda *_: self.enter("decoder")),
            model.register_forward_hook(lambda *_: self.enter(None)),
        ]

    def enter(self, name: str | None) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = None if name is None else record_function(name)
        if self._open is not None:
            self._open.__enter__()
