"""What is trained. The trainer knows steps, processes, checkpoints and logs; a task knows batches, their loss and which
parameters learn how. Whoever trains something else writes a task and inherits the rest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastmae import ops
from fastmae.data import Augment, Batch, LateBad
from fastmae.train.config import PretrainConfig
from fastmae.train.flops import count_flops
from fastmae.train.optim import parameter_groups
from fastmae.train.ranks import Ranks
from fastmae.train.rules import progressive_sizes


class Task(Protocol):
    """What the trainer asks of a task: the bare model; a data set that has a length, a ``hash`` and what
    :class:`~fastmae.train.bad_files.BadFiles` reads; images that a step decodes, on all ranks together."""

    model: nn.Module
    dataset: Any
    samples_per_step: int

    def begin(self, total_steps: int) -> None:
        """Learn the run's length, before the first loader is opened and whenever it changes."""

    def open_loader(
        self, position: int, batch_size: int, *, ranks: Ranks, device: torch.device, known_bad: Sequence[LateBad]
    ) -> Any:
        """A loader of this rank's share of the batches, from a position in the order of all ranks' images on.

        Args:
            batch_size: masked images of this rank in one forward pass.
            known_bad: files found bad while training.
        """

    def prepare(self, batch: Batch) -> tuple[Any, ...]:
        """The inputs of a forward pass, on the device. Runs outside of what is compiled or captured in a CUDA graph."""

    def blank(self, batch_size: int, device: torch.device) -> tuple[Any, ...]:
        """Inputs as large as those of ``prepare``, to measure how much memory they take."""

    def loss(self, forward: Callable[..., Any], *inputs: Any) -> Tensor:
        """The loss of prepared inputs: a float32 scalar, the mean over the batch. ``forward`` is the model as it is
        called for training: compiled, in DistributedDataParallel, or bare."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimiser."""

    def flops(self, batch_size: int) -> int:
        """FLOPs of a forward and backward pass of so many images, as large as they are now."""

    def row(self) -> dict[str, Any]:
        """What a row of metrics says of the task."""

    def end(self) -> None:
        """Once, however the training ended."""


class ImageTask:
    """What tasks on images share: the loader, with crops and sizes as the configuration says.

    ``create_loader`` is ``fastmae.data.create_loader`` or something of its signature.
    """

    def __init__(self, config: Any, model: nn.Module, dataset: Any, create_loader: Callable[..., Any]) -> None:
        self.config, self.model, self.dataset, self._create_loader = config, model, dataset, create_loader
        self.samples_per_step = config.train.global_batch_size // config.train.masks_per_image
        self.resolution = Resolution((model.img_size,))

    def begin(self, total_steps: int) -> None:
        """As :class:`Task`; raises ValueError if there are more image sizes than passes over the images."""
        if self.config.data.progressive_sizes:
            self.resolution = create_resolution(self.config, total_steps, len(self.dataset))

    def open_loader(
        self, position: int, batch_size: int, *, ranks: Ranks, device: torch.device, known_bad: Sequence[LateBad]
    ) -> Any:
        data, train = self.config.data, self.config.train
        augment = ("crop", "scale", "ratio", "hflip", "vflip", "color_jitter")
        return self._create_loader(
            self.dataset,
            loader=data.loader,
            batch_size=batch_size // train.masks_per_image,
            img_size=self.resolution if data.progressive_sizes else self.model.img_size,
            seed=train.seed,
            position=position,
            rank=ranks.rank,
            world_size=ranks.size,
            device=device,
            augment=Augment(**{name: getattr(data, name) for name in augment}),
            num_threads=data.num_threads,
            prefetch=data.prefetch,
            timeout=data.timeout,
            known_bad=known_bad,
            limit_bad=False,  # the trainer judges the finds of all ranks
            samples_per_step=self.samples_per_step,
        )

    def row(self) -> dict[str, Any]:
        """As :class:`Task`."""
        return {}

    def end(self) -> None:
        """As :class:`Task`."""


