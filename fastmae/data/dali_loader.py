"""A loader on NVIDIA DALI, told what to do sample by sample.

DALI decodes; which samples, which boxes and which flips come from the plan, and the files' bytes from the data set,
through ``fn.external_source``. With a GPU, DALI also resizes, mirrors and changes colours there. Without one it stops
at the decoded crops, because PyTorch's uint8 resize is twice as fast as DALI's on a CPU.

An image that does not decode makes a DALI pipeline invalid, and the error often does not say which image it was. So on
an error the step's samples are decoded one by one on the host, those that fail are replaced, and the pipeline is built
again at the same step, which takes milliseconds.

DALI reads no more of a JPEG than the crop needs, so damage below a crop passes unseen. Whether a batch fails, and what
takes the failed samples' place, must not depend on what was found earlier: a run that is continued from a checkpoint
would otherwise differ from one that never stopped, and so would ranks that have seen different samples. Hence a file
that was found bad is tried again when it comes again, and a failing step is decided by decoding all of its samples as a
whole: functions of the step alone. That costs a failing step some milliseconds and the decoding of a batch. A data set
with many bad files is better verified once, so that its index knows them.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from dataclasses import replace
from functools import cache
from io import BytesIO

import numpy as np
import nvidia.dali.fn as fn
import torch
from nvidia.dali import Pipeline
from PIL import Image

from fastmae.data.batch import Batch, DataError
from fastmae.data.dali_graph import decoded_crops, finished_images, input_names, input_values
from fastmae.data.dali_hints import decoder_hints
from fastmae.data.loader import Loader
from fastmae.data.plan import Plan, Planner
from fastmae.data.stored_size import stored_size

logger = logging.getLogger(__name__)

_MAX_FAILURES = 10
_DEPTH = 2
"""Batches inside the pipeline: one being decoded while the one before is taken out."""


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
        self._plans: deque[Plan] = deque()
        self._pipeline: Pipeline | None = None
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
            self._pipeline = None

    def produce(self, step: int) -> Batch:
        mended: Plan | None = None
        while True:
            if self._pipeline is None:
                self._plans.clear()
                self._pipeline = self._build(step, mended)
            try:
                (crops,) = self._pipeline.run()
                if self._plans[0].error is not None:
                    raise self._plans[0].error
                batch = self._deliver(self._plans[0], crops)
            except RuntimeError as error:
                plan = self._plans[0] if self._plans else self.plan(step)
                self._pipeline = None
                if plan.error is not None:
                    raise plan.error from error
                if mended is None:
                    mended = self.mend(plan)
                    if not np.array_equal(mended.source_ids, plan.source_ids):
                        continue
                return self._make_on_host(mended, error)
            self._plans.popleft()
            self._failures = 0
            return batch

    def _build(self, step: int, mended: Plan | None) -> Pipeline:
        names = input_names(self._on_gpu, self.planner.augment.color_jitter > 0)
        feed = _feed(weakref.ref(self), self.batch_size, self._plans, step, mended, names)
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

    def _deliver(self, plan: Plan, crops) -> Batch:
        if self._on_gpu:
            from nvidia.dali.plugin.pytorch import feed_ndarray

            # Not DALI's own memory through DLPack: DALI would fill it again as soon as the last reference is gone,
            # while kernels may still read it. The copy takes what a 38 MB batch takes at the memory's speed.
            with torch.cuda.stream(self._stream):
                shape = self.batch_size, *plan.img_size, 3
                images = torch.empty(shape, dtype=torch.uint8, device=self.device)
                feed_ndarray(crops.as_tensor(), images, cuda_stream=self._stream)
                self._stream.synchronize()
            return self.finish(plan, images)
        images = self.empty_images(plan.img_size)
        out = images.numpy()

        def finish(j: int) -> None:
            crop = np.asarray(crops[j])  # DALI's own memory; at(j) would be a copy
            self.finish_image(plan, j, crop, np.array([0, 0, *crop.shape[:2]]), out[j])

        self.for_each(finish, self.batch_size)
        return self.finish(plan, images)

    def _to_device(self, batch: Batch) -> Batch:
        if batch.images.is_cuda:
            # The memory comes from this loader's stream; it must not go back there while the caller's still reads it.
            batch.images.record_stream(torch.cuda.current_stream(self.device))
        return super()._to_device(batch)

    def read_batch(self, plan: Plan) -> tuple[list[np.ndarray], bool]:
        """The files of a batch, and whether all begin as the index says. DALI 2.4's decoder on the CPU crashes at
        headers that are none, and with it the process, so that what is left of a file must not get there."""
        rows = self.dataset.rows(plan.source_ids)
        sizes = list(zip(rows["height"].tolist(), rows["width"].tolist(), strict=True))
        encoded: list = [None] * len(sizes)
        as_indexed = [False] * len(sizes)

        def read(j: int) -> None:
            encoded[j] = self.read(int(plan.source_ids[j]))
            as_indexed[j] = stored_size(encoded[j]) == sizes[j]

        self.for_each(read, len(sizes))
        return encoded, all(as_indexed)

    def mend(self, plan: Plan) -> Plan:
        """The plan with samples all of which decode as a whole on the host."""
        source_ids, boxes = plan.source_ids.copy(), plan.boxes.copy()

        def check(j: int) -> None:
            good, _ = self.decodable(plan, j)
            source_ids[j], boxes[j] = good.source_ids[j], good.boxes[j]

        self.for_each(check, self.batch_size)
        return replace(plan, source_ids=source_ids, boxes=boxes)

    def _make_on_host(self, plan: Plan, error: RuntimeError) -> Batch:
        """For a step that DALI fails at although every image decodes: once in a while, not all the time."""
        self._failures += 1
        if self._failures > _MAX_FAILURES:
            raise DataError(f"DALI failed at {self._failures} steps in a row: {error}") from error
        logger.warning("DALI cannot make step %d, so it is decoded on the host: %s", plan.step, error)
        images = self.empty_images(plan.img_size)
        out = images.numpy()
        self.for_each(lambda j: self.render(plan, j, out[j]), self.batch_size)
        return self.finish(plan, images)


def _feed(
    reference: weakref.ref[DaliLoader],
    batch_size: int,
    plans: deque[Plan],
    step: int,
    mended: Plan | None,
    names: list[str],
):
    """DALI's callback: plans one batch a call, notes it, and reads its files. It never raises, because DALI would lose
    the batches that are already under way; it notes the error and hands out a blank image, so that the right step
    fails. (What is no image at all can crash DALI 2.4's decoder on the CPU, and with it the process.)

    Args:
        step: of the first batch.
        mended: the first batch's plan, if that is not the usual one.
        names: of the inputs that the pipeline wants.
    """

    def feed():
        nonlocal step
        plan = mended if mended is not None and step == mended.step else None
        try:
            loader = reference()
            plan = plan or loader.plan(step)
            encoded, as_indexed = loader.read_batch(plan)
            if not as_indexed:
                plan = loader.mend(plan)
                encoded, _ = loader.read_batch(plan)
        except Exception as error:
            plan, encoded = _failed(step, batch_size, error), [_blank_image()] * batch_size
        plans.append(plan)
        step += 1
        inputs = input_values(plan, encoded)
        return tuple(inputs[name] for name in names)

    return feed


def _failed(step: int, batch_size: int, error: Exception) -> Plan:
    nothing, boxes = np.zeros(batch_size, np.int64), np.tile([0, 0, 1, 1], (batch_size, 1))
    return Plan(step, (1, 1), nothing, nothing, nothing, nothing, boxes, np.zeros((batch_size, 2), bool), None, error)


@cache
def _blank_image() -> np.ndarray:
    """A JPEG file of one pixel."""
    file = BytesIO()
    Image.new("RGB", (1, 1)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)
