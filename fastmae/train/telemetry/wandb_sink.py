"""Metrics to Weights & Biases, where it is installed and asked for. It may fail; the training does not notice."""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastmae.train.run_folder import RunFolder
from fastmae.train.telemetry.metrics import Row
from fastmae.train.telemetry.sinks import scalars

_FILE = "wandb.json"
_START_SECONDS = 60
_FINISH_SECONDS = 30.0


def require_wandb() -> None:
    """Check that wandb is installed, without importing it.

    Raises:
        ValueError: if it is not.
    """
    if "wandb" not in sys.modules and find_spec("wandb") is None:
        raise ValueError(
            "--report.wandb-project: expected the package wandb (pip install 'fastmae[wandb]'), but it is not installed"
        )


class WeightsAndBiases:
    """One W&B run for a run folder, however often that is resumed: ``wandb.json`` there holds its id.

    W&B never takes back what was logged. Its charts are drawn over ``step`` and not over its own count, so that what is
    trained again after a resume lies where it was before. Without a connection or a key the run is kept on disk, in the
    run folder's ``wandb/``, for ``wandb sync``. Any failure is said once, and ends the logging and nothing else.

    Args:
        project: of W&B.
        run: the run folder.
        config: what W&B shows as the configuration.
        say: shows a line.

    Raises:
        ValueError: if wandb is not installed.
    """

    def __init__(
        self, project: str, run: RunFolder, config: Mapping[str, Any] | None, say: Callable[[str], None]
    ) -> None:
        require_wandb()
        import wandb

        self._wandb, self._say, self._run = wandb, say, None
        saved = run.read_json(_FILE) or {}
        known = saved.get("project") == project and saved.get("id")
        options = {
            "project": project,
            "id": known or secrets.token_hex(4),
            "name": run.path.resolve().name,
            "dir": str(run.path),
            "config": dict(config or {}),
            "resume": "allow",
        }
        run.write_json(_FILE, {"project": project, "id": options["id"]})
        try:
            self._run = self._start(options)
        except Exception as error:
            say(f"Weights & Biases: {_words(error)}; this run is kept for `wandb sync` in {run.path / 'wandb'}")
            try:
                self._wandb.teardown()  # what is left of the attempt holds the id
                self._run = self._start(options | {"mode": "offline"})
            except Exception as error:
                self._give_up(error)

    def write(self, row: Row) -> None:
        self._log({"step": row["step"], **scalars(row)})

    def evaluate(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        found = {"step": step, **{f"eval/{name}": value for name, value in values.items()}}
        self._log(found, pictures)

    def close(self) -> None:
        """Wait half a minute at most for what has not been sent yet. W&B calls the run failed if an error ends it."""
        if self._run is None:
            return
        failed = sys.exc_info()[0] is not None
        thread = threading.Thread(target=self._finish, args=(int(failed),), name="wandb", daemon=True)
        thread.start()
        thread.join(_FINISH_SECONDS)
        if thread.is_alive():
            self._say("Weights & Biases: not all has been sent; `wandb sync` sends the rest from the run folder")

    def _start(self, options: Mapping[str, Any]) -> Any:
        # Its copy of the console would hold every state of the progress bar.
        settings = self._wandb.Settings(console="off", init_timeout=_START_SECONDS)
        started = self._wandb.init(**options, settings=settings)
        started.define_metric("step")
        started.define_metric("*", step_metric="step")
        return started

    def _log(self, values: dict[str, Any], pictures: Mapping[str, Path] | None = None) -> None:
        if self._run is None:
            return
        try:
            images = {f"eval/{name}": self._wandb.Image(str(path)) for name, path in (pictures or {}).items()}
            self._run.log(values | images)
        except Exception as error:
            self._give_up(error)

    def _finish(self, exit_code: int) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._say(f"Weights & Biases: {_words(error)}; nothing more is logged there, the training goes on")


def _words(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")[:200]
