"""``--report``: what a run tells while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReportConfig:
    """What a run tells while it trains, beside the rows of metrics. None of it changes the training."""

    picture_every_steps: int | None = None
    """Steps between two reconstruction pictures of the same images. None: one at the end."""
    probe_every_epochs: float | None = None
    """Epochs between two probes of the features, by nearest neighbours and a linear classifier, for images that have
    labels. None: no probe."""
    probe_images: int = 10_000
    """Labelled images that the probe looks at, at most."""
    probe_path: Path | None = None
    """Labelled images to test the probe on. None: a tenth of those it looks at."""
    profile_at_step: int | None = None
    """Step from which on a trace is recorded, in traces/. None: no trace."""
    profile_steps: int = 3
    """Steps that the trace holds."""
    wandb_project: str | None = None
    """Project of Weights & Biases that gets the metrics too; needs the package wandb. None: none."""
    stall_seconds: float = 300.0
    """Seconds without a step after which the processes that lag are named."""
