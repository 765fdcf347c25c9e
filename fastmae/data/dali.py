"""A loader on NVIDIA DALI, told what to do sample by sample.

DALI decodes; which samples, which boxes and which flips come from the plan, and the files' bytes from the data set,
through ``fn.external_source``. With a GPU, DALI also resizes, mirrors and changes colours there. Without one it stops
at the decoded crops, because PyTorch's uint8 resize is twice as fast as DALI's on a CPU.

An image that DALI refuses makes its pipeline invalid, and the error often does not say which image it was. So on an
error the step's samples are looked at one by one, those that may be at fault are remembered, and the pipeline is built
again at the same step, which takes milliseconds. Whenever such a sample comes again, DALI is first asked about it
alone, and if it refuses, the sample is decoded on the host instead: it is bad only if the host refuses it too, and then
another takes its place, as in the torch loader.

DALI reads no more of a JPEG than the crop needs, so damage below a crop passes unseen. What a batch holds must not
depend on what was found earlier: a run that is continued from a checkpoint would otherwise differ from one that never
stopped, and so would ranks that have seen different samples. Hence DALI's answer for this very crop decides each time,
which is a function of the position alone; what is remembered only saves the pipeline.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from io import BytesIO
from typing import NamedTuple

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline
from PIL import Image

from fastmae.data.batch import Batch, Plan, Planner
from fastmae.data.dataset import Dataset
from fastmae.data.decode import UndecodableImage
from fastmae.data.errors import DataError
from fastmae.data.formats import MODES, stored_size
from fastmae.data.loader import Loader

_COLORS = ("brightness", "contrast", "saturation", "hue")
_NO_JITTER = (1.0, 1.0, 1.0, 0.0)
_LOOKED_AT = 4096
_MOST_SIDE = 4096
_DEVICE_PADDING, _HOST_PADDING = 16 << 20, 8 << 20
logger = logging.getLogger(__name__)
_MAX_FAILURES = 10
_DEPTH = 2
"""Batches inside the pipeline: one being decoded while the one before is taken out."""
_BLANK_BOX = np.array([0, 0, 1, 1])


def input_names(finished: bool, jitter: bool) -> list[str]:
    """The inputs of a pipeline that gives crops, or finished images with or without colour jitter."""
    names = ["encoded", "anchors", "shapes"]
    if finished:
        names += ["sizes", "left_right", "top_bottom", *(_COLORS if jitter else ())]
    return names


def input_values(plan: Plan, encoded: list[np.ndarray]) -> dict[str, list[np.ndarray] | np.ndarray]:
    """All inputs for a batch: its files' bytes, and its plan as DALI wants it."""
    jitter = np.tile(_NO_JITTER, (len(encoded), 1)) if plan.jitter is None else plan.jitter
    brightness, contrast, saturation, turn = np.ascontiguousarray(jitter.T, np.float32)
    return {
        "encoded": encoded,
        "anchors": plan.boxes[:, :2].astype(np.int32),
        "shapes": plan.boxes[:, 2:].astype(np.int32),
        "sizes": np.tile(np.float32(plan.img_size), (len(encoded), 1)),
        "left_right": plan.flips[:, 0].astype(np.int32),
        "top_bottom": plan.flips[:, 1].astype(np.int32),
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
        "hue": 360 * turn,
    }


def decoded_crops(inputs: Mapping, device: str, hints: Mapping):
    """Decode the plan's boxes: uint8 (height, width, 3) each.

    Args:
        inputs: data nodes by name.
        device: ``"cpu"``, or ``"mixed"`` for decoding on the GPU.
        hints: further arguments for the decoder.
    """
    return fn.decoders.image_slice(
        inputs["encoded"],
        inputs["anchors"],
        inputs["shapes"],
        axis_names="HW",
        normalized_anchor=False,
        normalized_shape=False,
        output_type=types.RGB,
        # The boxes are those of upright images, and so must be DALI's idea of the image.
        adjust_orientation=True,
        device=device,
        **hints,
    )


