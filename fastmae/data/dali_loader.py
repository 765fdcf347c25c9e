"""A loader on NVIDIA DALI, told what to do sample by sample.

DALI reads and decodes; which samples, which boxes and which flips come from the plan, through ``fn.external_source``.
With a GPU, DALI also resizes and mirrors there. Without one it stops at the decoded crops, because PyTorch's uint8
resize is twice as fast as DALI's on a CPU.

An image that does not decode makes a DALI pipeline invalid, and the error often does not say which image it was. So on
an error the step's samples are decoded one by one on the host to find it, and the pipeline is built again at the same
step, which takes milliseconds.

DALI reads no more of a JPEG than the crop needs, so damage below a crop can pass unseen here and be found by the torch
loader, which decodes the whole. The index finds missing ends beforehand; other damage is for a full verification.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import deque

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline

from fastmae.data.batch import Batch, DataError
from fastmae.data.dataset import Dataset
from fastmae.data.decode import UndecodableImage, resize_crop_into
from fastmae.data.loader import PREFETCH, Loader, Plan

logger = logging.getLogger(__name__)

_MAX_FAILURES = 10
_NO_FILE = np.frombuffer(b"/nonexistent/placeholder", np.uint8)


class DaliLoader(Loader):
    """Decodes with DALI: on the CPU, or with nvJPEG where ``device`` is a GPU."""

    kind = "dali"

    def __init__(self, dataset: Dataset, **options):
        super().__init__(dataset, **options)
        self._plans: deque[Plan] = deque()
        self._pipeline: Pipeline | None = None
        self._failures = 0
        self._stream = torch.cuda.Stream(self.device) if self._on_gpu else None

    def close(self) -> None:
        super().close()
        self._pipeline = None

    def produce(self, step: int) -> Batch:
        while True:
            if self._pipeline is None:
                self._plans.clear()
                self._pipeline = self._build(step)
            try:
                (crops,) = self._pipeline.run()
                batch = self._deliver(self._plans[0], crops)
            except RuntimeError as error:
                plan = self._plans[0] if self._plans else self.plan(step)
                self._pipeline = None
                if plan.error is not None:
                    raise plan.error from error
                if self._find_bad(plan):
                    continue
                return self._make_on_host(plan, error)
            self._plans.popleft()
            self._failures = 0
            return batch

    def _build(self, step: int) -> Pipeline:
        feed = _feed(weakref.ref(self), self._plans, step, self.batch_size, with_flips=self._on_gpu)
        device_id = self.device.index if self._on_gpu else None
        pipeline = Pipeline(self.batch_size, self.num_threads, device_id, prefetch_queue_depth=PREFETCH)
        with pipeline:
            paths, anchors, shapes, *mirrored = fn.external_source(feed, num_outputs=3 + 2 * self._on_gpu, batch=True)
            images = fn.decoders.image_slice(
                fn.io.file.read(paths),
                anchors,
                shapes,
                axis_names="HW",
                normalized_anchor=False,
                normalized_shape=False,
                output_type=types.RGB,
                # The boxes are those of upright images, and so must be DALI's idea of the image.
                adjust_orientation=True,
                device="mixed" if self._on_gpu else "cpu",
            )
            if self._on_gpu:
                images = fn.resize(images, size=self.img_size, interp_type=types.INTERP_CUBIC, antialias=True)
                images = fn.flip(images, horizontal=mirrored[0], vertical=mirrored[1])
            pipeline.set_outputs(images)
        try:
            pipeline.build()
        except RuntimeError as error:
            raise DataError(f"DALI cannot build its pipeline on {self.device}: {error}") from error
        return pipeline

    def _deliver(self, plan: Plan, crops) -> Batch:
        if self._on_gpu:
            from nvidia.dali.plugin.pytorch import feed_ndarray

            with torch.cuda.stream(self._stream):
                images = torch.empty(self.batch_size, *self.img_size, 3, dtype=torch.uint8, device=self.device)
                feed_ndarray(crops.as_tensor(), images, cuda_stream=self._stream)
                self._stream.synchronize()
            return self.finish(plan, images)
        images = self.empty_images()
        out = images.numpy()

        def resize(j: int) -> None:
            crop = crops.at(j)
            resize_crop_into(out[j], crop, np.array([0, 0, *crop.shape[:2]]), plan.flips[j])

        self.for_each(resize, self.batch_size)
        return self.finish(plan, images)

    def _to_device(self, batch: Batch) -> Batch:
        if batch.images.is_cuda:
            # The memory comes from this loader's stream; it must not go back there while the caller's still reads it.
            batch.images.record_stream(torch.cuda.current_stream(self.device))
        return super()._to_device(batch)

    def _find_bad(self, plan: Plan) -> bool:
        known = set(self._bad)

        def check(j: int) -> None:
            try:
                self.image(int(plan.source_ids[j]))
            except UndecodableImage as error:
                self.record_bad(int(plan.source_ids[j]), str(error))

        self.for_each(check, self.batch_size)
        return set(self._bad) != known

    def _make_on_host(self, plan: Plan, error: RuntimeError) -> Batch:
        """For a step that DALI fails at although every image decodes: once in a while, not all the time."""
        self._failures += 1
        if self._failures > _MAX_FAILURES:
            raise DataError(f"DALI failed at {self._failures} steps in a row: {error}") from error
        logger.warning("DALI cannot make step %d, so it is decoded on the host: %s", plan.step, error)
        images = self.empty_images()
        out = images.numpy()
        self.for_each(lambda j: self.render(plan, j, out[j]), self.batch_size)
        return self.finish(plan, images)


def _feed(reference: weakref.ref[DaliLoader], plans: deque[Plan], step: int, batch_size: int, with_flips: bool):
    """DALI's callback: plans one batch a call, and notes it. It never raises, because DALI would lose the batches that
    are already under way; it notes the error and names a file that does not exist, so that the right step fails."""

    def feed():
        nonlocal step
        try:
            loader = reference()
            plan = loader.plan(step)
            paths = [np.frombuffer(os.fsencode(loader.dataset.path(int(i))), np.uint8) for i in plan.source_ids]
        except Exception as error:
            nothing = np.zeros(batch_size, np.int64)
            boxes = np.zeros((batch_size, 4), np.int64)
            plan, paths = Plan(step, nothing, nothing, nothing, boxes, boxes[:, :2], error), [_NO_FILE] * batch_size
        plans.append(plan)
        step += 1
        inputs = paths, plan.boxes[:, :2].astype(np.int32), plan.boxes[:, 2:].astype(np.int32)
        return (*inputs, *plan.flips.T.astype(np.int32)) if with_flips else inputs

    return feed
