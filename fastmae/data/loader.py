"""The protocol that all loaders share: which batch comes when, and what happens to a sample that does not decode."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch

from fastmae.data.augment import Augment, crop_boxes, flips
from fastmae.data.batch import BadFile, Batch, DataError
from fastmae.data.dataset import Dataset
from fastmae.data.decode import UndecodableImage, resize_crop_into
from fastmae.data.sampler import batch_positions, permuted_ids, replacements

logger = logging.getLogger(__name__)

PREFETCH = 2
"""Batches made ahead; more does not help where the loader is slower, and costs memory where it is faster."""


@dataclass
class Plan:
    """Everything about one batch that is known before a file is opened. All arrays have one row a sample.

    Attributes:
        sample_ids, epochs: int64, the keys of the samples' random draws.
        source_ids: int64, whose pixels to take: ``sample_ids``, but for replacements.
        boxes: int64 (n, 4), top, left, height, width in the upright source image.
        flips: bool (n, 2), left and right, top and bottom.
        error: what went wrong in planning.
    """

    step: int
    sample_ids: np.ndarray
    epochs: np.ndarray
    source_ids: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    error: BaseException | None = field(default=None)


class Loader(ABC):
    """An endless iterator of batches, made ahead in background threads.

    Batch ``k`` holds the global positions ``position + k * batch_size * world_size + rank * batch_size + j``. Batches
    are equal bit for bit whatever the number of threads, and wherever in the run the loader was started.
    """

    kind: str
    num_producers = 1

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        img_size: tuple[int, int],
        seed: int,
        position: int,
        rank: int,
        world_size: int,
        device: torch.device,
        augment: Augment,
        num_threads: int,
    ):
        self.dataset, self.batch_size, self.img_size, self.seed = dataset, batch_size, img_size, seed
        self.position, self.rank, self.world_size = position, rank, world_size
        self._on_gpu = device.type == "cuda"
        if self._on_gpu and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.augment, self.num_threads = device, augment, num_threads
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fastmae-decode")
        # Threads start on the first GPU: without this, every rank would open a context there.
        on_device = {"initializer": torch.cuda.set_device, "initargs": (self.device,)} if self._on_gpu else {}
        self._producers = ThreadPoolExecutor(self.num_producers, thread_name_prefix="fastmae-batch", **on_device)
        self._pending: deque[Future[Batch]] = deque()
        self._next_step = 0
        self._error: BaseException | None = None
        self._finalizer = weakref.finalize(self, _shut_down, self._producers, self._pool)

    @abstractmethod
    def produce(self, step: int) -> Batch:
        """Make the batch of a step; called in a background thread, in order if there is one producer."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._error is not None:
            raise self._error
        if not self._finalizer.alive:
            raise ValueError("the loader is closed")
        while len(self._pending) < PREFETCH:
            self._submit()
        try:
            batch = self._pending.popleft().result()
        except Exception as error:
            self._error = error  # going on would leave out this batch
            raise
        self._submit()
        return self._to_device(batch)

    def _submit(self) -> None:
        self._pending.append(self._producers.submit(_produce, weakref.ref(self), self._next_step))
        self._next_step += 1

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))

    def close(self) -> None:
        """Stop the background threads and wait for what they are at. Closing twice does no harm."""
        self._finalizer()
        self._pending.clear()
        self._producers.shutdown(wait=True)
        self._pool.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def bad_files(self) -> list[BadFile]:
        """Files that turned out not to decode since this loader was made, in the order of their sample ids."""
        with self._lock:
            return [BadFile(self.dataset.path(sample_id), reason) for sample_id, reason in sorted(self._bad.items())]

    def plan(self, step: int) -> Plan:
        """The samples, boxes and flips of a step; samples known to be bad are replaced already."""
        positions = batch_positions(
            step, batch_size=self.batch_size, position=self.position, rank=self.rank, world_size=self.world_size
        )
        sample_ids, epochs = permuted_ids(positions, len(self.dataset), self.seed)
        source_ids = sample_ids.copy()
        for j in range(len(sample_ids)) if self._bad else ():
            if int(sample_ids[j]) in self._bad:
                source_ids[j] = self._replacement(int(sample_ids[j]), int(epochs[j]))
        boxes = crop_boxes(sample_ids, epochs, *self.dataset.shapes(source_ids), seed=self.seed, augment=self.augment)
        mirrored = flips(sample_ids, epochs, seed=self.seed, augment=self.augment)
        return Plan(step, sample_ids, epochs, source_ids, boxes, mirrored)

    def image(self, sample_id: int) -> np.ndarray:
        """A sample's upright pixels, uint8 (height, width, 3)."""
        pixels = self.dataset.decode(sample_id)
        if pixels.shape[:2] != self.dataset.shape(sample_id):
            raise UndecodableImage(f"decodes to {pixels.shape[:2]}, its header said {self.dataset.shape(sample_id)}")
        return pixels

    def render(self, plan: Plan, j: int, out: np.ndarray) -> None:
        """Decode sample ``j`` of a plan on the host into ``out``, uint8 (H, W, 3); replace it if it is bad."""
        source_id = int(plan.source_ids[j])
        try:
            pixels, box = self.image(source_id), plan.boxes[j]
        except UndecodableImage as error:
            self.record_bad(source_id, str(error))
            pixels, box = self._replace(plan, j)
        resize_crop_into(out, pixels, box, plan.flips[j])

    def _replace(self, plan: Plan, j: int) -> tuple[np.ndarray, np.ndarray]:
        while True:
            source_id = self._replacement(int(plan.sample_ids[j]), int(plan.epochs[j]))
            try:
                pixels = self.image(source_id)
            except UndecodableImage as error:
                self.record_bad(source_id, str(error))
                continue
            shapes = self.dataset.shapes(np.array([source_id]))
            keys = plan.sample_ids[j : j + 1], plan.epochs[j : j + 1]
            return pixels, crop_boxes(*keys, *shapes, seed=self.seed, augment=self.augment)[0]

    def _replacement(self, sample_id: int, epoch: int) -> int:
        for candidate in replacements(sample_id, epoch, len(self.dataset), self.seed):
            if candidate not in self._bad:
                return candidate
        raise DataError(f"{self.dataset.root}: {len(self._bad)} of {len(self.dataset)} images do not decode")

    def record_bad(self, sample_id: int, reason: str) -> None:
        """Remember a sample that does not decode; stop if the data set says so."""
        path = self.dataset.path(sample_id)
        with self._lock:
            known = sample_id in self._bad
            self._bad[sample_id] = reason
        self.dataset.check_bad_fraction(self._bad)
        if not known:
            logger.warning("%s: %s; another sample takes its place", path, reason)

    def empty_images(self) -> torch.Tensor:
        """Memory for a batch's images: uint8 (N, H, W, 3), pinned if it goes to a GPU."""
        return torch.empty(self.batch_size, *self.img_size, 3, dtype=torch.uint8, pin_memory=self._on_gpu)

    def finish(self, plan: Plan, images: torch.Tensor) -> Batch:
        """A batch from images (N, H, W, 3)."""
        ids, epochs = torch.from_numpy(plan.sample_ids), torch.from_numpy(plan.epochs)
        if self._on_gpu:
            ids, epochs = ids.pin_memory(), epochs.pin_memory()
        return Batch(images.permute(0, 3, 1, 2), ids, epochs)

    def for_each(self, action, count: int) -> None:
        """Run ``action(j)`` for ``j`` in ``0..count-1`` on the decoding threads, a few to a task."""
        chunk = max(1, min(16, count // (4 * self.num_threads)))
        starts = range(0, count, chunk)
        tasks = [self._pool.submit(_run_range, action, start, min(start + chunk, count)) for start in starts]
        for task in tasks:
            task.result()


def _run_range(action, start: int, stop: int) -> None:
    for j in range(start, stop):
        action(j)


def _produce(reference: weakref.ref[Loader], step: int) -> Batch:
    # Queued work must not keep a loader alive that nobody holds any more.
    loader = reference()
    if loader is None:
        raise RuntimeError("the loader is gone")
    return loader.produce(step)


def _shut_down(producers: ThreadPoolExecutor, pool: ThreadPoolExecutor) -> None:
    producers.shutdown(wait=False, cancel_futures=True)
    # A producer waits for its tasks in the pool, so the pool ends after it, and is not cancelled under it.
    pool.shutdown(wait=False)


def default_threads(device: torch.device) -> int:
    """Decoding threads: one a core for a GPU, at most 16; half the cores where the model trains on the CPU itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores) if device.type != "cpu" else max(1, min(16, cores // 2))
