"""The loaders that are compared: fastmae's, facebookresearch/mae's, WebDataset's, nvImageCodec's, bare DALI's on a GPU.

All of them make the same crops. fastmae's order, boxes and flips are drawn once for a few epochs and given to the
others as a table, so that drawing boxes costs them nothing. WebDataset reads its shards in its own order and looks a
sample's box up by name, the n-th box when it meets the sample for the n-th time.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import functional as tvf

from fastmae.data import Augment, Dataset, crop_boxes, fixed_crops, flips, open_dataset
from fastmae.model import IMAGENET_MEAN, IMAGENET_STD

_TO_BYTES = transforms.PILToTensor()
_TO_FLOATS = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def write_photographs(folder: Path, count: int) -> None:
    """JPEGs of ImageNet's usual size and, with little loss, its detail: crops of the embedded photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    photographs, chunk = open_dataset(None), 128

    def write(index: int, pixels: Tensor) -> None:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{index:05}.jpg", quality=97)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, count, chunk):
            number = min(chunk, count - start)
            crops = fixed_crops(photographs, (375, 500), seed=0, epoch=start, count=number)
            list(pool.map(write, range(start, start + number), crops))


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


def draw_plan(dataset: Dataset, size: tuple[int, int], seed: int, epochs: int = 8) -> Plan:
    """What fastmae's loaders crop in the first epochs."""
    n = len(dataset)
    ids, epoch = dataset.order(seed).ids(np.arange(epochs * n))
    keys = {"seed": seed, "augment": Augment()}
    boxes = crop_boxes(ids, epoch, *dataset.shapes(ids), **keys)
    mirrored = flips(ids, epoch, **keys)[:, 0]
    return Plan(ids.reshape(epochs, n), boxes.reshape(epochs, n, 4), mirrored.reshape(epochs, n), size)


# --- One image --------------------------------------------------------------------------------------------------------


def pillow_crop(image: Image.Image, box: np.ndarray, flip: bool, size: tuple[int, int], floats: bool) -> Tensor:
    """The transform of facebookresearch/mae, its random numbers given: (3, H, W), normalised if ``floats``."""
    image = tvf.resized_crop(image, *map(int, box), list(size), transforms.InterpolationMode.BICUBIC)
    return (_TO_FLOATS if floats else _TO_BYTES)(tvf.hflip(image) if flip else image)


def pillow(path: str, box: np.ndarray, flip: bool, size: tuple[int, int], floats: bool = False) -> Tensor:
    with Path(path).open("rb") as file:
        return pillow_crop(Image.open(file).convert("RGB"), box, flip, size, floats)


def pillow_float(path: str, box: np.ndarray, flip: bool, size: tuple[int, int]) -> Tensor:
    return pillow(path, box, flip, size, floats=True)


@cache
def _decoder():
    from nvidia import nvimgcodec

    cpu = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
    return nvimgcodec.Decoder(nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=cpu)


def nvimgcodec_crop(path: str, box: np.ndarray, flip: bool, size: tuple[int, int]) -> Tensor:
    """nvImageCodec decodes the box alone, on the CPU; torch resizes bytes."""
    from nvidia import nvimgcodec

    top, left, height, width = map(int, box)
    region = nvimgcodec.Region(top, left, top + height, left + width)
    stream = nvimgcodec.CodeStream(Path(path).read_bytes()).get_sub_code_stream(region=region)
    crop = torch.from_numpy(np.asarray(_decoder().decode(stream))).permute(2, 0, 1)
    crop = torch.nn.functional.interpolate(crop[None], size, mode="bicubic", antialias=True)[0]
    return crop.flip(2) if flip else crop


# --- Endless iterators of batches -------------------------------------------------------------------------------------


class Crops(torch.utils.data.Dataset):
    """Files opened and cropped by a function of path, box, flip and size, as ``ImageFolder`` opens them."""

    def __init__(self, paths: list[str], plan: Plan, crop: Callable[..., Tensor]):
        self.paths, self.crop, self.size = paths, crop, plan.size
        self.rows = plan.ids.reshape(-1), plan.boxes.reshape(-1, 4), plan.flips.reshape(-1)

    def __len__(self) -> int:
        return len(self.rows[0])

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        number, box, flip = (row[position] for row in self.rows)
        return self.crop(self.paths[number], box, flip, self.size), int(number)


def data_loader(dataset: Dataset, plan: Plan, batch_size: int, workers: int, crop: Callable[..., Tensor]) -> Iterator:
    """PyTorch's ``DataLoader`` with one worker process per core."""
    images = Crops([dataset.path(i) for i in range(len(dataset))], plan, crop)
    positions, pinned = itertools.cycle(range(len(images))), torch.cuda.is_available()
    return iter(DataLoader(images, batch_size, sampler=positions, num_workers=workers, pin_memory=pinned))


class _CropByName:
    """WebDataset's transform: looks a sample's box up by its name."""

    def __init__(self, numbers: dict[str, int], plan: Plan):
        self.numbers, self.plan, self.met = numbers, plan.by_id(), dict.fromkeys(numbers.values(), 0)

    def __call__(self, sample: dict) -> tuple[Tensor, int]:
        number = self.numbers[sample["__key__"]]
        epoch = self.met[number] % len(self.plan.ids)
        self.met[number] += 1
        image = next(value for value in sample.values() if isinstance(value, Image.Image))
        box, flip = self.plan.boxes[epoch, number], self.plan.flips[epoch, number]
        return pillow_crop(image, box, flip, self.plan.size, floats=False), number


def webdataset_loader(dataset: Dataset, shards: Path, plan: Plan, batch_size: int, workers: int) -> Iterator:
    """A WebDataset pipeline as its documentation has it: shuffle, decode to Pillow, crop.

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