def finished_images(crops, inputs: Mapping):
    """Resize crops (bicubic, antialiased), mirror them and change their colours, wherever the crops are.

    Colours differ a little from those of ``augment.jitter_into``: DALI applies all four factors at once, turns contrast
    around mid-grey instead of the image's mean, and hue in a linear space instead of HSV.
    """
    images = fn.resize(crops, size=inputs["sizes"], interp_type=types.INTERP_CUBIC, antialias=True)
    images = fn.flip(images, horizontal=inputs["left_right"], vertical=inputs["top_bottom"])
    if "hue" in inputs:
        images = fn.color_twist(images, **{name: inputs[name] for name in _COLORS})
    return images


def decoder_hints(dataset: Dataset, hw_decoder_load: float) -> dict[str, float | int]:
    """Arguments for DALI's ``mixed`` decoder.

    The largest height, width and file among 4,096 images, evenly spread over the index; sides count up to 4,096 pixels,
    for the decoder keeps such a buffer for each thread. Whatever is larger costs an allocation when it comes.

    Args:
        dataset: the images.
        hw_decoder_load: the share of the JPEG files for the hardware decoder, if there is one.
    """
    rows = dataset.rows(np.linspace(0, len(dataset) - 1, min(len(dataset), _LOOKED_AT)).astype(np.int64))
    height, width = (min(int(rows[side].max()), _MOST_SIDE) for side in ("height", "width"))
    return {
        "hw_decoder_load": hw_decoder_load,
        "preallocate_height_hint": height,
        "preallocate_width_hint": width,
        "device_memory_padding": max(_DEVICE_PADDING, 3 * height * width),
        "host_memory_padding": max(_HOST_PADDING, min(int(rows["size"].max()), 3 * height * width)),
    }


class _Fed(NamedTuple):
    """A batch inside the pipeline.

    Attributes:
        plan: what it is made of.
        on_host: bool (n,), samples in whose place DALI got a blank image.
    """

    plan: Plan
    on_host: np.ndarray


