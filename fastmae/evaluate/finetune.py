"""Training a classifier: the task, which parameters learn how, an average of the weights, and tests while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastmae.data import Batch, Dataset
from fastmae.data.sampler import batch_positions, micro_batches
from fastmae.evaluate.augmentation import BatchAugment
from fastmae.evaluate.callbacks import EveryEpochs
from fastmae.evaluate.features import encode_images, to_device
from fastmae.evaluate.labelled import LabelledImages
from fastmae.model.classifier import VisionTransformer, scales_of
from fastmae.ops.philox import Stream, random_words, to_unit
from fastmae.train.callbacks import Callback
from fastmae.train.classification import ClassifierConfig
from fastmae.train.flops import count_classifier_flops
from fastmae.train.task import ImageTask

_TOP = 5

# ---------------------------------------------------------------------------------------------------------------------
# What learns, and how


def freeze(model: VisionTransformer, blocks: float) -> None:
    """Leave the last ``blocks`` to train, with the norm behind and the head. Half a block is its MLP with its norm.

    0 leaves the head alone, and all blocks the whole model (paper, Figure 9).

    Raises:
        ValueError: more blocks than the model has.
    """
    depth = len(model.blocks)
    if not 0 <= blocks <= depth:
        raise ValueError(f"blocks: expected 0 to {depth}, got {blocks:g}")
    if blocks == depth:
        return
    model.requires_grad_(False)
    whole, trained = int(blocks), [model.head]
    if blocks:
        trained += [model.norm, model.fc_norm, *model.blocks[depth - whole :]]
    if blocks > whole:
        last = model.blocks[depth - whole - 1]
        trained += [last.norm2, last.mlp]
    for module in trained:
        module.requires_grad_(True)


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups whose ``lr_scale`` falls by ``layer_decay`` per layer from the head's 1 (Clark et al. 2020).

    Layer 0 is patch embedding, class token and positions, then come the blocks, and at last norm and head. Vectors,
    class token and positions do not decay.
    """
    last = len(model.blocks) + 1
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, _, rest = name.partition(".")
        embeds = part in ("patch_embed", "cls_token", "pos_embed")
        layer = int(rest.split(".")[0]) + 1 if part == "blocks" else 0 if embeds else last
        decays = parameter.ndim > 1 and part not in ("cls_token", "pos_embed")
        groups.setdefault((layer, weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": layer_decay ** (last - layer)}
        for (layer, decay), parameters in groups.items()
    ]


class Classification(ImageTask):
    """Cross-entropy on labelled images, augmented as the configuration says.

    Args:
        config: settled.
        dataset: labelled images.
        labels: int64 (n,), their classes, from 0 on.
        create_loader: ``fastmae.data.create_loader`` or something of its signature.

    Raises:
        ValueError: RandAugment for images other than 8-bit RGB, or more blocks to train than there are.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        model: VisionTransformer,
        dataset: Dataset,
        labels: np.ndarray,
        create_loader: Callable[..., Any],
    ) -> None:
        super().__init__(config, model, dataset, create_loader)
        self._labels, magnitude = labels, config.data.randaugment
        if magnitude and (dataset.channels != 3 or dataset.value_range is not None):
            raise ValueError(f"--data.randaugment: expected 0 for other images than 8-bit RGB, got {magnitude:g}")
        freeze(model, getattr(config, "blocks", len(model.blocks)))
        self.frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        trains = [any(p.requires_grad for p in block.parameters()) for block in model.blocks]
        self._frozen_blocks = trains.index(True) if True in trains else len(trains)
        self.augment = BatchAugment(config.train.seed, model.num_classes, config.data)

    def open_loader(self, position: int, batch_size: int, **options: Any) -> Any:
        """As :class:`fastmae.train.task.Task`; raises ValueError if images are to be mixed in odd numbers."""
        ranks, total = options["ranks"], self.samples_per_step
        order, place = self.dataset.order(self.config.train.seed), {"rank": ranks.rank, "world_size": ranks.size}
        odd = {len(part) for part in micro_batches(total, batch_size, **place) if len(part) % 2}
        if odd and self.augment.mixes:
            raise ValueError(
                "--train.global-batch-size: expected one that gives every batch an even number of images, since "
                f"--data.mixup and --data.cutmix mix pairs, got {total:,} with batches of {odd.pop()} on rank "
                f"{ranks.rank} of {ranks.size}"
            )
        batches = (batch_positions(n, batch_size=batch_size, position=position, **place, total=total) for n in count())
        # What the loader will bring, known on the host: asking the batch would wait for the device.
        self._keys = map(order.ids, batches)
        self._loader = super().open_loader(position, batch_size, **options)
        return self._loader

    def prepare(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images, targets, and the scales of stochastic depth.

        An image that cannot be read was replaced by one of another class, so it has no target and no part in the loss.
        """
        sample_ids, epochs = next(self._keys)
        labels = self._labels[sample_ids]
        bad = [late.sample_id for late in self._loader.late_bad]
        labels = np.where(np.isin(sample_ids, bad), -1, labels) if bad else labels
        augmented = self.augment(batch.images, labels, sample_ids, epochs, self.model.normalized)
        return *augmented, self._path_scales(sample_ids, epochs, batch.images.device)

    def _path_scales(self, sample_ids: np.ndarray, epochs: np.ndarray, device: torch.device) -> Tensor | None:
        if not self.model.drop_path:
            return None
        depth = len(self.model.blocks)
        words = random_words(self.config.train.seed, epochs, sample_ids, Stream.DROP_PATH, 2 * depth)
        uniform = to_device(to_unit(words).T.reshape(depth, 2, -1), device)
        scales = scales_of(uniform, self.model.drop_path)
        scales[: self._frozen_blocks] = 1  # nothing learns to do without them
        return scales

    def blank(self, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
        """As :class:`fastmae.train.task.Task`."""
        model = self.model
        images = torch.zeros(batch_size, model.in_chans, *model.img_size, device=device)
        targets = torch.full((batch_size, model.num_classes), 1 / model.num_classes, device=device)
        scales = torch.ones(len(model.blocks), 2, batch_size, device=device) if model.drop_path else None
        return images, targets, scales

    def loss(self, forward: Callable[..., Any], *inputs: Any) -> Tensor:
        """As :class:`fastmae.train.task.Task`."""
        images, targets, scales = inputs
        return F.cross_entropy(forward(images, path_scales=scales).float(), targets)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As :class:`fastmae.train.task.Task`: :func:`layer_groups`."""
        return layer_groups(self.model, self.config.train.weight_decay, self.config.train.layer_decay)

    def flops(self, batch_size: int) -> int:
        """As :class:`fastmae.train.task.Task`."""
        return count_classifier_flops(self.model.architecture, batch_size, self.frozen)


# ---------------------------------------------------------------------------------------------------------------------
# Callbacks


class WeightAverage(Callback):
    """An exponential moving average of the trained weights.

    Args:
        decay: at most; after t steps it is (1 + t) / (10 + t) while that is smaller, as in TensorFlow, with which the
            paper was made.
        name: of the state in checkpoints.
    """

    def __init__(self, decay: float, name: str) -> None:
        self._decay, self.state_name = decay, name

    def attach(self, trainer: Any) -> None:
        self._weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        self._average = {name: parameter.detach().clone() for name, parameter in self._weights.items()}

    @torch.no_grad()
    def after_step(self, trainer: Any) -> None:
        decay = min(self._decay, (1 + trainer.step) / (10 + trainer.step))
        torch._foreach_lerp_(list(self._average.values()), list(self._weights.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has the average of its weights."""
        trained = {name: parameter.detach().clone() for name, parameter in self._weights.items()}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._weights.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the parameters' names."""
        return self._average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from whole tensors."""
        for name, own in self._average.items():
            value = state[name].to(own.device)
            if isinstance(own, DTensor):
                value = distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
            own.copy_(value)


class Accuracy(EveryEpochs):
    """Every ``--report.test-every-epochs`` and at the end: accuracy on the test images.

    Args:
        images: in an epoch.
        tests: the images, classes by the numbers of the model's outputs.
        average: what is tested instead of the weights, or None.

    Attributes:
        values: what the last test found.
    """

    def __init__(
        self, config: ClassifierConfig, images: int, tests: LabelledImages, average: WeightAverage | None
    ) -> None:
        super().__init__(config.report.test_every_epochs, Fraction(images, config.train.global_batch_size))
        self._config, self._tests, self._average, self.values = config, tests, average, {}

    def evaluate(self, trainer: Any) -> None:
        data, ranks, model, tests = self._config.data, trainer.ranks, trainer.model, self._tests
        options = {"dtype": trainer.dtype, "batch_size": trainer.batch_size, "num_threads": data.num_threads}
        options |= {"timeout": data.timeout, "crop_ratio": data.crop_ratio, "encode": model}
        options |= {"rank": ranks.rank, "world_size": ranks.size}
        options["on_batch"] = lambda: trainer.watchdog.at("classifying test images")  # may take minutes on a CPU
        most = min(_TOP, model.num_classes)
        with self._average.applied() if self._average else nullcontext():
            ids = tests.sample_ids
            best, good = encode_images(model, tests.dataset, ids, lambda t: t.topk(most).indices, **options)
        labels = torch.from_numpy(tests.labels[ranks.rank :: ranks.size]).to(best.device)
        hits = (best == labels[:, None])[good]
        sums = torch.stack([hits[:, 0].sum(), hits.sum(), good.sum()]).double()
        right, right5, images = (trainer.parallelism.mean(sums) * ranks.size).tolist()
        if not images:
            raise ValueError(f"--data.val: none of the {len(tests.labels)} images to test on could be read")
        self.values = {"top1": right / images}
        if model.num_classes > _TOP:
            self.values["top5"] = right5 / images
        trainer.reporter.evaluation(trainer.step, self.values)
        self.values["val_images"] = round(images)
