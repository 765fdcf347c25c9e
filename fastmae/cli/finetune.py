"""``fastmae evaluate finetune``, ``partial`` and ``scratch``: training runs that end with a result."""

from __future__ import annotations

import json
from collections.abc import Collection

from fastmae import finetuning
from fastmae.cli.evaluate import report
from fastmae.errors import usage_errors
from fastmae.loading import read_weights
from fastmae.model import PRESETS
from fastmae.train.classification import ClassifierConfig, ScratchConfig, classifier_recipe, recipe_name, settled
from fastmae.train.config import flatten, from_json, to_json
from fastmae.train.launcher import rank_and_size
from fastmae.train.liveness import EXIT_PREEMPTED, StopRequest
from fastmae.train.recipes import apply_flags


def train(parsed: ClassifierConfig, given: Collection[str], stop: StopRequest) -> int:
    """Train and test a classifier; return the exit code. ``given`` are the flags on the command line."""
    with usage_errors():
        config = complete(parsed, given)
    run = finetuning.run
    if rank_and_size()[1] > 1:  # torchrun's summary quotes the error of the process that failed first
        from torch.distributed.elastic.multiprocessing.errors import record

        run = record(run)
    trained, status = run(config, stop)
    if status == "preempted":
        return EXIT_PREEMPTED
    if rank_and_size()[0] == 0:
        result = trained.result
        report(result, config, *(result.pop(name) for name in ("train_images", "val_images", "seconds")))
    return 0


def complete(parsed: ClassifierConfig, given: Collection[str]) -> ClassifierConfig:
    """The flags that were given, on top of the run that is resumed, or of the recipe for the model's width.

    Raises:
        ValueError: nothing to resume, or a run of another command; no WEIGHTS.
        CheckpointError: the weights cannot be read.
    """
    flags = {name.replace(".no-", "."): name for name in given}  # as tyro negates them
    named = {field for field in flatten(to_json(parsed)) if f"--{field}".replace("_", "-") in flags}
    if getattr(parsed, "weights", None) is not None:
        named.add("weights")
    base = _saved(parsed) if parsed.resume else None
    base = base or classifier_recipe(type(parsed), parsed.recipe or recipe_name(_width(parsed)))
    train = {field.partition(".")[2] for field in named if field.startswith("train.")}
    return apply_flags(settled(parsed, base, named), base, train)


def _saved(parsed: ClassifierConfig) -> ClassifierConfig | None:
    """The configuration of the run in ``--run-folder``; None where no run began."""
    if parsed.run_folder is None:
        raise ValueError("--resume: expected --run-folder with the run folder to continue, got none")
    path = parsed.run_folder / "config.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    if values.get("protocol") != parsed.protocol:
        command = f"fastmae evaluate {values['protocol']}" if "protocol" in values else "fastmae pretrain"
        raise ValueError(f"--run-folder: the run in {parsed.run_folder} was started by {command}, got {parsed.command}")
    return from_json(values, type(parsed))


def _width(parsed: ClassifierConfig) -> int:
    if isinstance(parsed, ScratchConfig):
        model = parsed.model
        return model.embed_dim or PRESETS.get(f"mae_{model.name}", {}).get("embed_dim", 0)
    if parsed.weights is None:
        raise ValueError("WEIGHTS: expected weights to start from, before the flags, got none")
    return read_weights(parsed.weights)[1].architecture["embed_dim"]