class DaliLoader(Loader):
    """Decodes with DALI: on the CPU, or with nvJPEG where ``device`` is a GPU.

    Args:
        planner: what the batches are made of.
        hw_decoder_load: with a GPU, the share of JPEG files for the hardware decoder, if there is one.
        options: of ``Loader``.
    """

    kind = "dali"

    def __init__(self, planner: Planner, *, hw_decoder_load: float = 0.65, **options):
        super().__init__(planner, **options)
        self._fed: deque[_Fed] = deque()
        self._pipeline: Pipeline | None = None
        self._single: Pipeline | None = None
        self._suspects = set(self._late)
        self._failures = 0
        self._stream = torch.cuda.Stream(self.device) if self._on_gpu else None
        self._hints = decoder_hints(self.dataset, hw_decoder_load) if self._on_gpu else {}

    def describe(self) -> str:
        where = "the CPU"
        if self._on_gpu:
            largest = f"{self._hints['preallocate_height_hint']} x {self._hints['preallocate_width_hint']}"
            where = f"{self.device} (memory for {largest} pixels)"
        return f"DALI loader, decoding on {where}: {self.options.describe()}"

    def close(self) -> None:
        super().close()
        if not self._producers.alive:  # or a thread hangs in it
            self._pipeline = self._single = None

    def produce(self, step: int) -> Batch:
        while True:
            if self._pipeline is None:
                self._fed.clear()
                self._pipeline = self._build(step)
            try:
                (crops,) = self._pipeline.run()
                if self._fed[0].plan.error is not None:
                    raise self._fed[0].plan.error
                batch = self._deliver(*self._fed[0], crops)
            except RuntimeError as error:
                if self._fed:
                    fed = self._fed[0]
                else:
                    plan = self.plan(step)
                    fed = _Fed(plan, np.ones(len(plan.positions), bool))
                self._pipeline = None
                if fed.plan.error is not None:
                    raise fed.plan.error from error
                if self._find_suspects(*fed):
                    continue
                return self._make_on_host(fed.plan, error)
            self._fed.popleft()
            self._failures = 0
            return batch

    def _build(self, step: int) -> Pipeline:
        names = input_names(self._on_gpu, self.planner.augment.color_jitter > 0)
        feed = _feed(weakref.ref(self), self.batch_size, self._fed, step, names)
        device_id = self.device.index if self._on_gpu else None
        pipeline = Pipeline(self.batch_size, self.options.num_threads, device_id, prefetch_queue_depth=_DEPTH)
        with pipeline:
            inputs = dict(zip(names, fn.external_source(feed, num_outputs=len(names), batch=True), strict=True))
            images = decoded_crops(inputs, "mixed" if self._on_gpu else "cpu", self._hints)
            pipeline.set_outputs(finished_images(images, inputs) if self._on_gpu else images)
        try:
            pipeline.build()
        except RuntimeError as error:
            raise DataError(f"DALI cannot build its pipeline on {self.device}: {error}") from error
        return pipeline

    def _deliver(self, plan: Plan, on_host: np.ndarray, crops) -> Batch:
        if self._on_gpu:
            from nvidia.dali.plugin.pytorch import feed_ndarray

            # Not DALI's own memory through DLPack: DALI would fill it again as soon as the last reference is gone,
            # while kernels may still read it. The copy takes what a 38 MB batch takes at the memory's speed.
            with torch.cuda.stream(self._stream):
                shape = len(plan.positions), *plan.img_size, 3
                images = torch.empty(shape, dtype=torch.uint8, device=self.device)
                feed_ndarray(crops.as_tensor(), images, cuda_stream=self._stream)
                for j in np.flatnonzero(on_host):
                    image = np.empty(shape[1:], np.uint8)
                    self.render(plan, j, image)
                    images[j] = torch.from_numpy(image)
                self._stream.synchronize()
            return self.finish(plan, images)
        images = self.empty_images(plan)
        out = images.numpy()

        def finish(j: int) -> None:
            if on_host[j]:
                self.render(plan, j, out[j])
                return
            crop = np.asarray(crops[j])  # DALI's own memory; at(j) would be a copy
            self.finish_image(plan, j, crop, np.array([0, 0, *crop.shape[:2]]), out[j])

        self.for_each(finish, len(out))
        return self.finish(plan, images)

    def read_batch(self, plan: Plan) -> tuple[list[np.ndarray], np.ndarray]:
        """The files of a batch, blank images instead of those that DALI must not or cannot decode, and which these are:
        bool (n,).

        DALI 2.4's decoder on the CPU crashes at headers that are none, and with it the process, so that what is left of
        a file must not get there if it does not begin as the index says. And it inverts CMYK without an Adobe marker.
        """
        rows = self.dataset.rows(plan.source_ids)
        sizes = list(zip(rows["height"].tolist(), rows["width"].tolist(), strict=True))
        cmyk = rows["mode"] == MODES.index("CMYK")
        encoded, on_host = [_blank_image()] * len(sizes), np.ones(len(sizes), bool)

        def read(j: int) -> None:
            data = self.read(int(plan.source_ids[j]))
            if stored_size(data) == sizes[j] and not cmyk[j]:
                encoded[j], on_host[j] = data, False

        self.for_each(read, len(sizes))
        for j, source_id in enumerate(plan.source_ids.tolist()):
            if source_id in self._suspects and not on_host[j] and self._refuses(encoded[j], plan.boxes[j]):
                encoded[j], on_host[j] = _blank_image(), True
        return encoded, on_host

    def _find_suspects(self, plan: Plan, on_host: np.ndarray) -> bool:
        """Look for samples that may have failed a batch, other than those known; whether there are any.

        Most are damaged so that the host refuses them as well, which is found in parallel. Only if there is none is
        DALI asked about each: a millisecond per sample, once per damaged file.
        """
        ids = plan.source_ids.tolist()
        new = [j for j, source_id in enumerate(ids) if source_id not in self._suspects and not on_host[j]]
        found: set[int] = set()

        def check(k: int) -> None:
            try:
                self.image(ids[new[k]])
            except UndecodableImage:
                found.add(ids[new[k]])

        self.for_each(check, len(new))
        if not found:
            found = {ids[j] for j in new if self._refuses(self.read(ids[j]), plan.boxes[j])}
            for source_id in sorted(found):
                logger.warning("%s: DALI refuses it, so it is decoded on the host", self.dataset.path(source_id))
        self._suspects |= found
        return bool(found)

    def _refuses(self, encoded: np.ndarray, box: np.ndarray) -> bool:
        """Whether DALI refuses a file, for a crop, if it is asked about nothing else."""
        if self._single is None:
            self._single = Pipeline(1, 1, self.device.index if self._on_gpu else None, prefetch_queue_depth=1)
            with self._single:
                inputs = {name: fn.external_source(name=name) for name in input_names(finished=False, jitter=False)}
                self._single.set_outputs(decoded_crops(inputs, "mixed" if self._on_gpu else "cpu", {}))
            self._single.build()
        top_left, shape = box[:2].astype(np.int32), box[2:].astype(np.int32)
        try:
            for name, value in {"encoded": encoded, "anchors": top_left, "shapes": shape}.items():
                self._single.feed_input(name, [value])
            self._single.run()
        except RuntimeError:
            self._single = None
            return True
        return False

    def _make_on_host(self, plan: Plan, error: RuntimeError) -> Batch:
        """For a step that DALI fails at although it refuses none of its images: once in a while, not all the time."""
        self._failures += 1
        if self._failures > _MAX_FAILURES:
            raise DataError(f"DALI failed at {self._failures} steps in a row: {error}") from error
        logger.warning("DALI cannot make step %d, so it is decoded on the host: %s", plan.step, error)
        images = self.empty_images(plan)
        out = images.numpy()
        self.for_each(lambda j: self.render(plan, j, out[j]), len(out))
        return self.finish(plan, images)


