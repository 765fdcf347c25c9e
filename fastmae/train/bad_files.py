"""``bad_files.jsonl``: the files that a run skips, why, and since when."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmae.data import Dataset, LateBad

_log = logging.getLogger(__name__)


class BadFiles:
    """The bad files of a run: those that the index knows, and those that are found while training.

    Each is one line, ``{"path", "reason", "sample_id", "found"}``; ``found`` is ``"index"`` or the training step. The
    file is rewritten when a run starts or resumes, from index and checkpoint, so that no line comes twice. A loader
    works ahead; what it finds in batches that no step has used yet waits, so that a resumed run reports the same files
    at the same steps.

    Args:
        step_of: the step, counted from 1, that a position in the order of images belongs to.
        writes: whether this rank writes the file; all ranks know the same.
    """

    def __init__(self, path: Path, dataset: Dataset, step_of: Callable[[int], int], *, writes: bool = True) -> None:
        self._writes = writes
        self._path, self._dataset, self._step_of = path, dataset, step_of
        self._late: dict[int, LateBad] = {}

    def __len__(self) -> int:
        return len(self._dataset.bad_ids) + len(self._late)

    @property
    def late(self) -> list[LateBad]:
        """Files found while training, in the order of their positions."""
        return list(self._late.values())

    def state_dict(self) -> dict[str, list[list[Any]]]:
        """``late``, JSON-able."""
        return {"late": [list(bad) for bad in self.late]}

    def load_state_dict(self, state: Mapping[str, Iterable[Sequence[Any]]]) -> None:
        self._late = {bad.sample_id: bad for bad in (LateBad(*values) for values in state["late"])}

    def begin(self) -> None:
        """Write all known bad files."""
        if self._writes:
            known = zip(self._dataset.bad, self._dataset.bad_ids.tolist(), strict=True)
            lines = [_line(bad.path, bad.reason, sample_id, "index") for bad, sample_id in known]
            partial = self._path.with_name(f".{self._path.name}.tmp")
            partial.write_text("".join([*lines, *map(self._line, self.late)]))
            partial.replace(self._path)

    def unknown(self, found: Iterable[LateBad], samples: int) -> list[LateBad]:
        """The new ones among ``late_bad`` of one or several loaders, in the order of positions, each file once.

        Args:
            samples: images consumed so far; later positions wait.
        """
        new: dict[int, LateBad] = {}
        for bad in sorted(found, key=lambda bad: (bad.position, bad.sample_id)):
            if bad.sample_id not in self._late and bad.position < samples:
                new.setdefault(bad.sample_id, bad)
        return list(new.values())

    def update(self, found: Iterable[LateBad], samples: int) -> None:
        """Append the new ones among those of all ranks; arguments as for :meth:`unknown`."""
        new = self.unknown(found, samples)
        self._late |= {bad.sample_id: bad for bad in new}
        if new and self._writes:
            try:
                with self._path.open("a") as file:
                    file.writelines(map(self._line, new))
            except OSError as error:  # a resumed run writes them, since checkpoints have them
                _log.warning("%s: not written: %s", self._path, error)

    def _line(self, bad: LateBad) -> str:
        return _line(self._dataset.path(bad.sample_id), bad.reason, bad.sample_id, self._step_of(bad.position))


def _line(path: str, reason: str, sample_id: int, found: Any) -> str:
    return json.dumps({"path": path, "reason": reason, "sample_id": sample_id, "found": found}) + "\n"
