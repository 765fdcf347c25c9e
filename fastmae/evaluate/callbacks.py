"""Callbacks that evaluate the weights during a run: reconstruction pictures, and a probe of the features."""

from __future__ import annotations

import time
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from fastmae import data
from fastmae.evaluate.features import Features, evaluating
from fastmae.evaluate.labelled import LabelledImages, choose_labelled, hold_out, match_classes
from fastmae.evaluate.online_probe import probe
from fastmae.evaluate.sets import FixedSets
from fastmae.train.callbacks import Callback
from fastmae.train.config import PretrainConfig
from fastmae.train.ranks import Ranks

NEW_CROPS, UNSEEN = "new crops of the training {}", "a photograph never trained on"
_NEW_CROPS_EPOCH = 2**31
"""No run reaches this epoch, so its crops are never trained on."""
_CROPS, _MASKS = 12, 48
"""Crops in a picture during training, and masks over which its errors are averaged."""
_COVERED = 0.5
"""Share of the test images whose class must also be in the images to learn from; the others count as errors."""
_ERRORS = ("mse", "mse_mean_color", "mse_inverse_distance")


def reconstruction_sets(
    config: PretrainConfig, dataset: data.Dataset, num_crops: int
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The images in every picture of a run: (N, C, H, W) per heading, and names per heading.

    They are crops of the training images that are never trained on, cropped as in the paper and not by the run's own
    settings, so that runs are comparable; and for 3-channel models a photograph that is held out of every training.

    Raises:
        DataError: an image cannot be read.
    """
    seed, size = config.train.seed, config.img_size
    source = "photographs" if config.data.path is None else "images"
    crops = data.fixed_crops(dataset, size, seed=seed, epoch=_NEW_CROPS_EPOCH, count=num_crops)
    sets, names = {NEW_CROPS.format(source): crops}, {}
    if config.model.in_chans == 3:
        names[UNSEEN], sets[UNSEEN] = data.validation_photographs(size)
    return sets, names


class Pictures(Callback):
    """Every ``--report.picture-every-steps``: the same images and masks, as ``reconstructions/step-N.png``.

    Unless the model is sharded, rank 0 evaluates alone. The others wait here, on the side group, whose time limit is
    longer than that of the next step's collectives.
    """

    def __init__(self, config: PretrainConfig, dataset: data.Dataset) -> None:
        self._config, self._dataset, self._every = config, dataset, config.report.picture_every_steps

    def begin(self, trainer: Any) -> None:
        self._evaluates = trainer.parallelism.is_main or trainer.parallelism.sharded
        trainer.ranks.gather("reading the images of the pictures", self._read)

    def _read(self) -> None:
        if self._evaluates:
            sets, names = reconstruction_sets(self._config, self._dataset, _CROPS)
            model = self._config.model
            options = {"mask_ratio": model.mask_ratio, "mask_strategy": model.mask_strategy}
            options |= {"seed": self._config.train.seed, "names": names}
            self._sets = FixedSets(sets, **options, num_masks=_MASKS, num_rows=_CROPS)

    def after_step(self, trainer: Any) -> None:
        if trainer.step % self._every == 0:
            if self._evaluates:
                self._evaluate(trainer)
            trainer.ranks.first("drawing a picture", lambda: None)

    def _evaluate(self, trainer: Any) -> None:
        path = trainer.run.reconstructions / f"step-{trainer.step:06}.png" if trainer.parallelism.is_main else None
        options = {"dtype": trainer.dtype, "when": f"after {trainer.step:,} steps"}
        try:
            with evaluating(trainer.model):
                summary = self._sets.evaluate(trainer.model, path, **options)
        except OSError as error:  # writing the file failed, after the forward passes that all ranks take part in
            trainer.console.print(f"step {trainer.step}: no picture: {error}")
            return
        values = {
            f"{'unseen' if heading == UNSEEN else 'crops'}_{name}": numbers[name]
            for heading, numbers in summary.items()
            for name in _ERRORS
        }
        if path:
            trainer.reporter.evaluation(trainer.step, values, {"reconstructions": path})


class EveryEpochs(Callback):
    """Evaluates the weights every so many epochs and at the end, each time once.

    Args:
        epochs: between two evaluations; None: at the end only.
        steps_per_epoch: not always a whole number.
    """

    def __init__(self, epochs: float | None, steps_per_epoch: Fraction) -> None:
        self._every, self._epoch = epochs and Fraction(str(epochs)), steps_per_epoch
        self._evaluated: int | None = None

    def evaluate(self, trainer: Any) -> None:
        """Evaluate the weights after ``trainer.step`` steps."""
        raise NotImplementedError

    def after_step(self, trainer: Any) -> None:
        self._evaluated = None
        if self.is_due(trainer.step):
            self._evaluate_now(trainer)

    def finish(self, trainer: Any) -> None:
        if self._evaluated != trainer.step:
            self._evaluate_now(trainer)

    def is_due(self, step: int) -> bool:
        """Whether an interval of epochs ends in this step. A function of the step, so that resuming needs no state."""
        if not self._every:
            return False
        done, before = (count / self._epoch // self._every for count in (step, step - 1))
        return done > before

    def _evaluate_now(self, trainer: Any) -> None:
        self._evaluated = trainer.step
        self.evaluate(trainer)


class Probe(EveryEpochs):
    """Every ``--report.probe-every-epochs`` and at the end: k-NN and a linear classifier on the frozen features.

    Raises:
        ValueError: the images have no labels, or too few, or of one class only, or other classes than the test images,
            or too many classes for so few images, or the test images cannot be opened; names the flag.
    """

    def __init__(self, config: PretrainConfig, dataset: data.Dataset, ranks: Ranks) -> None:
        super().__init__(config.report.probe_every_epochs, Fraction(len(dataset), config.train.global_batch_size))
        self._config = config
        self._known, self._tests = _labelled_images(config, dataset, ranks)
        covered = np.isin(self._tests.labels, self._known.labels).mean()
        if covered < _COVERED:
            raise ValueError(
                "--report.probe-images: expected some images of each class to learn from, got "
                f"{len(self._known.labels):,} that have the classes of only {covered:.0%} of those to test on"
            )

    def begin(self, trainer: Any) -> None:
        known, tests = self._known, self._tests
        trainer.console.print(
            f"Probe every {self._config.report.probe_every_epochs:g} epochs: {len(known.labels):,} images of "
            f"{len(np.unique(known.labels)):,} classes to learn from, {len(tests.labels):,} of {tests.dataset.name} "
            "to test on"
        )

    def evaluate(self, trainer: Any) -> None:
        self._evaluate(trainer)
        trainer.ranks.first("classifying", lambda: None)  # may take rank 0 longer than a collective's time limit

    def _evaluate(self, trainer: Any) -> None:
        begun, ranks = time.monotonic(), trainer.ranks
        options = {"dtype": trainer.dtype, "num_threads": self._config.data.num_threads}
        options |= {"rank": ranks.rank, "world_size": ranks.size, "timeout": self._config.data.timeout}
        options["on_batch"] = lambda: trainer.watchdog.at("probing features")  # may take minutes on a CPU
        if ranks.size > 1:
            options["gather"] = lambda own: _gather(own, ranks)
        try:
            values = probe(trainer.model, self._known, self._tests, **options)
        except ValueError as error:  # of rank 0, after the collectives
            trainer.console.print(f"step {trainer.step}: no probe: {error}")
            return
        if values is not None:
            values["probe_seconds"] = time.monotonic() - begun
            trainer.reporter.evaluation(trainer.step, values)


def _labelled_images(
    config: PretrainConfig, dataset: data.Dataset, ranks: Ranks
) -> tuple[LabelledImages, LabelledImages]:
    """The images to learn from and those to test on."""
    count, path = config.report.probe_images, config.report.probe_path
    try:
        images = choose_labelled(dataset, count)
        if len(np.unique(images.labels)) < 2:
            raise ValueError(f"expected images of at least two classes in {dataset.name}, got one")
        if path is None:
            return hold_out(images)
    except ValueError as error:
        raise ValueError(f"--report.probe-every-epochs: {error}") from error

    def opened(**options: Path) -> data.Dataset:
        try:
            return data.open_dataset(path, **config.dataset_arguments(), **options)
        except data.DataError as error:
            raise ValueError(f"--report.probe-path: {error}") from error

    first = partial(ranks.first_in_hours, "opening the images to probe on")
    tests = data.open_once(opened, first) if ranks.size > 1 else opened()
    if tests.hash == dataset.hash:
        raise ValueError(
            f"--report.probe-path: expected other images than those to train on, got the same, {path}; "
            "without it a tenth of them is held out"
        )
    try:
        return images, match_classes(images, choose_labelled(tests, count))
    except ValueError as error:
        raise ValueError(f"--report.probe-path: {error}") from error


def _gather(own: Features, ranks: Ranks) -> list[Features] | None:
    """Every rank's features on rank 0, on its device; None on the others."""
    device = own.pooled.device
    parts = [None] * ranks.size if ranks.rank == 0 else None
    dist.gather_object(Features(*(part.cpu() for part in own)), parts, group=ranks.group, group_dst=0)
    return parts and [Features(*(tensor.to(device) for tensor in part)) for part in parts]