def _feed(
    reference: weakref.ref[DaliLoader],
    batch_size: int,
    fed: deque[_Fed],
    step: int,
    names: list[str],
):
    """DALI's callback: plans one batch a call, notes it, and reads its files. It never raises, because DALI would lose
    the batches that are already under way; it notes the error and hands out a blank image, so that the right step
    fails. (What is no image at all can crash DALI 2.4's decoder on the CPU, and with it the process.)

    Args:
        step: of the first batch.
        names: of the inputs that the pipeline wants.
    """

    def feed():
        nonlocal step
        try:
            loader = reference()
            plan = loader.plan(step)
            encoded, on_host = loader.read_batch(plan)
        except Exception as error:
            plan, encoded, on_host = (
                _failed(step, batch_size, error),
                [_blank_image()] * batch_size,
                np.ones(batch_size, bool),
            )
        fed.append(_Fed(plan, on_host))
        step += 1
        boxes = np.where(on_host[:, None], _BLANK_BOX, plan.boxes)
        inputs = input_values(replace(plan, boxes=boxes), encoded)
        return tuple(inputs[name] for name in names)

    return feed


def _failed(step: int, batch_size: int, error: Exception) -> Plan:
    nothing, boxes = np.zeros(batch_size, np.int64), np.tile(_BLANK_BOX, (batch_size, 1))
    return Plan(step, (1, 1), nothing, nothing, nothing, nothing, boxes, np.zeros((batch_size, 2), bool), None, error)


@cache
def _blank_image() -> np.ndarray:
    """A JPEG file of one pixel."""
    file = BytesIO()
    Image.new("RGB", (1, 1)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)
