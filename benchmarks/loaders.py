"""The loaders that are compared: fastmae's, facebookresearch/mae's, WebDataset's, bare DALI's on a GPU.

All of them make the same crops. fastmae's plan (order, boxes, flips) is drawn once for a few epochs and given to the
others as a table, so that drawing boxes costs them nothing. WebDataset reads its shards in its own order and looks a
sample's box up by name, the n-th box when it meets the sample for the n-th time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import functional as tvf

from fastmae.data import Dataset, create_loader
from fastmae.model import IMAGENET_MEAN, IMAGENET_STD

EPOCHS = 8
_BICUBIC = transforms.InterpolationMode.BICUBIC
_TO_BYTES = transforms.PILToTensor()
_TO_FLOATS = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


class Plan(NamedTuple):
    """Crops of some epochs, by epoch and position.

    Attributes:
        ids: int64 (epochs, n), the samples in their order.
        boxes: int64 (epochs, n, 4), top, left, height, width.
        flips: bool (epochs, n), left and right.
        size: height and width of the crops.
    """

    ids: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    size: tuple[int, int]

    def by_id(self) -> Plan:
        """The same with the samples of each epoch in the order of their numbers."""
        order = self.ids.argsort(1)
        boxes = np.take_along_axis(self.boxes, order[..., None], 1)
        return Plan(np.sort(self.ids, 1), boxes, np.take_along_axis(self.flips, order, 1), self.size)


def draw_plan(dataset: Dataset, size: tuple[int, int], seed: int, epochs: int = EPOCHS) -> Plan:
    """What fastmae's loaders will crop in the first epochs."""
    with create_loader(dataset, loader="torch", batch_size=len(dataset), img_size=size, seed=seed) as loader:
        plans = [loader.plan(epoch) for epoch in range(epochs)]
    arrays = (np.stack([getattr(plan, name) for plan in plans]) for name in ("sample_ids", "boxes", "flips"))
    ids, boxes, flips = arrays
    return Plan(ids, boxes, flips[..., 0], size)


def pillow_crop(image: Image.Image, box: np.ndarray, flip: bool, size: tuple[int, int], floats: bool) -> Tensor:
    """The transform of facebookresearch/mae, its random numbers given: (3, H, W), normalised if ``floats``."""
    image = tvf.resized_crop(image, *map(int, box), list(size), _BICUBIC)
    if flip:
        image = tvf.hflip(image)
    return (_TO_FLOATS if floats else _TO_BYTES)(image)


class PillowImages(torch.utils.data.Dataset):
    """Files opened, decoded and cropped by Pillow, as ``ImageFolder`` with facebookresearch/mae's transform does."""

    def __init__(self, paths: Sequence[str], plan: Plan, floats: bool):
        self.paths, self.floats, self.size = paths, floats, plan.size
        self.rows = plan.ids.reshape(-1), plan.boxes.reshape(-1, 4), plan.flips.reshape(-1)

    def __len__(self) -> int:
        return len(self.rows[0])

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        number, box, flip = (row[position] for row in self.rows)
        with Path(self.paths[number]).open("rb") as file:
            image = Image.open(file).convert("RGB")
        return pillow_crop(image, box, flip, self.size, self.floats), int(number)


def pillow_loader(dataset: Dataset, plan: Plan, batch_size: int, workers: int, floats: bool) -> Iterator:
    """An endless iterator over a ``DataLoader`` with one worker process a core."""
    images = PillowImages([dataset.path(i) for i in range(len(dataset))], plan, floats)
    positions = itertools.cycle(range(len(images)))
    pinned = torch.cuda.is_available()
    return iter(DataLoader(images, batch_size, sampler=positions, num_workers=workers, pin_memory=pinned))


class _CropByName:
    """WebDataset's transform: looks a sample's box up by its name."""

    def __init__(self, numbers: dict[str, int], plan: Plan):
        self.numbers, self.plan, self.met = numbers, plan.by_id(), {}

    def __call__(self, sample: dict) -> tuple[Tensor, int]:
        number = self.numbers[sample["__key__"]]
        turn = self.met.get(number, 0)
        self.met[number] = turn + 1
        turn %= len(self.plan.ids)
        image = next(value for value in sample.values() if isinstance(value, Image.Image))
        box, flip = self.plan.boxes[turn, number], self.plan.flips[turn, number]
        return pillow_crop(image, box, flip, self.plan.size, floats=False), number


def webdataset_loader(dataset: Dataset, shards: Path, plan: Plan, batch_size: int, workers: int) -> Iterator:
    """An endless iterator over a WebDataset pipeline as its documentation has it: shuffle, decode to Pillow, crop.

    Args:
        dataset: the shards as fastmae numbers them, ``shard.tar::member``.
        shards: the folder that they lie in; at least as many as workers.
    """
    import webdataset

    # WebDataset cuts a member's name at the first dot behind the last slash; the rest is the name of the field.
    names = (Path(dataset.path(i).rpartition("::")[2]) for i in range(len(dataset)))
    numbers = {str(name.parent / name.name.partition(".")[0]): i for i, name in enumerate(names)}
    images = webdataset.WebDataset([str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=100, seed=0)
    images = images.repeat().shuffle(500).decode("pil").map(_CropByName(numbers, plan))
    pinned = torch.cuda.is_available()
    return iter(webdataset.WebLoader(images, batch_size=batch_size, num_workers=workers, pin_memory=pinned))


def to_device(batches: Iterator, device: torch.device) -> Iterator[Tensor]:
    """The images of each batch, where the model wants them."""
    for images, *_ in batches:
        yield images.to(device, non_blocking=True)


def bare_dali(dataset: Dataset, plan: Plan, batch_size: int, threads: int, hardware: float | None) -> Iterator[Tensor]:
    """A DALI pipeline on the GPU with nothing around it: nvJPEG decoding of crops, resize and mirror.

    Args:
        hardware: share of a batch that the hardware JPEG engine is to decode; None for DALI's default.
    """
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali import Pipeline
    from nvidia.dali.plugin.pytorch import feed_ndarray

    paths = [np.frombuffer(dataset.path(i).encode(), np.uint8) for i in range(len(dataset))]
    rows = (plan.ids.reshape(-1), plan.boxes.reshape(-1, 4).astype(np.int32), plan.flips.reshape(-1).astype(np.int32))
    starts = itertools.cycle(range(0, len(rows[0]) - batch_size + 1, batch_size))

    def feed():
        start = next(starts)
        ids, boxes, flips = (row[start : start + batch_size] for row in rows)
        return [paths[i] for i in ids], boxes[:, :2], boxes[:, 2:], flips

    pipeline = Pipeline(batch_size, threads, torch.cuda.current_device(), prefetch_queue_depth=2)
    with pipeline:
        names, anchors, shapes, mirrored = fn.external_source(feed, num_outputs=4, batch=True)
        images = fn.decoders.image_slice(
            fn.io.file.read(names), anchors, shapes, axis_names="HW", normalized_anchor=False, normalized_shape=False,
            output_type=types.RGB, device="mixed", **({} if hardware is None else {"hw_decoder_load": hardware}),
        )  # fmt: skip
        images = fn.resize(images, size=plan.size, interp_type=types.INTERP_CUBIC, antialias=True)
        pipeline.set_outputs(fn.flip(images, horizontal=mirrored))
    pipeline.build()
    while True:
        (images,) = pipeline.run()
        out = torch.empty(batch_size, *plan.size, 3, dtype=torch.uint8, device="cuda")
        feed_ndarray(images.as_tensor(), out, cuda_stream=torch.cuda.current_stream())
        yield out.permute(0, 3, 1, 2)