class MaskedAutoencoding(ImageTask):
    """Pretraining of a masked autoencoder: masks that depend on nothing but seed, epoch and image, pixel loss."""

    def __init__(
        self, config: PretrainConfig, model: nn.Module, dataset: Any, create_loader: Callable[..., Any]
    ) -> None:
        super().__init__(config, model, dataset, create_loader)
        self.target = config.target()

    def prepare(self, batch: Batch) -> tuple[Any, ...]:
        """Images and masks, and the targets if they are not pixels; the model takes on the size of the images."""
        size = tuple(batch.images.shape[-2:])
        if size != self.model.input_size:
            self.model.set_input_size(size)
        masking = ops.random_masking(
            len(batch.images),
            self.model.num_patches,
            self.config.model.mask_ratio,
            seed=self.config.train.seed,
            epoch=batch.epochs,
            sample_ids=batch.sample_ids,
            strategy=self.config.model.mask_strategy,
            grid_size=self.model.grid_size,
            masks_per_image=self.config.train.masks_per_image,
        )
        return self._inputs(batch.images, masking)

    def _inputs(self, loaded: Tensor, masking: ops.Masking) -> tuple[Any, ...]:
        images = self.model.normalized(loaded)
        if self.target is None:
            return images, masking
        ids = masking.ids_mask
        if self.config.model.loss_on_all_patches:
            ids = torch.arange(self.model.num_patches, device=ids.device).repeat(len(ids), 1)
        self.target = self.target.to(loaded.device)  # once: a copy in each step would make the host wait
        with torch.no_grad():
            return images, masking, self.target(self.model, loaded, ids)

    def blank(self, batch_size: int, device: torch.device) -> tuple[Any, ...]:
        """As :class:`Task`: black images, ``batch_size`` masks."""
        masks, model = self.config.train.masks_per_image, self.config.model
        dtype = torch.uint8 if self.config.data.value_range is None else torch.float32
        shape = batch_size // masks, model.in_chans, *self.config.img_size
        options = {"seed": 0, "masks_per_image": masks, "device": device}
        masking = ops.random_masking(shape[0], self.model.num_patches, model.mask_ratio, **options)
        return self._inputs(torch.zeros(shape, dtype=dtype, device=device), masking)

    def loss(self, forward: Callable[..., Any], *inputs: Any) -> Tensor:
        """As :class:`Task`; predictions are made for masked patches only."""
        images, masking, *targets = inputs
        named = {"targets": targets[0]} if targets else {}
        return forward(images, masking=masking, full_pred=False, **named).loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As :class:`Task`: biases and norms do not decay."""
        train = self.config.train
        return parameter_groups(self.model, train.weight_decay, matrices=train.optimizer == "muon")

    def flops(self, batch_size: int) -> int:
        """As :class:`Task`; ``batch_size`` counts masked images."""
        architecture = self.model.architecture | {"img_size": self.model.input_size}
        return count_flops(architecture, batch_size, self.config.model.mask_ratio)

    def row(self) -> dict[str, Any]:
        """As :class:`Task`: the size of the images where it changes."""
        names = ("input_height", "input_width")
        return dict(zip(names, self.model.input_size, strict=True)) if self.config.data.progressive_sizes else {}

    def end(self) -> None:
        """As :class:`Task`: the model takes images of its own size again."""
        self.model.set_input_size()


@dataclass(frozen=True)
class Resolution:
    """Image sizes of a run, each with the epoch that it starts with: a pure function, so that resuming needs no state.

    DailyMAE (Wu et al., arXiv 2404.00509; public code FastSSL) trains with 160, 192 and 224 pixels in turn, the mask
    ratio unchanged, over a ramp of epochs that is given by hand. Here each size gets an equal share of the run.
    """

    sizes: tuple[tuple[int, int], ...]
    starts: tuple[int, ...] = (0,)

    def __call__(self, epoch: int) -> tuple[int, int]:
        """The size of an epoch's images; epochs are passes over the images, counted from 0."""
        return self.sizes[bisect_right(self.starts, epoch) - 1]

    def __str__(self) -> str:
        parts = (f"{h}x{w} from pass {start}" for (h, w), start in zip(self.sizes, self.starts, strict=True))
        return ", ".join(parts)


def create_resolution(config: PretrainConfig, total_steps: int, num_samples: int) -> Resolution:
    """The sizes of a run over ``num_samples`` images; raises ValueError if there are more of them than passes."""
    sizes = progressive_sizes(config.data.progressive_sizes, config.img_size) or (config.img_size,)
    decoded = total_steps * (config.train.global_batch_size // config.train.masks_per_image)
    share = Fraction(decoded, num_samples * len(sizes))
    if len(sizes) > 1 and share < 1:
        raise ValueError(
            f"--data.progressive-sizes: expected at least one pass over the {num_samples:,} images for each size, got "
            f"{len(sizes)} sizes for a run of {decoded / num_samples:.3g} passes"
        )
    return Resolution(sizes, tuple(int(share * i + Fraction(1, 2)) for i in range(len(sizes))))
