"""NVIDIA DALI as a decoder, told what to do sample by sample.

Which samples, boxes and flips comes from the plan; the host reads the files. With a GPU, DALI decodes, resizes, mirrors
and changes colours there. Without one it stops at the decoded crops, because PyTorch's uint8 resize is twice as fast as
DALI's on a CPU.

An image that DALI refuses fails its whole batch, and the error often does not say which image it was. DALI is then
asked about each image alone, those that it refuses are decoded on the host, and a new pipeline makes the batch again.
The images are remembered: when one comes again, DALI is asked about it before the batch. It is bad only if the host
refuses it too, and then another takes its place, as in the torch loader.

DALI reads no more of a JPEG than the crop needs, so damage below a crop passes unseen. A batch must not depend on what
was found earlier: a resumed run would otherwise differ from one that never stopped, and so would ranks that have seen
different samples. Hence DALI's answer for this very crop decides each time; what is remembered only saves pipelines.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from functools import cache
from io import BytesIO

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline
from nvidia.dali.tensors import TensorCPU, TensorListCPU
from PIL import Image
from torch import Tensor

from fastmae.data.batch import LateBad, Plan, Planner, Source
from fastmae.data.dataset import Dataset
from fastmae.data.decode import UndecodableImage
from fastmae.data.errors import DataError
from fastmae.data.formats import MODES, stored_size
from fastmae.data.host import HostDecoder

_COLORS = ("brightness", "contrast", "saturation", "hue")
_LOOKED_AT, _MOST_SIDE = 4096, 4096
_DEVICE_PADDING, _HOST_PADDING = 16 << 20, 8 << 20
_MAX_FAILURES = 10
_CMYK = MODES.index("CMYK")
logger = logging.getLogger(__name__)


class DaliDecoder(HostDecoder):
    """Decodes with DALI: on the CPU, or with nvJPEG where ``device`` is a GPU.

    The host reads the files, finishes what DALI decodes on a CPU, and decodes what DALI cannot.

    Args:
        planner, num_threads, known_bad, limit_bad: as for ``HostDecoder``.
        device: where the images are made.
        hw_decoder_load: with a GPU, the share of JPEG files for the hardware decoder, if there is one.
    """

    kind = "dali"

    def __init__(
        self,
        planner: Planner,
        num_threads: int,
        known_bad: Iterable[LateBad] = (),
        *,
        device: torch.device,
        hw_decoder_load: float = 0.65,
        limit_bad: bool = True,
    ):
        super().__init__(planner, num_threads, known_bad, limit_bad=limit_bad)
        self.device, self._on_gpu = device, device.type == "cuda"
        self._hints = decoder_hints(planner.dataset, hw_decoder_load) if self._on_gpu else {}
        # The batches in the making take turns with one pipeline: a second one would take as much memory again.
        self._pipeline: Pipeline | None = None
        self._single: Pipeline | None = None
        self._running, self._asking = threading.Lock(), threading.Lock()
        self._suspects = {late.sample_id for late in self.late_bad}
        self._failures = 0

    def describe(self) -> str:
        where = "the CPU"
        if self._on_gpu:
            largest = f"{self._hints['preallocate_height_hint']} x {self._hints['preallocate_width_hint']}"
            where = f"{self.device} (memory for {largest} pixels)"
        return f"DALI loader, decoding on {where}"

    def close(self) -> None:
        self._pipeline = self._single = None

    def decode(self, plan: Plan, images: Tensor) -> None:
        encoded = self._read(plan)
        while True:
            for j, source in enumerate(plan.sources):
                if source.sample_id in self._suspects and self._refuses(source, encoded[j]):
                    encoded[j] = None
            try:
                crops = self._run(plan, encoded)
                break
            except RuntimeError as error:
                if not self._find_suspects(plan, encoded):
                    self._without_dali(plan, images, error)
                    return
        self._failures = 0
        if self._on_gpu:
            from nvidia.dali.plugin.pytorch import feed_ndarray

            # Not DALI's own memory through DLPack: DALI would fill it again as soon as the last reference is gone,
            # while kernels may still read it.
            feed_ndarray(crops.as_tensor(), images, cuda_stream=torch.cuda.current_stream(self.device))
        else:

            def finish_some(numbers: range) -> None:
                # DALI's own memory, a third of the time of np.asarray.
                given = [j for j in numbers if encoded[j] is not None]
                self.finish(plan, {j: torch.from_dlpack(crops[j].__dlpack__()) for j in given}, images)

            self.for_each(finish_some, len(plan))
        self._on_host(plan, [j for j, data in enumerate(encoded) if data is None], images)
        if self._on_gpu:
            torch.cuda.current_stream(self.device).synchronize()

    def _read(self, plan: Plan) -> list[np.ndarray | None]:
        """The files of a batch; None for those that DALI must not get.

        DALI 2.4's decoder on the CPU crashes at headers that are none, and with it the process, so what is left of a
        file must not get there if it does not begin as the index says. And it inverts CMYK without an Adobe marker.
        """
        encoded: list[np.ndarray | None] = [None] * len(plan)

        def read(numbers: range) -> None:
            for j in numbers:
                encoded[j] = self._read_one(plan.sources[j])

        self.for_each(read, len(plan))
        return encoded

    def _read_one(self, source: Source) -> np.ndarray | None:
        if source.mode == _CMYK:
            return None
        try:
            data = self.read(source)
        except UndecodableImage:  # the host finds so, too
            return None
        return data if stored_size(data) == (source.height, source.width) else None

    def _run(self, plan: Plan, encoded: list[np.ndarray | None]):
        """What DALI makes of a batch: crops, on a GPU finished images. They own their memory."""
        inputs = pipeline_inputs(plan, encoded, finished=self._on_gpu)
        with self._running:
            pipeline, self._pipeline = self._pipeline or self._build(inputs), None
            (crops,) = pipeline.run(**inputs)
            self._pipeline = pipeline  # one that has raised is of no use any more
        return crops

    def _on_host(self, plan: Plan, left: list[int], images: Tensor) -> None:
        """Make some images of a batch on the host, one by one, and copy them where they belong."""
        made = torch.empty_like(images, device="cpu") if self._on_gpu else images

        def render_some(numbers: range) -> None:
            for number in numbers:
                self.render(plan, left[number], made)

        self.for_each(render_some, len(left))
        if self._on_gpu and left:
            images[left] = made[left].to(self.device)

    def _build(self, names: Iterable[str]) -> Pipeline:
        device_id = self.device.index if self._on_gpu else None
        # Batch by batch. Only the dynamic executor leaves their memory to the outputs when the next batch is made.
        options = {"prefetch_queue_depth": 1, "exec_dynamic": True}
        pipeline = Pipeline(self.planner.batch_size, self.num_threads, device_id, **options)
        with pipeline:
            # DALI would copy the files while it holds the interpreter lock.
            inputs = {name: fn.external_source(name=name, no_copy=True) for name in names}
            images = decoded_crops(inputs, "mixed" if self._on_gpu else "cpu", self._hints)
            pipeline.set_outputs(finished_images(images, inputs) if self._on_gpu else images)
        try:
            pipeline.build()
        except RuntimeError as error:
            raise DataError(f"DALI cannot build its pipeline on {self.device}: {error}") from error
        return pipeline

    def _find_suspects(self, plan: Plan, encoded: list[np.ndarray | None]) -> bool:
        """Ask DALI about each sample of a batch that failed, a millisecond each; return whether it refuses any."""
        found = {source.sample_id for j, source in enumerate(plan.sources) if self._refuses(source, encoded[j])}
        with self._asking:
            new, self._suspects = found - self._suspects, self._suspects | found
        for sample_id in sorted(new):
            logger.warning("%s: DALI refuses it, so the host decodes it", self.dataset.path(sample_id))
        return bool(found)

    def _refuses(self, source: Source, encoded: np.ndarray | None) -> bool:
        """Whether DALI refuses a sample that it may get, if it is asked about nothing else."""
        if encoded is None:
            return False
        with self._asking:
            if self._single is None:
                self._single = Pipeline(1, 1, self.device.index if self._on_gpu else None, prefetch_queue_depth=1)
                with self._single:
                    inputs = {name: fn.external_source(name=name) for name in ("encoded", "anchors", "shapes")}
                    self._single.set_outputs(decoded_crops(inputs, "mixed" if self._on_gpu else "cpu", {}))
                self._single.build()
            top_left, shape = np.int32(source.box).reshape(2, 2)
            try:
                self._single.run(encoded=[encoded], anchors=[top_left], shapes=[shape])
            except RuntimeError:
                self._single = None
                return True
            return False

    def _without_dali(self, plan: Plan, images: Tensor, error: RuntimeError) -> None:
        """For a batch that DALI fails at although it refuses none of its images: once in a while, not always."""
        self._failures += 1
        if self._failures > _MAX_FAILURES:
            raise DataError(f"DALI failed at {self._failures} batches in a row: {error}") from error
        logger.warning("DALI cannot make step %d, so it is decoded on the host: %s", plan.step, error)
        self._on_host(plan, list(range(len(plan))), images)


def pipeline_inputs(
    plan: Plan, encoded: list[np.ndarray | None], *, finished: bool
) -> dict[str, TensorListCPU | np.ndarray]:
    """What a pipeline that makes crops, or ``finished`` images, gets for a batch: its files and its plan.

    Instead of None, DALI gets a blank image.
    """
    boxes = np.int32([[0, 0, 1, 1] if data is None else s.box for s, data in zip(plan.sources, encoded, strict=True)])
    files = [TensorCPU(_blank_image() if data is None else data) for data in encoded]
    inputs = {
        "encoded": TensorListCPU(files, contiguous=False),
        "anchors": np.ascontiguousarray(boxes[:, :2]),
        "shapes": np.ascontiguousarray(boxes[:, 2:]),
    }
    if finished:
        inputs["sizes"] = np.tile(np.float32(plan.img_size), (len(plan), 1))
        inputs["left_right"], inputs["top_bottom"] = np.ascontiguousarray(plan.flips.T, np.int32)
    if finished and plan.jitter is not None:
        inputs |= zip(_COLORS, np.ascontiguousarray((plan.jitter * (1, 1, 1, 360)).T, np.float32), strict=True)
    return inputs


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
    because the decoder keeps such a buffer for each thread. Whatever is larger costs an allocation when it comes.
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


@cache
def _blank_image() -> np.ndarray:
    """A JPEG file of one pixel."""
    file = BytesIO()
    Image.new("RGB", (1, 1)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)
