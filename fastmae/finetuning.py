"""A whole run that trains a classifier: fine-tuning, partial fine-tuning, and training from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastmae import data
from fastmae.data.subset import subset
from fastmae.evaluate.finetune import Accuracy, Classification, WeightAverage
from fastmae.evaluate.labelled import choose_labelled, hold_out, match_classes, number_labels
from fastmae.loading import load, read_weights
from fastmae.model.classifier import VisionTransformer, create_vision_transformer
from fastmae.pretraining import TrainingRun, launch
from fastmae.train.callbacks import Callback
from fastmae.train.checkpoint import CheckpointError, list_checkpoints
from fastmae.train.classification import ClassifierConfig, ScratchConfig, classifier_recipe
from fastmae.train.config import to_json
from fastmae.train.liveness import StopRequest
from fastmae.train.recipes import different_flags
from fastmae.train.trainer import Status, Trainer
from fastmae.train.weights import AVERAGE, export_weights

_ALL = 1 << 60
"""Images, for no limit."""
_ENCODER = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_eps")
_ENCODER += ("mean", "std", "class_token")


def run(config: ClassifierConfig, stop: StopRequest) -> tuple[ClassifierRun, Status]:
    """Train and test a classifier: :func:`fastmae.pretraining.launch`."""
    return launch(ClassifierRun, config, stop, config.protocol)


class ClassifierRun(TrainingRun):
    """One run in an open folder.

    Attributes:
        result: on rank 0 of a run that is finished, what ``--out`` gets of it.
    """

    result: dict[str, Any]

    def open_images(self) -> data.Dataset:
        """The images to learn from, those with labels only. ``labels`` are theirs, and ``tests`` the images to test on,
        both numbered as the model's outputs; ``classes`` is what these are called."""
        config, model = self.config, self.config.model
        if isinstance(config, ScratchConfig):
            self.info, channels, trained = None, model.in_chans, {}
        else:
            # A run that continues has all that it needs in its own folder; WEIGHTS may be gone.
            saved = config.resume and list_checkpoints(self.folder.checkpoints)
            self.source = self.folder.path if saved else config.weights
            self.weights, self.info = read_weights(self.source)
            channels, trained = self.info.architecture["in_chans"], self.info.config.get("data", {})
        names = ("value_range", "channels_first", "max_bad_fraction", "max_pixels")
        options = {name: getattr(config.data, name) for name in names} | {"channels": channels}
        for name in names[:2]:  # as the images that the weights have seen
            options[name] = options[name] or trained.get(name)
        count, val = config.data.limit or _ALL, config.data.val
        order = {"index": config.data.index, "window": config.data.window}
        with _named("--data.path"):
            whole = self.open(config.data.path, **order, **options)
            known = choose_labelled(whole, count)
            if len(np.unique(known.labels)) < 2:
                raise ValueError(f"expected images of at least two classes in {known.dataset.name}, got one")
            if val is None:
                known, tests = hold_out(known)
        if val is not None:
            with _named("--data.val"):
                tests = match_classes(known, choose_labelled(self.open(val, **options), count), strict=True)
        classes, self.labels = np.unique(known.labels, return_inverse=True)
        names = dict(enumerate(whole.classes))
        self.classes = [names.get(number, str(number)) for number in classes.tolist()]
        labels = number_labels(classes, tests.labels)
        if not (labels >= 0).any():
            raise ValueError(
                "--data.path: expected several images of each class, of which a tenth can be held out to test on, or "
                f"--data.val with others; none of the {len(labels)} held out is of a class that is left to learn from"
            )
        self.tests = tests._replace(labels=labels)
        return subset(whole, known.sample_ids)

    def create_model(self) -> nn.Module:
        """The classifier with the weights that it starts from; whole, since it is sharded only afterwards."""
        model, count = self.config.model, len(self.classes)
        options = {"pool": model.pool, "drop_path": model.drop_path, "attention": model.attention}
        options["seed"] = self.config.train.seed
        if self.info is None:
            sizes = ("img_size", "patch_size", "in_chans", "mean", "std", "embed_dim", "depth", "num_heads")
            options |= {name: getattr(model, name) for name in sizes}
            with _named("--model", "."):
                return create_vision_transformer(model.name, count, **options)
        known = {name: self.info.architecture[name] for name in _ENCODER if name in self.info.architecture}
        known |= {} if model.img_size is None else {"img_size": model.img_size}
        for name in ("img_size", "num_heads"):
            if name not in known:
                raise CheckpointError(f"{self.source}: neither its shapes nor its metadata tell {name}")
        try:
            created = VisionTransformer(count, **known, **options)
            encoder = {name: tensor for name, tensor in self.weights.items() if not name.startswith("head.")}
            drawn = created.load_encoder(encoder, positions=model.positions)
        except ValueError as error:
            raise CheckpointError(f"{self.source}: {error}") from error
        if self.source == self.config.weights:
            self.console.print(f"Weights from {self.source}; drawn at random: {', '.join(drawn)}")
        del self.weights
        return created

    def create_task(self, config: ClassifierConfig, model: nn.Module, dataset: data.Dataset) -> Classification:
        """What is trained; ``config`` is settled."""
        return Classification(config, model, dataset, self.labels, data.create_loader)

    def describe(self) -> Iterator[str]:
        """What the run prints of its configuration."""
        config = self.config
        yield f"{config.protocol} with the settings of {config.recipe}"
        yield from different_flags(config, classifier_recipe(type(config), config.recipe))
        yield (
            f"{len(self.labels):,} images of {len(self.classes):,} classes to learn from, "
            f"{len(self.tests.labels):,} of {self.tests.dataset.name} to test on"
        )

    def callbacks(self, dataset: data.Dataset) -> list[Callback]:
        """As :class:`TrainingRun`, the average of the weights and tests."""
        decay = self.config.train.average
        average = WeightAverage(decay, AVERAGE) if decay else None
        self.accuracy = Accuracy(self.config, len(self.labels), self.tests, average)
        return [*([average] if average else []), self.accuracy, *super().callbacks(dataset)]

    def export(self, trainer: Trainer) -> tuple[nn.Module, Path]:
        """Write ``model.safetensors``, with the names of the classes; return the model and the file."""
        # The checkpoint that was just saved: the only whole copy of a sharded model, and with it the average.
        model, path = load(self.folder.path), self.folder.path / "model.safetensors"
        metadata = {"step": trainer.step, "config": to_json(trainer.config), "classes": self.classes}
        return model, export_weights(model, path, **metadata)

    def evaluate(self, trainer: Trainer, model: nn.Module, weights: Path, timing: dict[str, float]) -> None:
        """Write ``summary.json``; what the test at the end found becomes the result."""
        config = trainer.config
        self.result = {"protocol": config.protocol, "features": config.model.pool, **self.accuracy.values}
        self.result |= {"train_images": len(self.labels), "seconds": round(timing["seconds"], 1)}
        if config.protocol == "partial":
            self.result["blocks"] = config.blocks
        summary = self.result | {"steps": trainer.step, "samples": trainer.samples, **timing}
        summary |= {"classes": self.classes, "device": str(trainer.device), "weights": str(weights)}
        self.folder.write_json("summary.json", summary)
        self.console.print(f"Weights: {weights}")


@contextmanager
def _named(flag: str, separator: str = ": ") -> Iterator[None]:
    """Put a flag in front of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag}{separator}{error}") from error
