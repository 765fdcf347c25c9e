"""Where the time of one image goes in a loader: its stages in one thread, one image after the other, each timed in
processor time, which a busy machine disturbs less.

Stages are those that an image passes through in the loader itself. Pillow reads while it decodes; ours mirror while
they write the resized crop into the batch. What a loader does beyond its stages (plan, wake threads, pass batches
between processes) is the difference to the processor time of the whole loader, which bench_data.py takes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import loaders
import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from fastmae.data import Dataset
from fastmae.data.decode import decode, resize_crop_into

COUNT = 128
STAGED = ("pillow-uint8", "fastmae-torch", "fastmae-dali")


class Stages:
    """The first images of an epoch through one loader's stages.

    Args:
        who: one of ``STAGED``.
        dataset: where the images come from; files in a folder for Pillow.
        plan: their crops.
    """

    def __init__(self, who: str, dataset: Dataset, plan: loaders.Plan):
        self.dataset, self.size = dataset, plan.size
        self.ids, self.boxes, self.flips = (array[0, :COUNT] for array in (plan.ids, plan.boxes, plan.flips))
        self.orientations = dataset.rows(self.ids)["orientation"]
        self.out = np.empty((len(self.ids), *self.size, 3), np.uint8)
        self.rounds: list[dict[str, float]] = []
        self._run = {"pillow-uint8": self._pillow, "fastmae-torch": self._torch, "fastmae-dali": self._dali}[who]
        self._crops = _DaliCrops(len(self.ids)) if who == "fastmae-dali" else None

    def __call__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._run()
        self.rounds.append(self._seconds)

    @property
    def count(self) -> int:
        """Images a call."""
        return len(self.ids)

    def facts(self, rounds: int) -> dict:
        """Microseconds an image by stage, medians over the last rounds."""
        kept = self.rounds[-rounds:]
        scale = 1e6 / len(self.ids)
        return {"stages_us": {k: round(statistics.median(r[k] for r in kept) * scale, 1) for k in kept[0]}}

    def _timed(self, stage: str, call: Callable, *args):
        begun = time.process_time()
        result = call(*args)
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.process_time() - begun
        return result

    def _pillow(self) -> None:
        tensors = []
        for number, box, flip in zip(self.ids, self.boxes, self.flips, strict=True):
            image = self._timed("decode", _open_with_pillow, self.dataset.path(int(number)))
            image = self._timed("crop copy", tvf.crop, image, *map(int, box))
            image = self._timed("resize", tvf.resize, image, list(self.size), InterpolationMode.BICUBIC)
            tensors.append(self._timed("hand over", _flip_to_bytes, image, flip))
        for start in range(0, len(tensors), 64):
            self._timed("hand over", default_collate, tensors[start : start + 64])

    def _torch(self) -> None:
        for j, (number, orientation) in enumerate(zip(self.ids, self.orientations, strict=True)):
            encoded = self._timed("read", self.dataset.read, int(number))
            pixels = self._timed("decode", decode, encoded, int(orientation))
            top, left, height, width = self.boxes[j]
            crop = self._timed("crop copy", np.ascontiguousarray, pixels[top : top + height, left : left + width])
            self._resize(j, crop)

    def _dali(self) -> None:
        encoded = [self._timed("read", self.dataset.read, int(number)) for number in self.ids]
        crops = self._timed("decode", self._crops, encoded, self.boxes)
        for j in range(len(self.ids)):
            self._resize(j, self._timed("crop copy", lambda j=j: np.asarray(crops[j])))

    def _resize(self, j: int, crop: np.ndarray) -> None:
        box = np.array([0, 0, *crop.shape[:2]])
        self._timed("resize", resize_crop_into, self.out[j], crop, box, (self.flips[j], False))


class _DaliCrops:
    """DALI's decoding of crops on the CPU, in one thread, from bytes that are in memory."""

    def __init__(self, count: int):
        import nvidia.dali.fn as fn
        import nvidia.dali.types as types
        from nvidia.dali import Pipeline

        self._pipeline = Pipeline(count, 1, None, prefetch_queue_depth=1, exec_async=False, exec_pipelined=False)
        with self._pipeline:
            encoded = fn.external_source(name="encoded", batch=True, no_copy=True)
            anchors, shapes = (fn.external_source(name=name, batch=True) for name in ("anchors", "shapes"))
            self._pipeline.set_outputs(
                fn.decoders.image_slice(
                    encoded, anchors, shapes, axis_names="HW", normalized_anchor=False, normalized_shape=False,
                    output_type=types.RGB, adjust_orientation=True, device="cpu",
                )
            )  # fmt: skip
        self._pipeline.build()

    def __call__(self, encoded: list[np.ndarray], boxes: np.ndarray):
        self._pipeline.feed_input("encoded", encoded)
        self._pipeline.feed_input("anchors", boxes[:, :2].astype(np.int32))
        self._pipeline.feed_input("shapes", boxes[:, 2:].astype(np.int32))
        (crops,) = self._pipeline.run()
        return crops


def _open_with_pillow(path: str) -> Image.Image:
    with Path(path).open("rb") as file:
        return Image.open(file).convert("RGB")


def _flip_to_bytes(image: Image.Image, flip: bool) -> torch.Tensor:
    return tvf.pil_to_tensor(tvf.hflip(image) if flip else image)
